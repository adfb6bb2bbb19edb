"""Base of scorers that ask a language model for one reply per description, several at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cat_fast.complexity.description import Description
from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration
from cat_fast.complexity.scorers.language_model.json_client import RequestFailed
from cat_fast.complexity.scorers.language_model.replies import ModelReply, read_score
from cat_fast.complexity.scorers.language_model.versions import calibrated_version, scorer_version
from cat_fast.errors import UserError, one_line

_CONCERN_ALL = (401, 403, 404)
"""HTTP statuses that a wrong key, URL or model causes."""
_FIRST_FAILURES = 3
"""Server errors before the first answer after which the server counts as unusable."""


class ReplyScorer(ABC):
    """Language model that scores by its reply to a prompt.

    A reply without a valid score is asked for once more; a second one is a `ScoringFailure`, as is a request
    that fails after its retries. An error of the first contact that concerns every request raises UserError.
    """

    def __init__(
        self,
        name: str,
        identity: str,
        *,
        prompt: Prompt | None,
        scale: int,
        concurrency: int,
        max_new_tokens: int,
        calibration: ScoreCalibration | None,
    ) -> None:
        self.prompt = prompt if prompt is not None else Prompt.default(scale)
        if concurrency < 1:
            raise UserError(f"the number of concurrent requests must be at least 1, got {concurrency}")
        self.name = name
        self.version = scorer_version(identity, self.prompt, scale, max_new_tokens)
        self.scale = scale
        self.max_new_tokens = max_new_tokens
        self._concurrency = concurrency
        self._answered = False
        self._failures = 0
        self._calibration = calibration
        if calibration:
            calibration.check(self.name, self.version)
            self.version = calibrated_version(self.version, calibration)

    @abstractmethod
    def _reply(self, text: str) -> ModelReply:
        """Return the model's reply to a prompt.

        Raises:
            RequestFailed: the server gave no usable answer.
            UserError: this prompt cannot be answered.
        """

    def score_many(self, descriptions: Sequence[Description]) -> list[Score | ScoringFailure]:
        """Score each description, in order; see the class for what fails.

        Raises:
            UserError: no request was answered so far, and this one failed for a reason that concerns all.
        """
        results: list[Score | ScoringFailure] = []
        # One by one up to the first answer, so that an unusable server is reported at once.
        while len(results) < len(descriptions) and not self._answered:
            results.append(self._score(descriptions[len(results)]))
        rest = descriptions[len(results) :]
        if self._concurrency == 1 or len(rest) < 2:
            return results + [self._score(description) for description in rest]
        pool = ThreadPoolExecutor(min(self._concurrency, len(rest)))
        try:
            return results + list(pool.map(self._score, rest))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _score(self, description: Description) -> Score | ScoringFailure:
        text = self.prompt.render(description)
        try:
            try:
                return self._attempt(text)
            except RequestFailed:
                raise
            except UserError:
                form = f'The last reply had another form. Begin with "Score: N out of {self.scale}".'
                return self._attempt(f"{text}\n{form}\n")
        except RequestFailed as failure:
            if not self._answered and self._unusable(failure):
                raise
            return ScoringFailure(one_line(failure))
        except UserError as error:
            return ScoringFailure(one_line(error))

    def _attempt(self, text: str) -> Score:
        reply = self._reply(text)
        self._answered = True
        return read_score(reply, self.scale, self._calibration)

    def _unusable(self, failure: RequestFailed) -> bool:
        """Return whether a failure before the first answer concerns all requests."""
        self._failures += failure.transient
        if failure.status is None or failure.status in _CONCERN_ALL:
            return True
        return self._failures == _FIRST_FAILURES
