"""The published tables, and our figures next to them."""
