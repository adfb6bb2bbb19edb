"""`cat-fast eval classification`."""

import importlib.resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from cat_fast import console
from cat_fast.cli.codec import DeviceOption, JsonOption, ThresholdsOption
from cat_fast.cli.eval_generation import report_left_out
from cat_fast.cli.eval_reconstruction import parse_baseline
from cat_fast.cli.evaluation_options import TokenizerOption
from cat_fast.data.files import sha256
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from cat_fast.evaluation.classification.sets import LabelledSet
    from cat_fast.evaluation.tokenizers.columns import Column
    from cat_fast.evaluation.tokenizers.protocol import NestedTokenizer

RESULT = "classification.json"
WARM_UP_EPOCHS = 2


def classification(
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR|TRAIN::TEST|hf:NAME",
            help="Folder with train/ and test/ (or val/), a subfolder per class; two sources; or a Hugging"
            " Face dataset, hf:NAME or hf:NAME@CONFIG.",
            show_default=False,
        ),
    ],
    tokenizer: TokenizerOption,
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for classification.json, features and runs.", show_default=False
        ),
    ],
    task: Annotated[
        str,
        typer.Option(metavar="linear|finetune", help="Train a linear head on the frozen encoder, or both."),
    ] = "linear",
    ratios: Annotated[
        str,
        typer.Option(
            metavar="RULE,...", help="Rules that choose each image's ratio: adaptive, jpeg, 8, 16, 32."
        ),
    ] = "adaptive,8,16,32",
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Scores by key, as `cat-fast score` writes. Default: labels of the images.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR[@RULE,...]",
            help="Another tokenizer, such as fixed_16x or LDM's kl-f16.ckpt; may be repeated.",
            show_default=False,
        ),
    ] = None,
    references: Annotated[
        bool,
        typer.Option(
            "--references/--no-references",
            help="Also train on pixels of equal width and on a randomly initialised encoder (linear only).",
        ),
    ] = True,
    size: Annotated[int, typer.Option(min=8, help="Side of the centre squares in pixels.")] = 512,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs; the first two warm up.")] = 20,
    thresholds: ThresholdsOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass of the encoder.")] = 32,
    ranks: Annotated[int, typer.Option(min=1, help="Training processes on this machine.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the heads.")] = 0,
    device: DeviceOption = "auto",
    json_output: JsonOption = False,
) -> None:
    """Classify images by their latents: the paper's linear probe or fine-tuning.

    The head is linear on the flattened latent of 8x, to which smaller latents are padded with zeros: 16·64·64
    inputs at 512 px and 16 channels. 20 epochs, batch 64, AdamW at 1e-4 with weight decay 0.1, cosine after
    two warm-up epochs. Next to it, a head on the mean latent has the same size at every ratio.

    Features are encoded once; each head is trained by the training system and resumes after an
    interruption.

    Exit code 1: some images were left out; they are listed.

    Examples:

        cat-fast eval classification --data dtd --tokenizer DIR --scores scores.parquet -o eval

        cat-fast eval classification --data cifar10 --tokenizer nano --size 128 --ratios 8,16 -o eval
    """
    if task not in ("linear", "finetune"):
        raise UserError(f"--task {task}: expected linear or finetune")

    from cat_fast.complexity import RatioThresholds
    from cat_fast.data.files import require_writable, write_json
    from cat_fast.evaluation.classification import summary
    from cat_fast.evaluation.classification.sets import open_splits
    from cat_fast.evaluation.provenance import Stopwatch
    from cat_fast.evaluation.tokenizers.columns import parse_columns, require_distinct_names
    from cat_fast.evaluation.tokenizers.protocol import open_tokenizer

    require_writable(out / RESULT)
    pair = RatioThresholds.parse(thresholds) if thresholds is not None else None
    columns = parse_columns(open_tokenizer(tokenizer, device, "ours"), ratios.split(","), pair)
    for spec in baseline or ():
        name, path, rules = parse_baseline(spec)
        columns += parse_columns(open_tokenizer(path, device, name), rules, pair)
    require_distinct_names(columns)
    splits = open_splits(data)
    started = Stopwatch()
    work = _Work(out, splits, size, scores, epochs, batch_size, ranks, seed)
    rows: list[dict[str, Any]] = []
    with console.progress("images") as work.bars:
        for column in columns:
            rows += work.linear(column) if task == "linear" else work.finetune(column)
        if task == "linear" and references:
            rows += work.references(columns[0])
    protocol = {
        "size": size,
        "crop": "largest centre square, one antialiased bicubic pass (Pillow)",
        "epochs": epochs,
        "warm_up_epochs": min(WARM_UP_EPOCHS, epochs),
        "batch_size": 64,
        "optimizer": "AdamW, lr 1e-4, weight decay 0.1, betas (0.9, 0.999), cosine to 0, no clipping",
        "head": "linear on the flattened latent of 8x; smaller latents are padded with zeros at the end",
        "latents": "mode of the posterior",
        "seed": seed,
    }
    result = summary.result(task, data, rows, protocol, started.record())
    write_json(out / RESULT, result)
    if json_output:
        console.print_json(result)
    else:
        _print(result, out)
    left_out = {(entry["name"], entry["why"]): entry for row in rows for entry in row["skipped"]}
    report_left_out([*left_out.values()], len(left_out))


class _Work:
    """Encodes features and trains heads, each once."""

    bars: Any

    def __init__(
        self,
        out: Path,
        splits: "tuple[LabelledSet, LabelledSet]",
        size: int,
        scores: Path | None,
        epochs: int,
        batch_size: int,
        ranks: int,
        seed: int,
    ) -> None:
        self.out, self.splits, self.size, self.scores = out, splits, size, scores
        self.epochs, self.batch_size, self.ranks, self.seed = epochs, batch_size, ranks, seed
        self.classes = splits[0].classes()
        self._scores_digest = _digest(scores) if scores else None

    def linear(self, column: "Column") -> list[dict[str, Any]]:
        """Return the rows of the flattened and the pooled head on frozen latents."""
        tokenizer = column.tokenizer
        width = self._width(column)
        folder = self._features(column.name, column, tokenizer.encode, width, tokenizer.record(), pooled=True)
        facts = {"tokenizer": tokenizer.record()}
        return [
            self._head(column.name, "flattened", folder / "flat", width, facts),
            self._head(column.name, "pooled", folder / "pooled", self._channels(column), facts),
        ]

    def references(self, column: "Column") -> list[dict[str, Any]]:
        """Return the rows of pixels of equal width, and of an untrained encoder of the same shape."""
        from cat_fast.evaluation.classification.features import (
            encoder_of,
            pixel_features,
            randomly_initialised,
        )
        from cat_fast.evaluation.tokenizers.protocol import NestedTokenizer

        width, rows = self._width(column), []
        folder = self._features(
            "pixels", column, lambda x, _: pixel_features(x, width), width, {"name": "pixels"}, pooled=False
        )
        rows.append(self._head("pixels", "flattened", folder / "flat", width, {}))
        if isinstance(column.tokenizer, NestedTokenizer):
            untrained = randomly_initialised(column.tokenizer.model, self.seed)
            name = f"untrained {column.name.removeprefix(column.tokenizer.name).strip()}"
            record = {"name": name, "fingerprint": untrained.fingerprint()}
            folder = self._features(name, column, encoder_of(untrained), width, record, pooled=False)
            rows.append(self._head(name, "flattened", folder / "flat", width, {"tokenizer": record}))
        return rows

    def finetune(self, column: "Column") -> list[dict[str, Any]]:
        """Return the rows of both heads, each trained with the encoder."""
        from cat_fast.evaluation.classification.arrays import is_complete
        from cat_fast.evaluation.classification.features import Choices, write_images
        from cat_fast.evaluation.tokenizers.protocol import NestedTokenizer

        tokenizer = column.tokenizer
        if not isinstance(tokenizer, NestedTokenizer):
            raise UserError(f"{tokenizer.name}: only tokenizers that load as ours can be fine-tuned")
        folder = self.out / "features" / _slug(f"images {column.rule}") / "flat"
        for split, images in zip(("train", "test"), self.splits, strict=True):
            source = self._source(images, column) | {"inputs": "images"}
            if not is_complete(folder / split, source):
                task = self.bars.add_task(f"images, {split}", total=images.count())
                choices = Choices(column, self.size, self.scores)
                write_images(
                    folder / split,
                    images,
                    self.classes,
                    choices,
                    source,
                    lambda count, task=task: self.bars.advance(task, count),  # type: ignore[misc]
                )
        rows = []
        for head, width in (("flattened", self._width(column)), ("pooled", self._channels(column))):
            facts = {"tokenizer": tokenizer.record()}
            rows.append(self._head(column.name, head, folder, width, facts, tokenizer))
        return rows

    def _features(
        self, name: str, column: "Column", encode: Any, width: int, record: dict[str, Any], pooled: bool
    ) -> Path:
        """Return the folder with the features of both splits, encoded unless they are there."""
        from cat_fast.evaluation.classification.arrays import is_complete
        from cat_fast.evaluation.classification.features import Choices, write_features

        folder = self.out / "features" / _slug(name)
        for split, images in zip(("train", "test"), self.splits, strict=True):
            source = self._source(images, column) | {"encoder": record}
            flat, mean = folder / "flat" / split, folder / "pooled" / split
            if is_complete(flat, source) and (not pooled or is_complete(mean, source)):
                continue
            task = self.bars.add_task(f"{name}, {split}", total=images.count())
            write_features(
                flat,
                images,
                self.classes,
                Choices(column, self.size, self.scores),
                encode,
                width,
                source,
                self.batch_size,
                mean if pooled else None,
                lambda count, task=task: self.bars.advance(task, count),  # type: ignore[misc]
            )
        return folder

    def _head(
        self,
        name: str,
        head: str,
        arrays: Path,
        width: int,
        facts: dict[str, Any],
        finetune: "NestedTokenizer | None" = None,
    ) -> dict[str, Any]:
        """Train one head, unless it has been trained, and return its row.

        Args:
            finetune: tokenizer whose encoder is trained with the head; None for a head on features.
        """
        from cat_fast.data.folder_settings import claim_folder
        from cat_fast.evaluation.classification.arrays import read_arrays
        from cat_fast.evaluation.classification.summary import row
        from cat_fast.training.launch import launch
        from cat_fast.training.loop import EXPORT
        from cat_fast.training.probe.task import PREDICTIONS

        config, label = "finetune" if finetune else "linear", f"{name}, {head}"
        run = self.out / "runs" / _slug(f"{config} {label}")
        steps_per_epoch = -(-len(read_arrays(arrays / "train")) // 64)
        total = self.epochs * steps_per_epoch
        sources = {split: read_arrays(arrays / split).record["source"] for split in ("train", "test")}
        settings = sources | {"steps": total, "seed": self.seed}
        overrides: list[str] = []
        if finetune:  # the images do not identify it, as the features of its encoder do
            settings["tokenizer"] = finetune.model.fingerprint()
            overrides = [f"finetune={finetune.source}", f"pooled={str(head == 'pooled').lower()}"]
        claim_folder(run / "probe.json", settings, "a probe")
        if (run / EXPORT / PREDICTIONS).is_file():
            return row(name, head, run / EXPORT / PREDICTIONS, arrays / "test", width, facts)
        task = self.bars.add_task(f"train {label}", total=total)
        with importlib.resources.as_file(importlib.resources.files("cat_fast.configs")) as configs:
            launch(
                configs / "probe" / f"{config}.yaml",
                [
                    f"output_dir={run}",
                    f"data.train={arrays / 'train'}",
                    f"data.test={arrays / 'test'}",
                    f"seed={self.seed}",
                    f"schedule.total_steps={total}",
                    f"schedule.warmup_steps={min(WARM_UP_EPOCHS, self.epochs) * steps_per_epoch}",
                    *overrides,
                ],
                run_folder=run,
                log=self.out / "logs" / f"{run.name}.log",
                ranks=self.ranks,
                on_step=lambda done, _: self.bars.update(task, completed=done),
            )
        return row(name, head, run / EXPORT / PREDICTIONS, arrays / "test", width, facts)

    def _channels(self, column: "Column") -> int:
        import torch

        smallest = column.tokenizer.choices[0]
        images = torch.zeros(1, 3, 2 * max(column.tokenizer.choices), 2 * max(column.tokenizer.choices))
        return column.tokenizer.encode(images, smallest).shape[1]

    def _width(self, column: "Column") -> int:
        """Return the inputs of the flattened head: the latent of the tokenizer's lowest ratio."""
        smallest = min(column.tokenizer.choices)
        if self.size % max(column.tokenizer.choices):
            raise UserError(f"--size {self.size}: expected a multiple of {max(column.tokenizer.choices)}")
        return self._channels(column) * (self.size // smallest) ** 2

    def _source(self, images: "LabelledSet", column: "Column") -> dict[str, Any]:
        return {
            "images": images.source,
            "fingerprint": images.fingerprint,
            "size": self.size,
            "rule": column.rule,
            "thresholds": list(column.thresholds.pair),
            "scores": self._scores_digest,
        }


def _digest(scores: Path) -> str:
    try:
        return sha256(scores)
    except OSError as error:
        raise UserError(f"--scores {scores}: cannot be read ({error.strerror}); check the path") from error


def _slug(name: str) -> str:
    return "".join(character if character.isalnum() else "-" for character in name.lower())


def _print(result: dict[str, Any], out: Path) -> None:
    table = Table("row", "head", "weights", "accuracy", "95 %")
    for row in result["rows"]:
        low, high = row["accuracy"]["interval"]
        table.add_row(
            row["name"],
            row["head"],
            f"{row['head_weights']:,}",
            f"{row['accuracy']['value']:.1%}",
            f"{low:.1%} to {high:.1%}",
        )
    console.out.print(table)
    console.out.print(Text(f"Written to {out / RESULT}"), soft_wrap=True)
