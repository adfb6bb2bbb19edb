"""Generation of token records from captions, by a language model and its tokenizer."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from cat_fast.data.files import require_writable
from cat_fast.data.folder_settings import claim_folder, require_same_settings
from cat_fast.data.row_file import RowFile
from cat_fast.data.text_files import parse_object, text_lines
from cat_fast.dual_token.grid import Grid
from cat_fast.dual_token.language.model import DualLanguageModel
from cat_fast.dual_token.language.sampling import require_sampling, sample
from cat_fast.dual_token.semantic.text_target import TextTarget
from cat_fast.dual_token.token_file import TokenRecord, from_row, to_row
from cat_fast.dual_token.tokenizer import DualTokenizer
from cat_fast.errors import UserError, first_line
from cat_fast.models.execution import execution_settings
from cat_fast.weights.fingerprint import fingerprint

PLAN, TOKENS = "generated.json", "tokens.jsonl"


def check_fit(model: DualLanguageModel, tokenizer: DualTokenizer, target: TextTarget) -> None:
    """Check that a language model was trained with a tokenizer and a text encoder.

    Raises:
        UserError: it was trained with others.
    """
    for what, trained, own in (
        ("tokenizer", model.config["tokenizer_fingerprint"], tokenizer.fingerprint()),
        ("text encoder", model.config["text_fingerprint"], target.fingerprint()),
    ):
        if trained not in (None, own):
            raise UserError(
                f"the language model was trained with {what} {trained}, got {own}; use that of its training"
            )


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Options of `sample`.

    Raises:
        UserError: a temperature or top_k out of its range.
    """

    grids: Sequence[Grid] | None = None
    temperature: float = 1.0
    top_k: int = 0
    seed: int = 0
    """Image i has the seed `seed` + i."""

    def __post_init__(self) -> None:
        require_sampling(self.temperature, self.top_k)


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Result for one caption: its record, or an error."""

    caption: str
    record: TokenRecord | None = None
    error: str | None = None


class GenerationRun:
    """Token records of captions in one folder, named after their numbers.

        generated.json    settings and captions; written before the first record
        tokens.jsonl      a line per record, appended as it is complete

    Args:
        target: text encoder of the captions.
        out: created if missing; resumed if started with the same arguments.

    Raises:
        UserError: parts that were not trained together, or a folder with tokens made with other arguments.
            Nothing is written then.
    """

    def __init__(
        self,
        model: DualLanguageModel,
        tokenizer: DualTokenizer,
        target: TextTarget,
        captions: Sequence[str],
        settings: SamplingSettings,
        out: Path,
    ) -> None:
        check_fit(model, tokenizer, target)
        self.model, self.target, self.captions = model, target, captions
        self.settings, self.out = settings, out
        self.vocabulary, self.fingerprint = tokenizer.vocabulary, tokenizer.fingerprint()
        self._plan: dict[str, Any] = {
            "settings": asdict(settings)
            | {
                "language_model": fingerprint(dict(model.config), model.state_dict()),
                "tokenizer": self.fingerprint,
                "text_encoder": target.fingerprint(),
                "num_states": target.num_states,
                "device": model.device.type,
            }
            | execution_settings(model.dtype),
            "captions": list(captions),
        }
        require_same_settings(out / PLAN, self._plan, "tokens")
        self._rows = RowFile(out / TOKENS)
        self._known: dict[str, TokenRecord] = {}
        self._is_claimed = (out / PLAN).exists()
        if self._is_claimed:
            for number, row in enumerate(self._rows.read(), 1):
                record = from_row(row, number, self.vocabulary, self.fingerprint)
                self._known[record.key] = record

    def count_done(self) -> int:
        """Return the number of records that an earlier call has written."""
        return len(self._known)

    def generate(self, on_done: Callable[[], Any] = lambda: None) -> list[Generated]:
        """Generate the missing records and return the results of all captions, in order.

        A caption whose sequence is too long for the model is an error of its own.

        Args:
            on_done: called after each missing record.

        Raises:
            UserError: the folder cannot be written.
        """
        require_writable(self.out / TOKENS)
        digits = max(4, len(str(len(self.captions) - 1)))
        results = []
        for number, caption in enumerate(self.captions):
            key = f"{number:0{digits}}"
            if key in self._known:
                results.append(Generated(caption=caption, record=self._known[key]))
                continue
            results.append(self._sample(caption, key, self.settings.seed + number))
            if record := results[-1].record:
                self._claim()
                self._rows.append(to_row(record, self.vocabulary))
            on_done()
        return results

    def _sample(self, caption: str, key: str, seed: int) -> Generated:
        settings = self.settings
        try:
            (text,) = self.target.states([caption])
            ids = sample(
                self.model,
                self.vocabulary,
                text,
                seed,
                grids=settings.grids,
                temperature=settings.temperature,
                top_k=settings.top_k,
            )
        except UserError as error:
            return Generated(caption=caption, error=f"{key} ({shorten(caption, 60)}): {error}")
        record = TokenRecord(
            key=key,
            source=caption,
            size=(0, 0),
            tokens=self.vocabulary.parse(ids),
            tokenizer=self.fingerprint,
        )
        return Generated(caption=caption, record=record)

    def _claim(self) -> None:
        """Claim the folder. Not before the first record: a run that fails must not keep others from it."""
        if not self._is_claimed:
            self._rows.path.unlink(missing_ok=True)  # tokens of other arguments
            claim_folder(self.out / PLAN, self._plan, "tokens")
            self._is_claimed = True


def read_captions(path: Path) -> list[str]:
    """Return the captions of a text file, one per line, or of JSON lines with a `caption` each.

    Raises:
        UserError: the file cannot be read, or has no captions.
    """
    found = []
    for number, line in text_lines(path):
        caption: Any = line
        if path.suffix == ".jsonl":
            try:
                caption = parse_object(line)["caption"]
            except (ValueError, KeyError) as error:
                raise UserError(f"{path}: line {number}: expected a caption ({first_line(error)})") from error
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"{path}: line {number}: expected a caption, got {caption!r}")
        found.append(caption)
    if not found:
        raise UserError(f"{path}: contains no captions")
    return found
