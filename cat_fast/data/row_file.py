"""Files of JSON rows that an interrupted run continues."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError


class RowFile:
    """A file of JSON lines that grows by one row at a time. A killed run loses the row it was writing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """Return the complete rows; a last line that was cut is removed from the file.

        Raises:
            UserError: the file cannot be read, or has a line that is not valid JSON.
        """
        if not self.path.exists():
            return []
        try:
            content = self.path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
            if complete != content:  # the next row must not continue the cut one
                os.truncate(self.path, len(complete))
            return [json.loads(line) for line in complete.split(b"\n") if line]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise UserError(f"{self.path}: not valid JSON lines ({error}); delete it") from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from error
