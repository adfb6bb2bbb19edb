"""Scorers by name: which class gets which arguments; classes of language models are stand-ins."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cat_fast.complexity.scorers.loading import DISTILLED, SCORERS, load_scorer
from cat_fast.errors import UserError

PACKAGE = "cat_fast.complexity.scorers"
CLASSES = {
    "language_model.transformers_scorer": "TransformersScorer",
    "language_model.endpoint_scorer": "EndpointScorer",
    "language_model.gguf_scorer": "GgufScorer",
    "escalating": "EscalatingScorer",
    "caption_length": "CaptionLength",
}


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace each class by a function that returns its name and arguments."""

    def stand_in(name: str):
        return lambda *arguments, **keywords: (name, arguments, keywords)

    for module, name in CLASSES.items():
        monkeypatch.setitem(sys.modules, f"{PACKAGE}.{module}", SimpleNamespace(**{name: stand_in(name)}))
    prompts = SimpleNamespace(Prompt=SimpleNamespace(read=lambda path: f"prompt of {path}"))
    monkeypatch.setitem(sys.modules, "cat_fast.complexity.prompt", prompts)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "length"}, ("CaptionLength", (), {})),
        ({"name": "length", "device": "auto"}, ("CaptionLength", (), {})),
        (
            {"name": "llm", "model": "m", "device": "cuda:1", "batch_size": 4, "prompt_file": Path("p.txt")},
            (
                "TransformersScorer",
                ("m",),
                {"device": "cuda:1", "batch_size": 4, "prompt": "prompt of p.txt"},
            ),
        ),
        ({"name": "llm", "model": "m", "device": "auto"}, ("TransformersScorer", ("m",), {})),
        (
            {"name": "endpoint", "model": "m", "base_url": "u", "api_key_env": "KEY", "batch_size": 4},
            ("EndpointScorer", ("m", "u"), {"api_key_env": "KEY", "concurrency": 4}),
        ),
        ({"name": "gguf", "model": "m.gguf"}, ("GgufScorer", ("m.gguf",), {})),
        (
            {"name": "gguf", "base_url": "http://u", "batch_size": 2},
            ("GgufScorer", ("http://u",), {"concurrency": 2}),
        ),
    ],
)
def test_options_reach_their_scorer(options, expected) -> None:
    assert load_scorer(**options) == expected


@pytest.mark.parametrize("name", DISTILLED)
def test_escalation_combines_a_distilled_scorer_with_a_model(name: str) -> None:
    kind, (first, second, below), _ = load_scorer(
        name, model="m", base_url="u", escalate=0.6, escalate_to="endpoint"
    )
    assert (kind, below) == ("EscalatingScorer", 0.6)
    assert first == load_scorer(name)
    assert second == ("EndpointScorer", ("m", "u"), {})
    assert load_scorer(name, model="m", escalate=1.0)[1][1] == ("TransformersScorer", ("m",), {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "best"}, f"expected one of {', '.join(SCORERS)}"),
        ({"name": "llm"}, "--model is missing"),
        ({"name": "endpoint", "model": "m"}, "--base-url is missing"),
        ({"name": "gguf"}, "--model FILE.gguf, or --base-url"),
        ({"name": "gguf", "model": "m", "base_url": "u"}, "got both"),
        ({"name": "llm", "model": "m", "api_key_env": "K"}, "--api-key-env: not used by --scorer llm"),
        ({"name": "fast", "batch_size": 3}, "--batch-size: not used by --scorer fast"),
        ({"name": "fast", "device": "cuda"}, "--device: not used by --scorer fast"),
        ({"name": "accurate", "escalate": 0.5}, "--model is missing"),
        ({"name": "accurate", "escalate": 0.0, "model": "m"}, "a probability above 0"),
        ({"name": "accurate", "escalate": 0.5, "escalate_to": "fast"}, "expected one of llm, endpoint, gguf"),
        ({"name": "llm", "escalate": 0.5, "model": "m"}, "applies to --scorer accurate or fast"),
        ({"name": "accurate", "escalate_to": "llm"}, "applies to --escalate P"),
    ],
)
def test_unusable_options_are_refused(options, words) -> None:
    with pytest.raises(UserError) as caught:
        load_scorer(**options)
    assert words in str(caught.value)
