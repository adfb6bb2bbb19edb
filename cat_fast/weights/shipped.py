"""Trained models that ship with the package, by name.

shipped_models/
    nano/            a pipeline: nested tokenizer (vae/), text-conditional DiT, schedule, text encoder
    nano-fixed-16x/  the tokenizer's fixed 16x twin (vae/)
"""

from pathlib import Path

from cat_fast.errors import UserError

SHIPPED = Path(__file__).parent / "shipped_models"
NAMES = ("nano", "nano-fixed-16x")
TOKENIZER = "vae"
"""Subfolder of a model with its tokenizer."""
TRANSFORMER = "transformer"
TABLES = "tables.json"
"""File of a model with its measured figures, a list of tables: title, header and rows."""


def shipped_folder(name: str, part: str = "") -> Path | None:
    """Return the folder of a shipped model, or of its part; None for other names and for local paths.

    Raises:
        UserError: this installation does not contain the model, or has its tokenizer only.
    """
    if name not in NAMES or Path(name).exists():
        return None
    return installed_folder(name, part)


def installed_folder(name: str, part: str = "") -> Path:
    """Return the folder of a shipped model, or of its part, also where a local folder has its name.

    Raises:
        UserError: as `shipped_folder`.
    """
    folder = SHIPPED / name / part
    weights = folder if part else folder / TRANSFORMER
    if not any(weights.glob("*.safetensors")):
        raise UserError(
            f"{name}: this installation of cat_fast lacks the shipped models in cat_fast/weights "
            f"({weights.relative_to(SHIPPED.parent)} has no weights); install the package with its data "
            "files, or use the folder of a model of your own"
        )
    return folder
