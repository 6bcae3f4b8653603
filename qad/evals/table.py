"""What ``qad eval`` prints: tables of 80 columns, and below each what its figures mean."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qad.evals.compare import Difference
from qad.evals.failures import CAUSES
from qad.evals.names import Cell, Names

# What one line of 80 columns holds; then other ways to make one answer of K, if there are any.
_SHOWN = ("accuracy", "M@K", "V@K", "P@K")
_CHOSEN = ("V@K", "W@K", "B@K", "HM@K", "HP@K")
_MEANINGS = {
    "accuracy": "first answer",
    "M@K": "mean of K",
    "V@K": "vote",
    "P@K": "any of K",
    "W@K": "vote weighted by confidence",
    "B@K": "best by confidence",
    "HM@K": "mean of the answers deliberated from K",
    "HP@K": "any of these",
}
_NONE = "-"


def _table(*columns: str, names: int = 1) -> Table:
    """Return a table whose first columns are names and whose others are figures."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        if index < names:
            table.add_column(column, overflow="fold", min_width=12)
        else:
            table.add_column(column, justify="right", no_wrap=True)
    return table


def short_task(name: str) -> str:
    """Return a task's name without what all of its kind share."""
    return name.removeprefix("reasoning_gym:")


def _title(row: Mapping[str, Any]) -> str:
    """Return the name of a row's task, with its label."""
    return f"{short_task(row['task'])} ({row['label']})" if row.get("label") else short_task(row["task"])


def names_of(*tables: Sequence[Mapping[str, Any]]) -> Names:
    """Return the names in tables of results, of differences and of texts."""
    rows = [row for rows in tables for row in rows]
    models = [str(row[key]) for row in rows for key in ("model", "first", "second") if key in row]
    titles = [_title(row) for row in rows if "task" in row] + [short_task(row["task"]) for row in rows if "task" in row]
    return Names(models, titles)


def _of(names: Names, row: Mapping[str, Any], first: bool = True) -> Cell:
    """Return the cell that names a row's task and model; an empty one where they are those of the row above."""
    return names.cell((_title(row), ""), (row["model"], "dim")) if first else names.cell()


def share(figure: Mapping[str, float] | None) -> str:
    """Return a share with its interval below, in per cent."""
    if figure is None:
        return _NONE
    return f"{100 * figure['value']:.1f}\n[dim]{100 * figure['low']:.0f}-{100 * figure['high']:.0f}[/]"


def _count(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]], names: Names) -> None:
    """Print the metrics of models on tasks."""
    if not rows:
        return
    shown = _named(_SHOWN, rows)
    table = _table("task, model", *_titles(shown, rows), "form", "cut", "base", "tok", "s")
    for row in rows:
        baseline = row["baseline"]
        table.add_row(
            _of(names, row),
            *(share(row["metrics"].get(name)) for name in shown),
            f"{100 * row['metrics']['format']['value']:.0f}",
            f"{100 * row['cut_off']['answers']:.0f}",
            _NONE if baseline is None else f"{100 * baseline['value']:.0f}",
            _count(row["costs"]["tokens"]["value"]),
            _count(row["costs"]["seconds"]["value"]),
        )
    console.print(table)
    names.tell(console)
    items = sorted({row["items"] for row in rows})
    console.print(
        f"{', '.join(map(str, items))} items each; per cent, below it the 95 % interval (Wilson of shares of items, "
        f"bootstrap over items of means). {_meanings(shown)}; form: in the form asked for; cut: cut off, of which only "
        "a marked answer counts; base: always the most frequent answer; tok, s: of one answer",
        style="dim",
    )
    _print_chosen(console, rows, names)
    for row in rows:
        for note in row["notes"]:
            console.print(f"{short_task(row['task'])}, {row['model']}: {note}", style="yellow", markup=False)


def _named(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in names if any(name in row["metrics"] for row in rows)]


def _titles(names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of metrics with the number that K is, if it is the same everywhere."""
    ks = {row["k"] for row in rows}
    return [name.replace("@K", f"@{min(ks)}") if len(ks) == 1 else name for name in names]


def _meanings(names: Sequence[str]) -> str:
    return "; ".join(f"{name.removesuffix('@K')}: {_MEANINGS[name]}" for name in names)


def _print_chosen(console: Console, rows: Sequence[Mapping[str, Any]], names: Names) -> None:
    """Print what other ways than a plain vote make of K answers, if any were asked for."""
    chosen = _named(_CHOSEN, rows)
    if not set(chosen) - set(_SHOWN):
        return
    table = _table("task, model", *_titles(chosen, rows))
    for row in rows:
        table.add_row(_of(names, row), *(share(row["metrics"].get(name)) for name in chosen))
    console.print(table)
    names.tell(console)
    console.print(_meanings(chosen), style="dim")


def print_differences(console: Console, found: Sequence[Mapping[str, Any]], names: Names) -> None:
    """Print paired differences.

    Args:
        console: Where to.
        found: Of each pair ``task``, ``first``, ``second`` and the differences.
        names: Those in all tables.
    """
    for first, second in dict.fromkeys((one["first"], one["second"]) for one in found):
        table = _table("task, metric", "n", "first", "second", "difference", "only", "p", "verdict")
        margin = 0.0
        for one in found:
            if (one["first"], one["second"]) != (first, second):
                continue
            table.add_row(names.cell((short_task(one["task"]), "bold")))
            for index, difference in enumerate(one["differences"]):
                margin = difference.margin
                table.add_row(*_cells(difference), end_section=index == len(one["differences"]) - 1)
        console.print(f"\n[bold]{escape(first)}[/] (first) against [bold]{escape(second)}[/] (second), item by item")
        console.print(table)
        names.tell(console)
        console.print(
            f"difference in points with its 95 % interval (bootstrap over items); only: right in one of both alone; p: "
            f"McNemar, of means the permutation test that flips signs; better, worse: interval and p both say so; as "
            f"good: at most {100 * margin:g} points worse, whatever in the interval is true; open: these items do not "
            "tell (~: about how many would)",
            style="dim",
        )


_COLOURS = {"better": "green", "worse": "red", "as good": "green", "open": "yellow"}


def _cells(one: Difference) -> list[str]:
    test = one.mcnemar
    told = test or one.sign_flip
    verdict = one.verdict
    if verdict == "open" and one.items_needed is not None and one.items_needed > one.items:
        verdict += f" ~{one.items_needed}"
    return [
        f"  {one.metric}",
        str(one.items),
        f"{100 * one.first:.1f}",
        f"{100 * one.second:.1f}",
        f"{100 * one.difference.value:+.1f} ({100 * one.difference.low:+.0f} to {100 * one.difference.high:+.0f})",
        _NONE if test is None else f"{test.only_first}:{test.only_second}",
        _NONE if told is None else f"{told.p:.2g}",
        f"[{_COLOURS[one.verdict]}]{verdict}[/]",
    ]


_HEADINGS = {"format": "form", "mismatch": "mis-\nmatch", "capacity": "capa-\ncity", "undecided": "unde-\ncided"}


def print_failures(console: Console, rows: Sequence[Mapping[str, Any]], names: Names) -> None:
    """Print why wrong items are wrong, task by level."""
    table = _table("task, model", "level", "n", "wrong", *(_HEADINGS[cause] for cause in CAUSES), "P@K", "after")
    shown = False
    for row in rows:
        cells = row["failures"]["cells"]
        if not any(cell["wrong"] for cell in cells):
            continue
        shown = True
        for index, cell in enumerate(cells):
            level = _NONE if cell["level"] is None else str(cell["level"])
            after = cell["after"]
            table.add_row(
                _of(names, row, index == 0),
                level,
                str(cell["items"]),
                str(cell["wrong"]),
                *(str(cell["causes"][cause] or _NONE) for cause in CAUSES),
                f"{100 * cell['potential']:.0f}",
                _NONE if after is None else f"{100 * after:.0f}",
                end_section=index == len(cells) - 1,
            )
    if not shown:
        return
    console.print("\n[bold]wrong items[/]")
    console.print(table)
    names.tell(console)
    console.print(
        "format: most answers lack the form; mismatch: the right answer is within reach; capacity: trained on the "
        "level, and P@K is near 0; undecided: train on the level (--trained) and give that result (--after)",
        style="dim",
    )


def print_calibration(console: Console, rows: Sequence[Mapping[str, Any]], names: Names) -> None:
    """Print how true confidences are, before and after a fit on other items."""
    table = _table("task, model", "confidence", "n", "ECE", "Brier", "base", "fit", "n", "before", "after")
    for row in rows:
        for index, (name, found) in enumerate(row["calibration"].items()):
            fit = found["fit"]
            fitted = "reason" not in fit
            table.add_row(
                _of(names, row, index == 0),
                name.replace("_", " "),
                str(found["answers"]),
                f"{found['ece']:.3f}",
                f"{found['brier']:.3f}",
                f"{found['base']:.3f}",
                fit["curve"]["kind"] if fitted else _NONE,
                str(fit["after"]["answers"]) if fitted else _NONE,
                f"{fit['before']['ece']:.3f}" if fitted else _NONE,
                f"{fit['after']['ece']:.3f}" if fitted else _NONE,
            )
    if not table.row_count:
        return
    console.print("\n[bold]calibration[/]")
    console.print(table)
    names.tell(console)
    console.print(
        "n: answers, texts without one left out; base: Brier of a constant confidence; before, after: ECE of the items "
        "that the fit has not seen",
        style="dim",
    )


def print_shift(console: Console, shifts: Sequence[Mapping[str, Any]], names: Names) -> None:
    """Print what is lost away from what was trained on."""
    if not shifts:
        return
    table = _table("model", "items of", "n", "right", "any of K", "form", "change")
    for one in shifts:
        change = one["change"]
        told = _NONE
        if change is not None:
            told = f"{100 * change['value']:+.1f} ({100 * change['low']:+.0f} to {100 * change['high']:+.0f})"
        table.add_row(
            names.cell((one["model"], "")),
            one["label"],
            str(one["items"]),
            share(one["accuracy"]),
            share(one["potential"]),
            f"{100 * one['format']:.0f}",
            told,
        )
    console.print("\n[bold]away from what was trained on[/]")
    console.print(table)
    names.tell(console)


def print_similarity(console: Console, rows: Sequence[Mapping[str, Any]], names: Names) -> None:
    """Print how like their references chains of reasoning are."""
    table = _table("task, model", "reference", "chains", "ROUGE-L", "steps", "numbers", names=2)
    for row in rows:
        for reference, found in row["similarity"].items():
            table.add_row(
                _of(names, row),
                names.cell((reference, "")),
                str(found["chains"]),
                *(share(found[name]) for name in ("rouge_l", "steps", "numbers")),
            )
    if not table.row_count:
        return
    console.print("\n[bold]likeness of chains[/]")
    console.print(table)
    names.tell(console)


def print_text(console: Console, rows: Sequence[Mapping[str, Any]], names: Names) -> None:
    """Print perplexity and divergence on a text."""
    if not rows:
        return
    table = _table("text, model", "tokens", "perplexity", "KL", "same top-1")
    for row in rows:
        kl = row["kl"]
        perplexity = row["perplexity"]
        table.add_row(
            names.cell((row["text"], ""), (row["model"], "dim")),
            str(row["tokens"]),
            f"{perplexity['value']:.3f}\n[dim]{perplexity['low']:.2f}-{perplexity['high']:.2f}[/]",
            _NONE if kl is None else f"{kl['value']:.5f}\n[dim]{kl['low']:.4f}-{kl['high']:.4f}[/]",
            _NONE if row["same_top1"] is None else f"{row['same_top1']:.1%}",
        )
    console.print("\n[bold]text[/]")
    console.print(table)
    names.tell(console)
