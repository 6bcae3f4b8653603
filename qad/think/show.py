"""What a user sees of a question that is thought over: a line per trajectory while it runs, then what came of it."""

import math
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qad.think.events import Event
from qad.think.thought import Thought
from qad.think.trajectory_state import UNENDED

_WORDS = {
    "running": "",
    "stop": "done",
    "length": "cut off at --new-tokens",
    "context": "cut off: the context is full",
    "lost": "lost: the server or the engine failed",
    "dropped": "stopped",
    "interrupted": "interrupted",
    "spared": "not begun",
}
_STYLES = {
    "running": "",
    "stop": "green",
    "length": "yellow",
    "context": "yellow",
    "lost": "red",
    "dropped": "dim",
    "interrupted": "dim",
    "spared": "dim",
}
_LAST_CHARACTERS = 400


class LiveLines:
    """A table on a terminal that is drawn anew as it changes."""

    def __init__(self, console: Console) -> None:
        self._events: dict[tuple[str, int, int], Event] = {}
        self._texts: dict[tuple[str, int, int], str] = {}
        # Drawn from a thread of rich's own, ten times a second: tokens come far more often.
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=10, transient=False)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        key = (event.phase, event.round, event.index)
        self._texts[key] = (self._texts.get(key, "") + event.text)[-_LAST_CHARACTERS:]
        self._events[key] = event

    def _table(self) -> Group:
        table = Table(box=None, padding=(0, 1), show_edge=False, expand=True)
        for name in ("", "tokens", "sure"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True, overflow="crop", ratio=1)
        phase = "trajectory"
        # The thread that draws may come between an event and the next: it draws a copy.
        for key, event in list(self._events.items()):
            if event.phase != phase:
                phase = event.phase
                table.add_row("", "", "", Text("deliberation", style="bold"))
            table.add_row(str(event.index + 1), str(event.tokens), _sure(event), self._what(key, event))
        return Group(table)

    def _what(self, key: tuple[str, int, int], event: Event) -> Text:
        if event.state == "running":
            # The newest text, as far as the line holds it.
            return Text(" ".join(self._texts[key].split())[-max(20, self._live.console.width - 22) :])
        return _ending(event)


class PlainLines:
    """A line for each trajectory when it ends, for what is not a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave nothing to do."""

    def __call__(self, event: Event) -> None:
        """Take an event in."""
        if event.state != "running":
            name = event.phase if event.phase == "trajectory" else f"deliberation, round {event.round + 1},"
            self._console.print(
                Text(f"{name} {event.index + 1}: {event.tokens} tokens, sure {_sure(event)}, ") + _ending(event),
                soft_wrap=True,
            )


def lines(console: Console) -> LiveLines | PlainLines:
    """Return what suits a console."""
    return LiveLines(console) if console.is_terminal else PlainLines(console)


def _sure(event: Event) -> str:
    return "-" if event.confidence == -math.inf else f"{math.exp(event.confidence):.2f}"


def _ending(event: Event) -> Text:
    said = _WORDS[event.state]
    if event.answer is not None:
        said += f": {' '.join(event.answer.split())[:200]}"
    elif event.state in ("stop", "length", "context"):
        said += ", no answer found"
    return Text(said, style=_STYLES[event.state])


def print_thought(
    thought: Thought,
    console: Console,
    k: int,
    *,
    unfinished: bool = False,
    print_reply: Callable[[str], None] = print,
) -> None:
    """Print the reply, and about it on a console: the votes, what it cost, and what the user should know.

    Args:
        thought: What came.
        console: For what is about the reply.
        k: How many trajectories were asked for.
        unfinished: Whether to print, after an interrupt, the texts that had not ended.
        print_reply: For the reply itself.
    """
    if thought.interrupted:
        console.print(Text("interrupted: ", style="bold yellow") + _reached(thought, k), soft_wrap=True)
        if unfinished:
            for one in thought.trajectories:
                if one.reason in ("dropped", "interrupted") and one.text.strip():
                    console.print(Text(f"trajectory {one.index + 1}, not ended, {len(one.tokens)} tokens:", "dim"))
                    console.print(Text(one.text.strip()), soft_wrap=True)
    if thought.text:
        print_reply(thought.text)
    if thought.vote is not None and thought.vote.counts:
        console.print(_votes(thought))
    for note in thought.notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    console.print(Text(_sum(thought, k), style="dim"), soft_wrap=True)


def _ended(thought: Thought) -> int:
    return sum(one.reason not in UNENDED for one in thought.trajectories)


def _reached(thought: Thought, k: int) -> Text:
    """Return how far a thought had come when it was interrupted, and what its result is worth."""
    ended = _ended(thought)
    tokens = "token was" if thought.tokens == 1 else "tokens were"
    said = f"{ended} of {k} trajectories had ended, {thought.tokens} {tokens} sampled; "
    if not ended:
        said += "there is nothing to judge"
    elif not thought.text:
        said += "none of their texts was chosen"
    elif ended == k:
        said += "what follows rests on these"
    else:
        said += f"what follows is a partial {'vote, of' if thought.vote is not None else 'result, from'} these alone"
    return Text(said, style="default")


def _votes(thought: Thought) -> Table:
    vote = thought.vote
    assert vote is not None
    partial = " (partial)" if thought.interrupted and not thought.deliberations else ""
    title = "votes of the deliberations" if thought.deliberations else f"votes{partial}"
    table = Table(title=title, title_justify="left")
    table.add_column("answer")
    table.add_column("votes", justify="right")
    weighted = vote.weights != {answer: float(count) for answer, count in vote.counts.items()}
    if weighted:
        table.add_column("weight", justify="right")
    table.add_column("of")
    order = sorted(vote.counts, key=lambda answer: (-vote.weights[answer], vote.members[answer][0]))
    for answer in order:
        row = [Text(answer), str(vote.counts[answer])]
        row += [f"{vote.weights[answer]:.3f}"] if weighted else []
        table.add_row(
            *row,
            ", ".join(str(index + 1) for index in vote.members[answer]),
            style="bold" if vote.index in vote.members[answer] else "",
        )
    without = _ended(thought) - sum(vote.counts.values())
    if without > 0 and not thought.deliberations:
        table.add_row("[dim]no answer[/]", str(without), *([""] if weighted else []), "")
    return table


def _sum(thought: Thought, k: int) -> str:
    begun = len(thought.trajectories)
    said = [f"{thought.method}: {_ended(thought)} of {k} trajectories ended"]
    for reason, word in (("dropped", "stopped early"), ("lost", "lost"), ("interrupted", "interrupted")):
        if count := sum(one.reason == reason for one in thought.trajectories):
            said.append(f"{count} {word}")
    if begun < k:
        said.append(f"{k - begun} not begun")
    if thought.deliberations:
        said.append(f"{len(thought.deliberations)} deliberation{'s' * (len(thought.deliberations) > 1)}")
    saved = f", an estimated {thought.tokens_saved} or more saved" if thought.tokens_saved else ""
    return f"{', '.join(said)}; {thought.tokens} tokens{saved}; {thought.seconds:.1f} s"
