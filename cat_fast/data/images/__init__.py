"""Images: reading and writing, crops, captions next to them, and the index that lists them."""
