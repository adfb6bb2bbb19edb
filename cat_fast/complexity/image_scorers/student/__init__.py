"""A small model that scores images by their pixels, distilled from scores of their descriptions."""
