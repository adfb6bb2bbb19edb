"""Tally of the answers of a ranking study: mean points per method with 95 % intervals."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError, first_line
from cat_fast.evaluation.intervals import ratio_interval


def tally(files: Sequence[Path], seed: int = 0) -> dict[str, Any]:
    """Return the tally of files that the page saved, as JSON.

    The interval is over participants, whose answers to all sets stay together.

    Args:
        seed: of the bootstrap.

    Raises:
        UserError: a file is not a complete answer, two are of one participant, or they are of other studies.
    """
    if not files:
        raise UserError("tally: expected at least one file of answers")
    answers = [_read(path) for path in files]
    for path, answer in zip(files, answers, strict=True):
        if answer["study"] != answers[0]["study"]:
            raise UserError(f"{path}: of study {answer['study']}, the others are of {answers[0]['study']}")
    people = [answer["participant"] for answer in answers]
    for path, person in zip(files, people, strict=True):
        if people.count(person) > 1:
            raise UserError(f"{path}: participant {person} has several files; keep one")
    methods = sorted(answers[0]["sets"][0]["ranking"])
    for path, answer in zip(files, answers, strict=True):
        for one in answer["sets"]:
            if sorted(one["ranking"]) != methods:
                raise UserError(
                    f"{path}: set {one['key']}: expected a ranking of {', '.join(methods)}, got"
                    f" {', '.join(one['ranking'])}"
                )
    points: dict[str, list[int]] = defaultdict(list)
    counts = [len(answer["sets"]) for answer in answers]
    for answer in answers:
        totals = dict.fromkeys(methods, 0)
        for one in answer["sets"]:
            for place, method in enumerate(one["ranking"]):
                totals[method] += len(methods) - place
        for method, total in totals.items():
            points[method].append(total)
    return {
        "study": answers[0]["study"],
        "participants": len(answers),
        "sets": max(counts),
        "methods": {method: _mean(points[method], counts, seed) for method in methods},
    }


def _mean(points: Sequence[int], counts: Sequence[int], seed: int) -> dict[str, Any]:
    estimate = ratio_interval([float(one) for one in points], [float(count) for count in counts], seed)
    assert estimate is not None  # every participant has a set
    return {"points": estimate.value, "interval": [estimate.low, estimate.high]}


def _read(path: Path) -> dict[str, Any]:
    try:
        answer = json.loads(path.read_text(encoding="utf-8"))
        study, participant, sets = str(answer["study"]), str(answer["participant"]), answer["sets"]
        rankings = [{"key": str(one["key"]), "ranking": list(map(str, one["ranking"]))} for one in sets]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of answers ({first_line(error)})") from error
    if not rankings:
        raise UserError(f"{path}: contains no rankings")
    keys = [one["key"] for one in rankings]
    if len(set(keys)) < len(keys):
        raise UserError(f"{path}: a set is ranked twice")
    return {"study": study, "participant": participant, "sets": rankings}
