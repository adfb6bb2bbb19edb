"""`cat-fast score`: complexity scores of captions and images, with the resulting ratios and token counts."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from typer.core import TyperCommand

from cat_fast import console
from cat_fast.cli.score_cost import cost
from cat_fast.cli.score_distill import distill
from cat_fast.cli.score_loading import load_chosen
from cat_fast.cli.score_options import (
    ApiKeyOption,
    BaseUrlOption,
    BatchSizeOption,
    CaptionerBatchSizeOption,
    CaptionerModelOption,
    CaptionerOption,
    CaptionerTemplateOption,
    CaptionerUrlOption,
    DeviceOption,
    EscalateOption,
    EscalateToOption,
    JpegThresholdsOption,
    ModelOption,
    PromptFileOption,
    QuestionsOption,
    ScorerOption,
)
from cat_fast.cli.score_tables import print_failures, print_scores
from cat_fast.data.files import require_writable
from cat_fast.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cat_fast.complexity.image_score import ImageScorer
    from cat_fast.complexity.score import Scorer
    from cat_fast.complexity.scoring_run.inputs import Inputs
    from cat_fast.complexity.scoring_run.report import ScoreSummary
    from cat_fast.complexity.scoring_run.rows import Row, ScoringResult

_MAX_LISTED = {True: 1000, False: 20}
"""Maximum number of samples in the table, without and with a file of scores."""
_MAX_FAILURES = 10
"""Maximum number of failed samples listed by name."""
_SUBCOMMANDS = typer.Typer(rich_markup_mode="markdown", add_completion=False)
_SUBCOMMANDS.callback()(lambda: None)  # a group, also with one command
_SUBCOMMANDS.command()(cost)
_SUBCOMMANDS.command()(distill)


class ScoreCommand(TyperCommand):
    """The `score` command, and its subcommands where the first argument names one.

    In a group, a caption as the first argument would be an unknown subcommand.
    """

    @property
    def commands(self) -> dict[str, Any]:
        """Subcommands by name, as in a group."""
        return dict(typer.main.get_group(_SUBCOMMANDS).commands)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        if args and (command := self.commands.get(args[0])):
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)


def score(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT…|FILE…]",
            help="Captions to score, or files of captions: .jsonl or .parquet with a caption per row, .txt"
            " with one per line, webdataset archives (.tar), images with a .txt file next to each, and"
            " folders of these. With --captioner, or without captions: images, folders of images, image"
            " indices (.jsonl), archives.",
            show_default=False,
        ),
    ] = None,
    caption: Annotated[
        list[str] | None,
        typer.Option(
            help="Caption, also one that looks like a file name or a subcommand; may be repeated.",
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            help='Class label, scored as "this is an image of LABEL"; may be repeated.', show_default=False
        ),
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="File or folder of captions, also one without a known ending, or a quoted pattern or URL of"
            ' archives; may be repeated. Rows have "caption" and optionally "has_text", "has_faces", "key".',
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE.parquet",
            help="File of scores to write, one row per sample. Run the same command again to resume.",
            show_default=False,
        ),
    ] = None,
    shard: Annotated[
        str,
        typer.Option(
            metavar="I/N",
            help="Score every N-th sample, from sample I (from 0), into a file of its own next to --out. Once"
            " all shards are done, the same command without --shard merges them.",
        ),
    ] = "0/1",
    has_text: Annotated[
        bool | None,
        typer.Option(
            "--has-text/--no-text",
            help="The images contain text or numbers, or do not; rows can override it."
            " Default: inferred from each caption.",
            show_default=False,
        ),
    ] = None,
    has_faces: Annotated[
        bool | None,
        typer.Option(
            "--has-faces/--no-faces",
            help="The images contain faces, or do not; rows can override it."
            " Default: inferred from each caption.",
            show_default=False,
        ),
    ] = None,
    thresholds: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Scores up to A get 32x, above B 8x, between them 16x. Default: the published 4,7.",
            show_default=False,
        ),
    ] = None,
    mean_tokens: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Hard budget: mean tokens per image that are not exceeded, such as 197. The most complex"
            " images get the most tokens; the thresholds then only break ties.",
            show_default=False,
        ),
    ] = None,
    scorer: ScorerOption = None,
    captioner: CaptionerOption = None,
    model: ModelOption = None,
    base_url: BaseUrlOption = None,
    api_key_env: ApiKeyOption = None,
    prompt_file: PromptFileOption = None,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = None,
    escalate: EscalateOption = None,
    escalate_to: EscalateToOption = None,
    captioner_model: CaptionerModelOption = None,
    captioner_url: CaptionerUrlOption = None,
    captioner_template: CaptionerTemplateOption = None,
    captioner_batch_size: CaptionerBatchSizeOption = None,
    questions: QuestionsOption = None,
    jpeg_thresholds: JpegThresholdsOption = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="JSON file to write the results to.", show_default=False),
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show the largest effects on each score, and the rubric."),
    ] = False,
) -> None:
    """Score the complexity of captions or images from 1 to 9 and choose each image's compression ratio.

    Token counts are for 512 px images: 1024 at 8x, 256 at 16x, 64 at 32x.

    An argument is a file if it exists and has a known ending, or is a folder. It is a caption if it is
    neither a path nor ends like a file. Anything else is refused: use --caption TEXT and --file PATH.

    Images with captions are scored by them; --captioner describes images first, and keeps the captions and
    flags that they have. Images without captions are scored by their pixels.

    With --out, memory does not grow with the set, and an interrupted run resumes. Samples that failed are
    rows with an error, which the next run tries again. Exit code 1: some inputs failed, the rest is scored.

    Examples:

        cat-fast score "a plane in a clear sky" "a crowded market hall"

        cat-fast score "a newspaper front page" --has-text --explain

        cat-fast score --label "goldfish" --label "grocery store" --thresholds 4,7

        cat-fast score --file captions.jsonl --json scores.json

        cat-fast score captions.jsonl --out scores.parquet

        cat-fast score shards/ --out scores.parquet --scorer fast --mean-tokens 197

        cat-fast score captions.parquet --out scores.parquet --shard 0/8    (and 1/8 to 7/8 elsewhere)

        cat-fast score captions.jsonl --out s.parquet --escalate 0.6 --model Qwen/Qwen2.5-7B-Instruct

        cat-fast score captions.txt --out s.parquet --scorer endpoint --model NAME --base-url http://HOST:8000/v1

        cat-fast score photos/ --out s.parquet --captioner vlm --captioner-model llava-hf/llava-1.5-7b-hf

        cat-fast score photos/ --out s.parquet --scorer jpeg

    What scoring costs and saves: cat-fast score cost --help
    """
    from cat_fast.complexity import RatioThresholds, default_thresholds, rubric_text
    from cat_fast.complexity.image_scorers.loading import DEFAULT_IMAGE_SCORER, reads_images
    from cat_fast.complexity.scorers.loading import DEFAULT_SCORER
    from cat_fast.complexity.scoring_run.arguments import split_arguments
    from cat_fast.complexity.scoring_run.direct import score_directly
    from cat_fast.complexity.scoring_run.image_inputs import lack_captions, open_images
    from cat_fast.complexity.scoring_run.inputs import open_inputs
    from cat_fast.complexity.scoring_run.outputs import Shard, is_output_of
    from cat_fast.complexity.scoring_run.report import rows_of_file, summarize_file, summarize_rows
    from cat_fast.complexity.scoring_run.rows import sizes_for
    from cat_fast.complexity.scoring_run.samples import Flags

    chosen = RatioThresholds.parse(thresholds) if thresholds is not None else default_thresholds()
    part = Shard.parse(shard)
    if part.of > 1 and not out:
        raise UserError(f"--shard {shard}: applies to --out FILE.parquet, which the shards share")
    given = split_arguments(arguments or [])
    captions, files = [*given.captions, *(caption or [])], [*given.files, *(file or [])]
    if not (captions or files or label):
        raise UserError("nothing to score: pass captions, files or --label (see cat-fast score --help)")
    if json_file:
        require_writable(json_file)
    pixels = reads_images(scorer, captioner)
    if pixels and (captions or label):
        raise UserError(
            f"{f'--captioner {captioner}' if captioner else f'--scorer {scorer}'}: reads images, but captions"
            " or labels are given; leave one of them out"
        )

    def is_output(path: Path) -> bool:
        return out is not None and is_output_of(path, out)

    if scorer is None and not (pixels or captions or label) and lack_captions(files, is_output):
        pixels = True
        console.err.print(
            f"no captions: the images are scored by their pixels, with --scorer {DEFAULT_IMAGE_SCORER}"
        )
    flags = Flags(has_text, has_faces)
    if pixels:
        inputs = open_images(files, flags, is_output)
    else:
        inputs = open_inputs(files, captions, label or [], flags, is_output)
    options = {
        "model": model,
        "base_url": base_url,
        "api_key_env": api_key_env,
        "prompt_file": prompt_file,
        "device": device,
        "batch_size": batch_size,
        "escalate": escalate,
        "escalate_to": escalate_to,
        "captioner_model": captioner_model,
        "captioner_url": captioner_url,
        "captioner_template": captioner_template,
        "captioner_batch_size": captioner_batch_size,
        "questions": questions,
        "jpeg_thresholds": jpeg_thresholds,
        "has_text": has_text,
        "has_faces": has_faces,
    }
    loaded = load_chosen(scorer, captioner, options, images=pixels)
    effects = _effects_of(loaded) if explain else None
    limits = _MAX_LISTED[out is None], _MAX_FAILURES
    if out is None and not files:
        result, rows = score_directly(inputs, cast("Scorer", loaded), chosen, mean_tokens)
        _report(result, summarize_rows(rows, *limits), rows, effects, json_file)
    else:
        from cat_fast.complexity.scoring_run.run import score_set  # imports pyarrow

        with ExitStack() as stack:
            target = out or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "scores.parquet"
            bars = stack.enter_context(console.progress("images" if pixels else "captions"))
            result = score_set(
                inputs,
                loaded,
                target,
                chosen,
                mean_tokens=mean_tokens,
                shard=part,
                sizes=sizes_for(
                    scorer or (DEFAULT_IMAGE_SCORER if pixels else DEFAULT_SCORER),
                    escalated=escalate is not None,
                    captioner=captioner,
                ),
                on_progress=_Bar(bars, inputs, part.of).update,
            )
            bars.stop()
            path = part.path(target)
            _report(result, summarize_file(path, *limits), rows_of_file(path), effects, json_file)
    if out:
        console.out.print(f"Written to {part.path(out)}", markup=False, soft_wrap=True)
    if json_file:
        console.out.print(f"Written to {json_file}", markup=False, soft_wrap=True)
    if explain:
        console.out.print(f"\n{rubric_text()}", markup=False)
    if result.failed or result.problems:
        if out:
            console.err.print("Run the same command again to retry what failed")
        raise typer.Exit(1)


def _report(
    result: "ScoringResult",
    summary: "ScoreSummary",
    rows: "Iterable[Row]",
    effects: "Callable[[dict[str, Any]], str] | None",
    json_file: Path | None,
) -> None:
    from cat_fast.complexity.scoring_run.report import write_report

    if json_file:
        write_report(json_file, result, summary, rows)
    print_scores(result, summary, effects)
    print_failures(result, summary)


class _Bar:
    """Progress bar over samples, which appears when the first one is scored: rows that are kept take no time.

    Args:
        shards: number of processes that share the samples.
    """

    def __init__(self, bars: Any, inputs: "Inputs", shards: int) -> None:
        self.bars, self.inputs, self.shards = bars, inputs, shards
        self.done = 0
        self.task: Any = None

    def update(self, scored: int, kept: int) -> None:
        self.done += scored + kept
        if self.bars.disable or not (scored or self.task is not None):
            return
        total = self.inputs.total()
        if self.task is None:
            self.task = self.bars.add_task("scoring", completed=self.done - scored)
        self.bars.update(self.task, completed=self.done, total=total and -(-total // self.shards))


def _effects_of(scorer: "Scorer | ImageScorer") -> "Callable[[dict[str, Any]], str]":
    """Return the function from a row of scores to the reasons for its score.

    They are the three words and flags with the largest effect, where the scorer computes effects, else the
    scorer's own reasons.
    """
    from cat_fast.complexity import Description

    of_captions = getattr(scorer, "scorer", scorer)  # that of a captioner's descriptions
    contributions = getattr(of_captions, "contributions", None)

    def effects(row: dict[str, Any]) -> str:
        if contributions is None or row["caption"] is None or row["error"] is not None:
            return row["reasons"] or ""
        parts = contributions(Description(row["caption"], row["has_text"], row["has_faces"]))
        return ", ".join(f"{name} {value:+.2f}" for name, value in parts[:3])

    return effects
