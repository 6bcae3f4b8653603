"""Names of tasks and models in a column that may be too narrow for them.

A name is not folded over several lines: its middle is left out, where that leaves all names different, and the whole
ones are told below the table.
"""

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

_LEFT_OUT = "…"
# Fewer characters tell nothing: such a column is folded.
_LEAST = 12


def shortened(names: Iterable[str], width: int) -> dict[str, str]:
    """Return each name in at most ``width`` characters, all different; as they are where that cannot be."""
    distinct = list(dict.fromkeys(names))
    kept = width - len(_LEFT_OUT)
    # From the middle outwards: as much of the end as of the beginning, if that tells them apart.
    heads = sorted(range(1, kept), key=lambda head: abs(2 * head - kept))
    ways: list[Callable[[str], str]] = [
        lambda name, head=head: f"{name[:head]}{_LEFT_OUT}{name[head - kept :]}" for head in heads
    ]
    # Else what lies between the beginning and the end that all long ones share, and what is around it.
    long = [name for name in distinct if len(name) > width]
    before, after = _common(long), _common([name[::-1] for name in long])
    space = kept - len(_LEFT_OUT)
    start = max(0, before - max(0, space - max((len(name) - before - after for name in long), default=0)) // 2)
    ways.append(lambda name: f"{_LEFT_OUT}{name[start : start + space]}{_LEFT_OUT}")
    for way in ways:
        short = {name: name if len(name) <= width else way(name) for name in distinct}
        if len(set(short.values())) == len(distinct):
            return short
    return {name: name for name in distinct}


def _common(names: Sequence[str]) -> int:
    """Return how many characters names begin with alike."""
    return next((at for at, signs in enumerate(zip(*names, strict=False)) if len(set(signs)) > 1), 0)


class Names:
    """All names of some tables.

    Args:
        groups: Names that are to be told apart from those of their group: of tasks, of models.
    """

    def __init__(self, *groups: Iterable[str]) -> None:
        self._groups = [set(group) for group in groups]
        self._cut: dict[str, None] = {}
        self._told: set[str] = set()

    def cell(self, *lines: tuple[str, str]) -> "Cell":
        """Return a cell of lines, each a name and its style."""
        return Cell(self, lines)

    def fit(self, text: str, width: int) -> str:
        """Return a name in a width."""
        if len(text) <= width or width < _LEAST:
            return text
        group = next((group for group in self._groups if text in group), {text})
        short = shortened(sorted(group), width)[text]
        if short != text:
            self._cut[text] = None
        return short

    def tell(self, console: Console) -> None:
        """Print the whole names of those that were cut and not told yet."""
        new = [name for name in self._cut if name not in self._told]
        self._told.update(new)
        for name in new:
            console.print(f"in full: {name}", style="dim", markup=False, highlight=False, soft_wrap=True)


class Cell:
    """Lines that adapt themselves to the width of their column."""

    def __init__(self, names: Names, lines: tuple[tuple[str, str], ...]) -> None:
        self._names, self._lines = names, lines

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        longest = max((len(text) for text, _ in self._lines), default=0)
        return Measurement(min(_LEAST, longest), longest).clamp(max_width=options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style in self._lines:
            yield Text(self._names.fit(text, options.max_width), style=style, overflow="fold")
