"""A text encoder small enough to run in milliseconds."""

from pathlib import Path

from benchmarks.shared.random_text_encoder import SPECIAL, save_random_encoder

WORDS = [*SPECIAL, "a", "red", "blue", "house", "sky", "newspaper", "page"]
WIDTH = 16


def save_encoder(folder: Path, seed: int = 0) -> str:
    """A BERT with random weights and its tokenizer; returns the folder."""
    return save_random_encoder(folder, WORDS[len(SPECIAL) :], width=WIDTH, seed=seed)
