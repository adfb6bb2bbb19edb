"""A small language model over the flat sequences, with a caption as prefix."""
