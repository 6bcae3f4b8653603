"""What tasks share: names of items, questions that are the same, and answers that are compared with a solution."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qad.evals.task import Item, Score, Task
from qad.evals.tasks.forms import Form
from qad.final_answer import Kind, answer_of, same

NO_ANSWER = "no answer found"
CUT_OFF = "cut off before an answer"


def digest(text: str) -> str:
    """Return eight hexadecimal digits of a text, white space and case aside."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()[:8]


def item_id(source: str | int, prompt: str) -> str:
    """Return an item's name: where it comes from, and a digest of its prompt.

    A prompt that is changed makes another item: samples that were kept of the old one are not taken for it.
    """
    return f"{source}-{digest(prompt)}"


def distinct(items: Iterable[Item], others: Iterable[Item] = ()) -> list[Item]:
    """Return the items without those that ask what ``others`` or an earlier one of them asks.

    White space and case aside: published sets repeat questions with such changes, and a training split shall ask
    nothing that its test asks. Not for files of users, where case may be what is asked about.
    """
    seen = {digest(item.prompt) for item in others}
    kept = []
    for item in items:
        key = digest(item.prompt)
        if key not in seen:
            seen.add(key)
            kept.append(item)
    return kept


@dataclass(frozen=True)
class ComparedTask:
    """Items whose answers are compared with their solutions.

    Attributes:
        name: Under which results are kept.
        kind: How answers are compared.
        items: The questions.
        form: What the prompts ask for.
    """

    name: str
    kind: Kind
    items: Sequence[Item]
    form: Form
    notes: Sequence[str] = ()

    def judge(self, item: Item) -> str:
        """Return how answers are compared."""
        return self.kind

    def score(self, item: Item, text: str, reason: str = "stop") -> Score:
        """Judge a text by the answer that is found in it."""
        answer = answer_of(text, reason, self.kind)
        kept = self.form.kept_by(text)
        if answer is None:
            return Score(False, None, kept, NO_ANSWER if reason == "stop" else CUT_OFF)
        right = any(same(answer, solution, self.kind) for solution in item.accepted)
        return Score(right, answer, kept, "" if right else f"expected {' or '.join(item.accepted)[:80]}")


@dataclass(frozen=True)
class MixedTask:
    """Items that are judged in different ways.

    Attributes:
        name: Under which results are kept.
        kind: How answers are compared; None where the items differ in it.
        items: The questions.
        judges: What judges an item, by its id.
        notes: How, as far as it does not go without saying.
    """

    name: str
    kind: Kind | None
    items: Sequence[Item]
    judges: Mapping[str, Task]
    notes: Sequence[str] = ()

    def judge(self, item: Item) -> str:
        """Return what the item's own judge is."""
        return self.judges[item.id].judge(item)

    def score(self, item: Item, text: str, reason: str = "stop") -> Score:
        """Judge a text as the item wants it."""
        return self.judges[item.id].score(item, text, reason)


def mixed(name: str, items: Sequence[Item], judges: Mapping[str, Task], notes: Sequence[str] = ()) -> MixedTask:
    """Return items with a judge each as a task."""
    kinds: set[Kind | None] = {judges[item.id].kind for item in items}
    return MixedTask(name, kinds.pop() if len(kinds) == 1 else None, items, judges, notes)
