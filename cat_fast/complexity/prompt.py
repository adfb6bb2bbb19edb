"""Prompts for language models: the rubric, or a template from a file, followed by the description."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Prompt:
    """Prompt template of a language model."""

    template: str

    @classmethod
    def read(cls, path: Path) -> "Prompt":
        """Read a prompt from a file, such as that of `--prompt-file`."""
        raise NotImplementedError

    @property
    def hash(self) -> str:
        """Hash of the template, stored with the scores."""
        raise NotImplementedError
