"""Images: reading and writing, crops, caption files, and the image index."""
