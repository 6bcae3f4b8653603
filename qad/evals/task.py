"""What a task is: items with a prompt each, and a judge of answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qad.final_answer import Kind

JUDGING = 3
"""Number of the rules by which texts are judged, to be raised whenever a verdict may come out otherwise: what an answer
is (``qad.final_answer``), which are the same, how tasks score. Kept verdicts of other rules are then made anew."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        id: Stable over runs and unique within the task.
        prompt: The user's message, complete: what form the answer shall have stands in it.
        solution: The right answer, or one of them; empty where only a checker can tell.
        others: Answers that are right as well.
        level: Difficulty as the source gives it, higher is harder; None if it gives none.
        chain: A worked solution of the source or of a teacher, to compare chains with; None if there is none.
        meta: What the task needs to judge answers, as JSON types.
    """

    id: str
    prompt: str
    solution: str = ""
    level: int | None = None
    chain: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """All answers that are right, as far as they are known."""
        return (self.solution, *self.others) if self.solution else ()


@dataclass(frozen=True)
class Score:
    """What the judge says of one text.

    Attributes:
        correct: Whether it answers the item.
        answer: The answer that was found in it; None if there is none.
        format_ok: Whether the answer has the form that was asked for, right or wrong.
        detail: Evidence in a few words: which instruction was not followed, which test failed.
    """

    correct: bool
    answer: str | None
    format_ok: bool
    detail: str = ""


class Task(Protocol):
    """Items and their judge."""

    @property
    def name(self) -> str:
        """Name under which results are kept."""
        ...

    @property
    def kind(self) -> Kind | None:
        """How two answers are compared, for votes; None where answers cannot be compared."""
        ...

    @property
    def items(self) -> Sequence[Item]:
        """The questions, in a stable order."""
        ...

    @property
    def notes(self) -> Sequence[str]:
        """What the user should know of how answers are judged, a sentence each."""
        ...

    def judge(self, item: Item) -> str:
        """Return the name of what judges an item's answers: another one may come to another verdict."""
        ...

    def score(self, item: Item, text: str, reason: str = "stop") -> Score:
        """Judge a text that answers an item.

        Args:
            item: Which.
            text: Of a model, thoughts included.
            reason: Why it ended, see ``qad.final_answer.answer_of``: one that was cut off has the answer that it marks.

        Raises:
            UserError: The judge cannot work here (a sandbox or a library is missing); the message names the remedy.
        """
        ...
