"""Trained models that ship with the package, by name.

shipped/nano            a pipeline: nested tokenizer (vae/), text-conditional DiT and what belongs to it
shipped/nano-fixed-16x  the tokenizer's fixed 16x twin (vae/)
"""

from pathlib import Path

from cat_fast.errors import UserError

SHIPPED = Path(__file__).parent / "shipped"
NAMES = ("nano", "nano-fixed-16x")
TOKENIZER = "vae"
"""Subfolder of a model with its tokenizer."""
TABLES = "tables.json"
"""File of a model with its measured figures, a list of tables: title, header and rows."""


def shipped_folder(name: str, part: str = "") -> Path | None:
    """Return the folder of a shipped model, or of its part; None for other names and for local paths.

    Raises:
        UserError: this installation does not contain the model.
    """
    if name not in NAMES or Path(name).exists():
        return None
    folder = SHIPPED / name / part
    weights = folder if part else folder / TOKENIZER
    if not any(weights.glob("*.safetensors")):
        raise UserError(
            f"{name}: this installation of cat_fast lacks the shipped models, cat_fast/weights/shipped "
            f"({weights.relative_to(SHIPPED.parent)} has no weights); install the package with its data "
            "files, or use the folder of a model of your own"
        )
    return folder
