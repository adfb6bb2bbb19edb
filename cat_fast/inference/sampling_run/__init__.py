"""Drawing of many images into a folder."""
