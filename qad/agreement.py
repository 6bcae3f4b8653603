"""Measure how far a runtime on an exported file agrees with torch on the artifact.

Both have the same weights (``qad.verify`` proves it); what is left is how the runtime rounds activations.

Shapes: T tokens, V vocabulary.
"""

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qad import runtimes
from qad.artifact import open_artifact
from qad.closing import Closing
from qad.errors import UserError

QUESTION = "Explain in two sentences why leaves are green."
ANSWER_TOKENS = 64
# Run-time rounding of activations stays below; what lies far above is wrong metadata or a wrong engine.
EXPECTED_KL = 1e-2
IMPOSSIBLE_KL = 1e-1
_CHUNK = 256
_CHUNKS = 4


def log_softmax(logits_TV: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return log probabilities in float64: differences of nearly equal ones are what is measured."""
    shifted = logits_TV.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@dataclass(frozen=True)
class Answer:
    """A greedy answer.

    Attributes:
        tokens: Its tokens.
        text: The same, decoded.
    """

    tokens: list[int]
    text: str


@dataclass(frozen=True)
class Agreement:
    """How a runtime on the file agrees with torch on the artifact.

    Attributes:
        tokens: Positions compared.
        kl: Mean KL(torch || runtime) over the full vocabulary.
        same_top: Share of positions where both rank the same token first.
        same_tokens: Whether both cut the text, and the question under the chat template, into the same tokens.
        torch_answer, runtime_answer: Greedy answers to ``QUESTION``, None if it does not fit the model's context.
    """

    tokens: int
    kl: float
    same_top: float
    same_tokens: bool
    torch_answer: Answer | None
    runtime_answer: Answer | None

    @property
    def greedy_tokens(self) -> int:
        """Length of the longer answer, in tokens."""
        return max(len(answer.tokens) for answer in self._answers) if self._answers else 0

    @property
    def greedy_same(self) -> int:
        """How many tokens the answers share before they part."""
        if not self._answers:
            return 0
        pairs = list(zip(*(answer.tokens for answer in self._answers), strict=False))
        return next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), len(pairs))

    @property
    def _answers(self) -> list[Answer]:
        both = [self.torch_answer, self.runtime_answer]
        return [answer for answer in both if answer is not None] if None not in both else []

    @property
    def ok(self) -> bool:
        """Whether the runtime computes the same model, its rounding aside."""
        return self.same_tokens and self.kl < IMPOSSIBLE_KL


def _answer(session: runtimes.Session, prompt: list[int]) -> Answer:
    pieces = list(session.stream(prompt, ANSWER_TOKENS))
    tokens = [piece.token for piece in pieces if piece.token is not None]
    return Answer(tokens, "".join(piece.text for piece in pieces).strip())


class Judge(Closing):
    """Torch on a run's artifact, opened once for all files that are compared with it.

    Attributes:
        session: The opened model.
        text: The text on which logits are compared.
        tokens, question: Its tokens, and those of ``QUESTION`` under the chat template.
    """

    def __init__(self, run: Path, text: str, threads: int | None = None) -> None:
        """Open the artifact of a run.

        Raises:
            UserError: No artifact there, or the text is too short to compare anything.
        """
        self.text = text
        self._limit = int(open_artifact(run).config["max_position_embeddings"])
        self.session = runtimes.get("reference").open(run, threads=threads)
        self.tokens = self.session.tokenize(text)
        self.question = self.session.chat_prompt(QUESTION)
        self._length = min(_CHUNK, self._limit, len(self.tokens))
        if self._length < 2:
            self.session.close()
            raise UserError("the text is too short to compare anything: give some sentences with --text")

    @functools.cached_property
    def answer(self) -> Answer | None:
        """The greedy answer, None if it does not fit the context."""
        fits = len(self.question) + ANSWER_TOKENS <= self._limit
        return _answer(self.session, self.question) if fits else None

    def compare(self, file: Path, threads: int | None = None) -> Agreement:
        """Run a file in its engine on the same text and question.

        Raises:
            UserError: No runtime opens the file, or it is of a model with another vocabulary.
        """
        with runtimes.runtime_for(file).open(file, threads=threads) as session:
            if session.vocabulary != self.session.vocabulary:
                raise UserError(
                    f"the file's model has {session.vocabulary} tokens, the run's {self.session.vocabulary}: verify a "
                    "file that was exported from this run"
                )
            same_tokens = session.tokenize(self.text) == self.tokens
            same_tokens &= session.chat_prompt(QUESTION) == self.question
            kl, same = [], []
            last = min(len(self.tokens) - self._length + 1, _CHUNKS * self._length)
            for start in range(0, last, self._length):
                chunk = [self.tokens[start : start + self._length]]
                ours, theirs = log_softmax(self.session.logits(chunk)[0]), log_softmax(session.logits(chunk)[0])
                kl.append((np.exp(ours) * (ours - theirs)).sum(axis=1))
                same.append(ours.argmax(axis=1) == theirs.argmax(axis=1))
            return Agreement(
                tokens=sum(map(len, kl)),
                kl=float(np.concatenate(kl).mean()),
                same_top=float(np.concatenate(same).mean()),
                same_tokens=same_tokens,
                torch_answer=self.answer,
                runtime_answer=_answer(session, self.question) if self.answer is not None else None,
            )

    def close(self) -> None:
        """Free the model."""
        self.session.close()


def compare_runtime(run: Path, file: Path, text: str, threads: int | None = None) -> Agreement:
    """Run a file in its engine and the artifact in torch on the same text and question.

    Raises:
        UserError: No runtime opens the file, it is of a model with another vocabulary, or the text is too short.
    """
    with Judge(run, text, threads) as judge:
        return judge.compare(file, threads)
