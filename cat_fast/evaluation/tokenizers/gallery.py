"""Sheet of the images that the first column reconstructs worst, next to all other columns."""

from functools import partial
from pathlib import Path

from PIL import Image

from cat_fast.data.files import atomic_write
from cat_fast.data.images.contact_sheet import Cell, contact_sheet
from cat_fast.evaluation.tokenizers.run import ReconstructionRun, Results

COUNT = 20
_MAX_NAME = 14


def write_gallery(path: Path, run: ReconstructionRun, results: Results, count: int = COUNT) -> None:
    """Write the sheet, the image with the largest perceptual distance first."""
    first = results.columns[run.columns[0].name]
    worst = sorted(
        range(len(first)), key=lambda number: (-first[number].values["perceptual"], first[number].key)
    )
    rows, labels = [], []
    for number in worst[:count]:
        renditions = [results.columns[column.name][number] for column in run.columns]
        images = run.reconstruct_one(results.keys[number], renditions)
        notes = [("original",)] + [
            (
                column.name,
                f"{row.rendition.choice}{'x' if column.tokenizer.is_spatial else ' tokens'},"
                f" {row.values['psnr']:.1f} dB, {row.values['perceptual']:.3f}",
            )
            for column, row in zip(run.columns, renditions, strict=True)
        ]
        rows.append([Cell(partial(_copy, image), note) for image, note in zip(images, notes, strict=True)])
        labels.append([Path(results.keys[number]).name[-_MAX_NAME:]])
    title = f"worst {len(rows)} images of {run.columns[0].name} by {run.perceptual.name}"
    with atomic_write(path) as part:
        contact_sheet(rows, title=title, labels=labels).save(part, format="PNG")


def _copy(image: Image.Image) -> Image.Image:
    return image.copy()
