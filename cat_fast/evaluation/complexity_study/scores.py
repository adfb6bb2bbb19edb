"""Files of scores, matched to images by key."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pyarrow
import pyarrow.parquet

from cat_fast.errors import UserError

_COLUMNS = ("key", "caption", "expected", "score", "scorer")


@dataclass(frozen=True)
class ScoredImage:
    """Score and caption of an image."""

    expected: float
    score: int
    caption: str | None


@dataclass(frozen=True)
class ScoreSet:
    """Scores of one scorer.

    Args:
        rows: by key.
    """

    name: str
    scorer: str
    rows: dict[str, ScoredImage]

    @classmethod
    def read(cls, argument: str) -> "ScoreSet":
        """Read a file of `cat-fast score`, given as FILE or NAME=FILE; the default name is the scorer's.

        Raises:
            UserError: the file cannot be read, is not a file of scores, or has no scores.
        """
        name, separator, path = argument.partition("=")
        if not separator or Path(argument).exists():
            name, path = "", argument
        try:
            table = pyarrow.parquet.read_table(path, columns=[*_COLUMNS])
        except FileNotFoundError:
            raise UserError(f"--scores {path}: no such file; create it with cat-fast score --out") from None
        except (OSError, pyarrow.ArrowException, KeyError) as error:
            raise UserError(
                f"--scores {path}: not a file of scores ({error}); create it with cat-fast score --out"
            ) from error
        rows = [row for row in table.to_pylist() if row["score"] is not None]
        if not rows:
            raise UserError(f"--scores {path}: contains no scores; see its column error")
        scorer = rows[0]["scorer"]
        found = {row["key"]: ScoredImage(row["expected"], row["score"], row["caption"]) for row in rows}
        return cls(name or scorer.rpartition(" ")[0], scorer, found)

    def find(self, keys: Sequence[str]) -> list[ScoredImage | None]:
        """Return the score of each image: by its key, else by its file name, else by that without suffix."""
        by_name = _distinct({PurePosixPath(key).name: key for key in self.rows}, self.rows)
        by_stem = _distinct({PurePosixPath(key).stem: key for key in self.rows}, self.rows, stem=True)
        found = []
        for key in keys:
            path = PurePosixPath(key)
            match = key if key in self.rows else by_name.get(path.name) or by_stem.get(path.stem)
            found.append(None if match is None else self.rows[match])
        return found


def _distinct(names: dict[str, str], rows: dict[str, ScoredImage], stem: bool = False) -> dict[str, str]:
    """Return the names that only one row has."""
    counts = Counter(PurePosixPath(key).stem if stem else PurePosixPath(key).name for key in rows)
    return {name: key for name, key in names.items() if counts[name] == 1}
