"""Base of scorers that ask a language model for one reply per description, several at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from cat_fast.complexity.description import Description
from cat_fast.complexity.prompt import Prompt
from cat_fast.complexity.score import Score, ScoringFailure
from cat_fast.complexity.scorers.language_model.calibration import ScoreCalibration
from cat_fast.complexity.scorers.language_model.json_client import RequestFailed
from cat_fast.complexity.scorers.language_model.replies import ModelReply, read_score
from cat_fast.complexity.scorers.language_model.request_pool import RequestPool
from cat_fast.complexity.scorers.language_model.versions import calibrated_version, scorer_version
from cat_fast.errors import UserError, one_line


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
        self._pool = RequestPool(concurrency)
        self.name = name
        self.version = scorer_version(identity, self.prompt, scale, max_new_tokens)
        self.scale = scale
        self.max_new_tokens = max_new_tokens
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
        results = self._pool.run(self._score, descriptions)
        return [ScoringFailure(one_line(r)) if isinstance(r, UserError) else r for r in results]

    def _score(self, description: Description) -> Score:
        text = self.prompt.render(description)
        try:
            return self._attempt(text)
        except RequestFailed:
            raise
        except UserError:
            form = f'The last reply had another form. Begin with "Score: N out of {self.scale}".'
            return self._attempt(f"{text}\n{form}\n")

    def _attempt(self, text: str) -> Score:
        reply = self._reply(text)
        self._pool.answered = True
        return read_score(reply, self.scale, self._calibration)
