"""Scorer that runs a GGUF model with llama.cpp, in this process or on its HTTP server."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

from cat_fast.complexity.extras import import_extra
from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration
from cat_fast.complexity.scorers.language_model.json_client import JsonClient, RequestFailed
from cat_fast.complexity.scorers.language_model.replies import ModelReply, chat_reply, read_tokens
from cat_fast.complexity.scorers.language_model.reply_scorer import ReplyScorer
from cat_fast.errors import UserError, one_line

N_PROBS = 20
"""Alternatives per token that llama.cpp is asked for."""
_MARK = "DESCRIPTION-OF-AN-IMAGE"
_SAMPLE_BYTES = 1 << 20


class GgufScorer(ReplyScorer):
    """GGUF model run by llama.cpp: a file, or the URL of a llama.cpp server.

    The server computes the rubric once (`cache_prompt`), and so does llama-cpp-python. To run a GGUF file
    with transformers, on any of its devices, pass it to `TransformersScorer`.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        api_key_env: str = "LLAMA_API_KEY",
        prompt: Prompt | None = None,
        scale: int = 9,
        timeout: float = 60.0,
        concurrency: int = 4,
        retries: int = 4,
        max_new_tokens: int = 48,
        context: int = 4096,
        calibration: ScoreCalibration | None = None,
    ) -> None:
        """Load the file with llama-cpp-python, or connect to the server.

        Args:
            model: a .gguf file, or a URL such as http://localhost:8080.
            api_key_env: environment variable with the server's API key, if it requires one.
            prompt: by default the rubric for `scale`.
            scale: highest score of the prompt, 9 or 10.
            timeout: seconds per attempt of a request.
            concurrency: number of requests at a time, at most useful up to the server's `--parallel`.
            retries: further attempts of a request that failed for a transient reason.
            max_new_tokens: length of a reply, score and reasons.
            context: tokens of prompt and reply, for a file; a server has its own `--ctx-size`.
            calibration: fitted for this model, prompt and scale.

        Raises:
            UserError: an argument is not valid, the file cannot be loaded, the server cannot be reached, or a
                package is missing.
        """
        self._model: _Model
        if str(model).startswith(("http://", "https://")):
            client = JsonClient(str(model), api_key_env=api_key_env, timeout=timeout, retries=retries)
            self._model = _Server(client)
        else:
            self._model = _File(Path(model), context)
            concurrency = 1
        super().__init__(
            f"gguf:{self._model.name}",
            f"gguf\0{self._model.identity}",
            prompt=prompt,
            scale=scale,
            concurrency=concurrency,
            max_new_tokens=max_new_tokens,
            calibration=calibration,
        )
        self._grammar = reply_grammar(scale)

    def _reply(self, text: str) -> ModelReply:
        return self._model.reply(text, self._grammar, self.max_new_tokens)


class _Model(Protocol):
    name: str
    identity: str

    def reply(self, text: str, grammar: str, max_new_tokens: int) -> ModelReply: ...


class _Server:
    """Server of llama.cpp, by its own API: /props, /apply-template and /completion."""

    def __init__(self, client: JsonClient) -> None:
        self._client = client
        properties = client.request("/props")
        path = properties.get("model_path")
        if not isinstance(path, str):
            raise UserError(f"{client.url}: not a server of llama.cpp (its /props names no model)")
        self.name = path.replace("\\", "/").rpartition("/")[2]
        self.identity = f"server\0{self.name}\0{properties.get('build_info', '')}"
        messages = [{"role": "user", "content": _MARK}]
        prompt = client.request("/apply-template", {"messages": messages}).get("prompt")
        if not isinstance(prompt, str) or prompt.count(_MARK) != 1:
            raise UserError(f"{client.url}: the server's chat template does not contain the message once")
        self._before, _, self._after = prompt.partition(_MARK)

    def reply(self, text: str, grammar: str, max_new_tokens: int) -> ModelReply:
        body: dict[str, Any] = {
            "prompt": self._before + text + self._after,
            "n_predict": max_new_tokens,
            "temperature": -1.0,  # greedy, with probabilities before any sampler
            "repeat_penalty": 1.0,
            "seed": 0,
            "n_probs": N_PROBS,
            "cache_prompt": True,
            "grammar": grammar,
        }
        answer = self._client.request("/completion", body)
        if not isinstance(answer.get("content"), str):
            raise RequestFailed(f"{self._client.url}/completion: the answer contains no text")
        if answer.get("truncated"):
            raise UserError("the prompt exceeds the server's context; shorten the caption")
        return ModelReply(answer["content"], read_tokens(answer.get("completion_probabilities")))


class _File:
    """GGUF file, loaded by llama-cpp-python."""

    def __init__(self, path: Path, context: int) -> None:
        if not path.is_file():
            raise UserError(f"{path}: expected a .gguf file, or the URL of a llama.cpp server")
        self._package = import_extra("llama_cpp", "llama-cpp-python", "gguf", str(path))
        try:
            # Probabilities of tokens are available only if the logits of all positions are kept.
            self._llama = self._package.Llama(
                model_path=str(path), n_ctx=context, logits_all=True, seed=0, verbose=False
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise UserError(f"{path}: llama.cpp cannot load it ({one_line(error)})") from error
        self.name = path.name
        self.identity = f"file\0{_digest(path)}"

    def reply(self, text: str, grammar: str, max_new_tokens: int) -> ModelReply:
        try:
            answer = self._llama.create_chat_completion(
                messages=[{"role": "user", "content": text}],
                max_tokens=max_new_tokens,
                temperature=0.0,
                repeat_penalty=1.0,
                seed=0,
                logprobs=True,
                top_logprobs=N_PROBS,
                grammar=self._package.LlamaGrammar.from_string(grammar, verbose=False),
            )
        except (ValueError, RuntimeError) as error:  # a prompt longer than the context
            raise UserError(f"llama.cpp: {one_line(error)}") from error
        return chat_reply(answer)


def reply_grammar(scale: int) -> str:
    """Return the grammar (GBNF) of a reply: the score, then reasons on the same line."""
    digits = "[1-9]" if scale == 9 else '("10" | [1-9])'
    return f'root ::= "Score: " {digits} " out of {scale}" [^\\n]*'


def _digest(path: Path) -> str:
    """Return a hash of a file's size, start and end; reading all of it would take minutes."""
    with path.open("rb") as file:
        start = file.read(_SAMPLE_BYTES)
        size = file.seek(0, 2)
        file.seek(max(size - _SAMPLE_BYTES, 0))
        return hashlib.sha256(str(size).encode() + start + file.read()).hexdigest()
