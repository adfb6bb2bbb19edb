"""Scorers by the names of the command line; each is imported only when it is used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cat_fast.complexity.score import Scorer
from cat_fast.errors import UserError

DISTILLED = ("accurate", "fast")
LANGUAGE_MODELS = ("llm", "endpoint", "gguf")
SCORERS = (*DISTILLED, *LANGUAGE_MODELS, "length")
DEFAULT_SCORER = "accurate"

_OPTIONS: dict[str, tuple[str, ...]] = {
    "accurate": (),
    "fast": (),
    "llm": ("model", "prompt_file", "device", "batch_size"),
    "endpoint": ("model", "base_url", "api_key_env", "prompt_file", "batch_size"),
    "gguf": ("model", "base_url", "api_key_env", "prompt_file", "batch_size"),
    "length": (),
}
"""Options that each scorer uses."""
_EXAMPLES = {
    ("llm", "model"): "pass a model of transformers, such as --model Qwen/Qwen2.5-7B-Instruct",
    ("endpoint", "model"): "pass the model's name at the endpoint",
    ("endpoint", "base_url"): "pass the URL of the endpoint, such as --base-url http://localhost:8000/v1",
    ("gguf", "model"): "pass --model FILE.gguf, or --base-url URL of a llama.cpp server",
}


def load_scorer(
    name: str = DEFAULT_SCORER,
    *,
    model: str | None = None,
    base_url: str | None = None,
    api_key_env: str | None = None,
    prompt_file: Path | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    escalate: float | None = None,
    escalate_to: str | None = None,
) -> Scorer:
    """Return a scorer, loaded.

    Args:
        name: one of `SCORERS`: the distilled `accurate` and `fast`, a language model by transformers (`llm`),
            behind an OpenAI-compatible `endpoint` or in llama.cpp (`gguf`), or the `length` of the caption.
        model: name or folder of the language model, its name at the endpoint, or a GGUF file.
        base_url: URL of the endpoint, or of a llama.cpp server instead of a GGUF file.
        api_key_env: name of the environment variable with the key of the endpoint.
        prompt_file: prompt instead of the packaged rubric.
        device: device of `llm`; "auto" or None uses a GPU if available.
        batch_size: captions per forward pass of `llm`, concurrent requests of `endpoint` and `gguf`.
        escalate: captions whose confidence is below this probability are scored by the language model
            `escalate_to` (default `llm`), which the other options describe; `name` is a distilled scorer.

    Raises:
        UserError: an unknown name; an option that is missing, or that the scorer does not use; or a scorer
            that cannot be loaded.
    """
    if name not in SCORERS:
        raise UserError(
            f"--scorer {name}: expected one of {', '.join(SCORERS)} for captions; for images,"
            " image_student, jpeg or unified"
        )
    options = {
        "model": model,
        "base_url": base_url,
        "api_key_env": api_key_env,
        "prompt_file": prompt_file,
        "device": None if device == "auto" else device,
        "batch_size": batch_size,
    }
    given = {option: value for option, value in options.items() if value is not None}
    if escalate is None:
        if escalate_to is not None:
            raise UserError(f"--escalate-to {escalate_to}: applies to --escalate P, the probability")
        return _load(name, given)
    if not 0 < escalate <= 1:
        raise UserError(f"--escalate {escalate:g}: expected a probability above 0 and up to 1, such as 0.6")
    if name not in DISTILLED:
        raise UserError(f"--escalate: applies to --scorer accurate or fast, not to {name}")
    second = escalate_to or "llm"
    if second not in LANGUAGE_MODELS:
        raise UserError(f"--escalate-to {second}: expected one of {', '.join(LANGUAGE_MODELS)}")
    from cat_fast.complexity.scorers.escalating import EscalatingScorer

    return EscalatingScorer(_load(name, {}), _load(second, given), escalate)


def default_scorer() -> Scorer:
    """Return the scorer of captions where no other is chosen, loaded once."""
    return load_scorer(DEFAULT_SCORER)


def bulk_scorer() -> Scorer:
    """Return the scorer of captions in data sets without scores, loaded once: fast enough for any loader."""
    return load_scorer("fast")


def _load(name: str, options: Mapping[str, Any]) -> Scorer:
    if unused := [option for option in options if option not in _OPTIONS[name]]:
        users = [scorer for scorer in SCORERS if unused[0] in _OPTIONS[scorer]]
        raise UserError(
            f"{_flag(unused[0])}: not used by --scorer {name}; leave it out, or choose {' or '.join(users)}"
        )
    match name:
        case "accurate":
            from cat_fast.complexity.scorers.accurate.scorer import accurate_scorer

            return accurate_scorer()
        case "fast":
            from cat_fast.complexity.scorers.fast.scorer import fast_scorer

            return fast_scorer()
        case "length":
            from cat_fast.complexity.scorers.caption_length import CaptionLength

            return CaptionLength()
    if name == "gguf" and "model" in options and "base_url" in options:
        raise UserError("--scorer gguf: expected --model FILE.gguf or --base-url URL of a server, got both")
    model = options.get("base_url") if name == "gguf" else None
    model = model or _required(name, options, "model")
    base_url = _required(name, options, "base_url") if name == "endpoint" else ""
    keywords = _keywords(name, options)
    if name == "llm":
        from cat_fast.complexity.scorers.language_model.transformers_scorer import TransformersScorer

        return TransformersScorer(model, **keywords)
    if name == "endpoint":
        from cat_fast.complexity.scorers.language_model.endpoint_scorer import EndpointScorer

        return EndpointScorer(model, base_url, **keywords)
    from cat_fast.complexity.scorers.language_model.gguf_scorer import GgufScorer

    return GgufScorer(model, **keywords)


def _keywords(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that language models have in common, under the names of their arguments."""
    keywords = {option: options[option] for option in ("api_key_env", "device") if option in options}
    if "batch_size" in options:
        keywords["batch_size" if name == "llm" else "concurrency"] = options["batch_size"]
    if "prompt_file" in options:
        from cat_fast.complexity.prompt import Prompt

        keywords["prompt"] = Prompt.read(options["prompt_file"])
    return keywords


def _required(name: str, options: Mapping[str, Any], option: str) -> Any:
    if option not in options:
        raise UserError(f"--scorer {name}: {_flag(option)} is missing; {_EXAMPLES[name, option]}")
    return options[option]


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
