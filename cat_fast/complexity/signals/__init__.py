"""Measures of complexity from pixels, without a description."""
