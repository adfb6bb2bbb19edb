"""Resumable sampling of many images into a folder."""
