"""Quality of generated images against a reference: FID, sFID, IS, precision, recall, KID, FD-DINOv2."""
