"""Distances between two sets of images, computed from their features."""
