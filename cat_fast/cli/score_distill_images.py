"""`cat-fast score distill --images`: fit the image student, and print the table of trials."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from cat_fast import console
from cat_fast.data.files import require_writable, write_json

NAME = "image_student"


def distill_images(
    sources: Sequence[str], rated_images: Path, per_source: int, out: Path, work: Path
) -> None:
    """Try all heads out of fold, fit the best one to all images, and write it with its report and card.

    Args:
        sources: as for `captioned_images`.
        rated_images: folder of rated photographs.
        per_source: maximum number of images per source of an index.
        out: folder for image_student.npz and image_student.json.
        work: folder for the features of images.
    """
    from cat_fast.complexity.distillation.images.examples import (
        captioned_images,
        licences,
        rated_photographs,
    )
    from cat_fast.complexity.distillation.images.image_data import compute_data, published_trunk
    from cat_fast.complexity.distillation.images.speed import measure_speed
    from cat_fast.complexity.distillation.images.student_fit import best_candidate, fit_student
    from cat_fast.complexity.distillation.images.trials import passes, run_trials, table
    from cat_fast.complexity.scorers.loading import default_scorer

    require_writable(out / f"{NAME}.npz")
    teacher, trunk = default_scorer(), published_trunk()
    examples = rated_photographs(rated_images)
    for source in sources:
        examples += captioned_images(source, teacher, per_source)
    with console.progress("images") as bars:
        bar = bars.add_task("computing features", total=len(examples))
        data = compute_data(examples, trunk, work, lambda: bars.advance(bar))
    with console.progress("trials") as bars:
        bar = bars.add_task("trials", total=None)
        trials = run_trials(data, lambda name: bars.update(bar, advance=1, description=name))
    rows = table(trials, data.targets[data.rated])
    chosen = best_candidate(rows)
    student = fit_student(data, trunk, chosen, trials[chosen])
    path = out / f"{NAME}.npz"
    student.save(path)
    counts = Counter(data.sources.tolist())
    known = licences(sources)
    write_json(
        path.with_suffix(".json"),
        {
            "version": student.version,
            "file_bytes": path.stat().st_size,
            "head": chosen,
            "passes": passes(rows[chosen]),
            "speed": measure_speed(student),
            "teacher": f"{teacher.name} {teacher.version}",
            "trials": rows,
            "training_images": {
                name: {"images": count, "licence": known.get(name, "not distributed")}
                for name, count in sorted(counts.items())
            },
        },
    )
    _print(rows, chosen)
    console.out.print(f"Written to {path} and .json", markup=False, soft_wrap=True)


def _print(rows: dict[str, Any], chosen: str) -> None:
    table = Table("model")
    for column in ("ratio agreement", "Spearman", "over JPEG: agreement", "Spearman"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        cells = [f"{row[key]['value']:.3f}" for key in ("agreement", "spearman")]
        for key in ("agreement", "spearman"):
            found = row.get("over_jpeg", {}).get(key)
            cells.append(
                f"{found['value']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})" if found else ""
            )
        table.add_row(f"{name}{' *' if name == chosen else ''}", *cells)
    console.out.print(table)
    console.out.print("* saved; differences with 95 % intervals", markup=False)
