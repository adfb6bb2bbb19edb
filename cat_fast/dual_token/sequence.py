"""Flat integer sequences for language models: vocabulary, writing, strict reading, and the grammar.

    begin  semantic  s1 ... s32  guide  rows_h  columns_w  g1 ... g(h*w)  end

The guide is in row order. Without semantic codes, or without a guide, its part is left out, marker included.

    vocabulary = Vocabulary(semantic_length=32, semantic_size=8192, guide_size=16384)
    ids = vocabulary.flatten(tokens)
    vocabulary.parse(ids) == tokens
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cat_fast.dual_token.tokens import DualTokens
from cat_fast.errors import UserError

SPECIAL = ("pad", "begin", "end", "semantic", "guide")


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Map between codes and the ids of a sequence.

    The ids are, from `offset`: the special tokens; the row and column counts 1 to `max_side`; the semantic
    codes; the guide codes. An offset appends them to the vocabulary of a language model.

    Raises:
        UserError: negative sizes, or neither semantic codes nor a guide.
    """

    semantic_length: int
    """Number of semantic codes per image; 0 without the semantic branch."""
    semantic_size: int
    """Size of the semantic codebook."""
    guide_size: int
    """Size of the guide's codebook; 0 without a guide."""
    max_side: int = 64
    """Maximum height and width of a guide in tokens."""
    offset: int = 0
    """Id of the first token."""

    def __post_init__(self) -> None:
        values = (self.semantic_length, self.semantic_size, self.guide_size, self.max_side, self.offset)
        if min(values) < 0 or not (self.semantic_length or self.guide_size):
            raise UserError(f"vocabulary: expected sizes of at least one kind of code, got {self}")

    @property
    def pad(self) -> int:
        return self.offset

    @property
    def begin(self) -> int:
        return self.offset + 1

    @property
    def end(self) -> int:
        return self.offset + 2

    @property
    def semantic(self) -> int:
        """Marker before the semantic codes."""
        return self.offset + 3

    @property
    def guide(self) -> int:
        """Marker before the guide's height, width and codes."""
        return self.offset + 4

    @property
    def rows(self) -> range:
        """Ids of the heights 1 .. max_side."""
        first = self.offset + len(SPECIAL)
        return range(first, first + self.max_side)

    @property
    def columns(self) -> range:
        """Ids of the widths 1 .. max_side."""
        return range(self.rows.stop, self.rows.stop + self.max_side)

    @property
    def semantic_codes(self) -> range:
        return range(self.columns.stop, self.columns.stop + self.semantic_size)

    @property
    def guide_codes(self) -> range:
        return range(self.semantic_codes.stop, self.semantic_codes.stop + self.guide_size)

    def __len__(self) -> int:
        """Return the number of ids."""
        return self.guide_codes.stop - self.offset

    def check(self, tokens: DualTokens) -> None:
        """Check that codes are within the codebooks and complete.

        Raises:
            UserError: they are not.
        """
        length = tokens.semantic.numel()
        if length not in (0, self.semantic_length):
            raise UserError(f"semantic codes: expected {self.semantic_length} per image, got {length}")
        for name, codes, size in (
            ("semantic", tokens.semantic, self.semantic_size),
            ("guide", tokens.guide, self.guide_size),
        ):
            if codes.numel() and int(codes.max()) >= size:
                raise UserError(
                    f"{name} codes: expected 0 .. {size - 1}, the codes of this tokenizer, got"
                    f" {int(codes.max())}"
                )
        if max(tokens.grid) > self.max_side:
            raise UserError(
                f"guide codes: expected at most {self.max_side} rows and columns, got"
                f" {tokens.grid[0]} x {tokens.grid[1]}"
            )
        if not len(tokens):
            raise UserError("no codes: expected semantic codes, a guide, or both")

    @property
    def guide_bits(self) -> float:
        """Bits per guide code."""
        return math.log2(max(self.guide_size, 1))

    @property
    def semantic_bits(self) -> float:
        """Bits per semantic code."""
        return math.log2(max(self.semantic_size, 1))

    def bits(self, tokens: DualTokens) -> float:
        """Return the bits of the codes of an image, without special tokens."""
        return tokens.semantic.numel() * self.semantic_bits + tokens.guide.numel() * self.guide_bits

    def flatten(self, tokens: DualTokens) -> list[int]:
        """Return the sequence of an image.

        Raises:
            UserError: see `check`.
        """
        self.check(tokens)
        ids = [self.begin]
        if tokens.semantic.numel():
            ids += [self.semantic, *(tokens.semantic + self.semantic_codes.start).tolist()]
        if tokens.guide.numel():
            height, width = tokens.grid
            ids += [self.guide, self.rows[height - 1], self.columns[width - 1]]
            ids += (tokens.guide.flatten() + self.guide_codes.start).tolist()
        return [*ids, self.end]

    def parse(self, ids: Sequence[int]) -> DualTokens:
        """Return the codes of a complete sequence.

        Raises:
            UserError: an id outside the vocabulary or at a place where the grammar does not allow it, or a
                sequence that is cut or continues after its end.
        """
        grammar = Grammar(self)
        for position, token in enumerate(ids):
            if not any(token in allowed for allowed in grammar.allowed()):
                raise UserError(
                    f"token {position} of the sequence: expected {grammar.expected()}, got"
                    f" {self.describe(token)}"
                )
            grammar.advance(token)
        if not grammar.finished:
            raise UserError(
                f"the sequence is cut after {len(ids)} tokens: expected {grammar.expected()} next"
            )
        semantic = torch.tensor(grammar.semantic, dtype=torch.int64)
        return DualTokens(semantic, torch.tensor(grammar.guide, dtype=torch.int64).view(grammar.grid))

    def describe(self, token: int) -> str:
        """Return the meaning of an id, for messages."""
        if self.offset <= token < self.rows.start:
            return f"{token} ({SPECIAL[token - self.offset]})"
        for name, ids, first in (
            ("height", self.rows, 1),
            ("width", self.columns, 1),
            ("semantic code", self.semantic_codes, 0),
            ("guide code", self.guide_codes, 0),
        ):
            if token in ids:
                return f"{token} ({name} {ids.index(token) + first})"
        return f"{token}, which is outside the vocabulary {self.offset} .. {self.guide_codes.stop - 1}"


class Grammar:
    """State of a sequence that is read, or sampled, from left to right.

    At each position `allowed` returns the ids that keep the sequence valid, so that sampling among them
    always ends in a sequence that `Vocabulary.parse` accepts.

    Args:
        grids: if given, the grids (height, width) that may follow; by default all up to `max_side`.
        complete: demand all parts that the vocabulary has, so that the image can be decoded without an
            ablation. By default one of them is enough.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        grids: Sequence[tuple[int, int]] | None = None,
        *,
        complete: bool = False,
    ) -> None:
        self.vocabulary, self._complete = vocabulary, complete
        self._grids = None if grids is None else set(grids)
        self._expects = "begin"
        self.semantic: list[int] = []
        """Semantic codes so far."""
        self.guide: list[int] = []
        """Guide codes so far."""
        self.grid = (0, 0)
        """Height and width of the guide, once they are known."""

    @property
    def finished(self) -> bool:
        return self._expects == "nothing"

    @property
    def remaining(self) -> int:
        """Number of tokens that must follow before the sequence can end, as far as it is determined."""
        if self._expects == "semantic code":
            return self.vocabulary.semantic_length - len(self.semantic)
        if self._expects == "guide code":
            return self.grid[0] * self.grid[1] - len(self.guide)
        return 0

    def allowed(self) -> list[range]:
        """Return the ids that may come next, as ranges; none after the end."""
        known = self.vocabulary

        def single(token: int) -> range:
            return range(token, token + 1)

        if self._expects == "part":
            lacks_codes = bool(known.semantic_length) and not self.semantic
            options = [single(known.end)] if self.semantic and not self._complete else []
            if known.guide_size and not (self._complete and lacks_codes):
                options.append(single(known.guide))
            if lacks_codes:
                options.append(single(known.semantic))
            return options
        if self._expects == "height":
            heights = sorted({height for height, _ in self._grids}) if self._grids is not None else None
            return _sides(known.rows, heights)
        if self._expects == "width":
            grids = self._grids
            widths = None if grids is None else sorted({w for h, w in grids if h == self.grid[0]})
            return _sides(known.columns, widths)
        return {
            "begin": [single(known.begin)],
            "semantic code": [known.semantic_codes],
            "guide code": [known.guide_codes],
            "end": [single(known.end)],
            "nothing": [],
        }[self._expects]

    def expected(self) -> str:
        """Return the names of the tokens that may come next, for messages."""
        if self._expects == "part":
            names = ["the semantic codes"] if not self.semantic and self.vocabulary.semantic_length else []
            names += ["the guide"] if self.vocabulary.guide_size else []
            return " or ".join([*names, *(["the end"] if self.semantic else [])])
        if self.remaining:
            return f"{self.remaining} more {self._expects}{'s' * (self.remaining > 1)}"
        return {"begin": "the begin token", "end": "the end token"}.get(
            self._expects, f"a {self._expects}" if self._expects != "nothing" else "nothing after the end"
        )

    def advance(self, token: int) -> None:
        """Append a token, one of `allowed`."""
        known = self.vocabulary
        if self._expects == "begin":
            self._expects = "part"
        elif self._expects == "part":
            self._expects = {known.end: "nothing", known.guide: "height", known.semantic: "semantic code"}[
                token
            ]
        elif self._expects == "semantic code":
            self.semantic.append(token - known.semantic_codes.start)
            if len(self.semantic) == known.semantic_length:
                self._expects = "part" if known.guide_size else "end"
        elif self._expects == "height":
            self.grid, self._expects = (known.rows.index(token) + 1, 0), "width"
        elif self._expects == "width":
            self.grid, self._expects = (self.grid[0], known.columns.index(token) + 1), "guide code"
        elif self._expects == "guide code":
            self.guide.append(token - known.guide_codes.start)
            if len(self.guide) == self.grid[0] * self.grid[1]:
                self._expects = "end"
        else:
            self._expects = "nothing"


def _sides(ids: range, sides: Sequence[int] | None) -> list[range]:
    """Return the ids of the given heights or widths, all if None."""
    return [ids] if sides is None else [range(ids[side - 1], ids[side - 1] + 1) for side in sides]
