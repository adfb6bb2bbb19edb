"""Ratio sampling: step plans (ratio and number of images per rank), and cost tables that balance them."""
