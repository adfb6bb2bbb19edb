"""Captioners: images to descriptions, with vision-language models or with detectors of text and faces."""
