"""The paper's study of complexity (section 3.1) on any set of images."""
