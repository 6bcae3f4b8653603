"""``qad bench``: tokens a second of K trajectories, file after file, beside the bound of a board.

Each file is opened by every runtime that reads its format, in a process of its own (``qad.bench_run``), so that a file
or runtime that fails is a row with the reason. The bound is the roofline's at the middle of the answers
(``qad.roofline``); a share is what was reached of it. A server is measured from outside: its rows have no bound, no
memory and no threads.
"""

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qad import devices, runtimes
from qad.bench_run import FIGURES, RULE, Measured, Task, digest, measure
from qad.bench_table import print_table, short_name
from qad.devices import HOST, Device
from qad.errors import UserError, unknown_name
from qad.files import check_output, replacing_file
from qad.host import host
from qad.model_facts import KV_TYPES, ModelFacts, model_facts
from qad.provenance import provenance
from qad.roofline import first_token_seconds, free_batch, memory, prefill_bound, step
from qad.runtimes import _cores

FORMAT = 1
KEYS = (
    *("runtime", "file", "k", "prompt_tokens", "new_tokens", "threads", "prefill_tokens_per_s", "first_token_s"),
    *("aggregate_tokens_per_s", "per_trajectory_tokens_per_s", "all_done_s", "peak_bytes", "kv_bytes"),
    "bound_tokens_per_s",
)
# Beside them, each of which may be None: [least, most] of each figure over the repeats; the bounds of the figures;
# the share of them that was reached; joules a token and who told; what the formula says of memory; why there is none.
EXTRAS = ("spread", "bounds", "share_of_bound", "joules_per_token", "energy_source", "expected_bytes", "reason")
_INTERRUPTED = "interrupted"
_DOUBLE = 2.0


@dataclass(frozen=True)
class Options:
    """What is the same for all files.

    Attributes:
        ks: Numbers of trajectories.
        prompt_tokens: Lengths of prompts: more than one is a sweep of contexts.
        new_tokens: Of each trajectory.
        threads: Of the CPU.
        repeats: Runs of each figure.
        kv_type: Of the cache.
        gpu: Whether the GPU does the work.
        device: Board of the bounds.
    """

    ks: tuple[int, ...] = (1, 2, 4, 8, 16)
    prompt_tokens: tuple[int, ...] = (128,)
    new_tokens: int = 128
    threads: int = 1
    repeats: int = 3
    kv_type: str = "f16"
    gpu: bool = False
    device: str = HOST

    def __post_init__(self) -> None:
        for name, values in (("--k", self.ks), ("--prompt-tokens", self.prompt_tokens)):
            if not values or min(values) < 1 or list(values) != sorted(set(values)):
                raise UserError(f"{name} {','.join(map(str, values))} must be numbers from 1 up, each once and rising")
        if self.new_tokens < 2:
            raise UserError("--new-tokens must be at least 2: the first comes with the prompt, the others are timed")
        if self.threads < 1 or self.repeats < 1:
            raise UserError("--threads and --repeats must be at least 1")
        if self.kv_type not in KV_TYPES:
            raise unknown_name("KV type", self.kv_type, list(KV_TYPES))


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Return the numbers of a list with commas, rising.

    Raises:
        UserError: Something in it is no number.
    """
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError as error:
        raise UserError(f"{option} {text!r} is no list of numbers: write it as 1,2,4") from error


@dataclass(frozen=True)
class _Case:
    """A file in a runtime; the reason why it cannot be measured, if it cannot."""

    file: Path
    runtime: str
    reason: str | None = None
    facts: ModelFacts | None = None

    @property
    def name(self) -> str:
        """What it is called in rows: a path, or a server's address."""
        return runtimes.plain_url(self.file) if runtimes.is_url(self.file) else str(self.file)


def _cases(file: Path, kv_type: str) -> list[_Case]:
    """Return a case for each runtime that reads a file's format, one with the reason where there is none."""
    try:
        kind = runtimes.format_of(file)
        facts = None if kind == runtimes.URL else model_facts(file)
        if facts is not None:
            facts.kv_bytes(kv_type)
    except UserError as error:
        return [_Case(file, "", str(error))]
    cases = []
    for name in runtimes.names():
        runtime = runtimes.get(name)
        if kind in runtime.FORMATS:
            cases.append(_Case(file, name, runtime.available(), facts))
    return cases or [_Case(file, "", f"no runtime reads the format {kind}")]


class Board:
    """The board that figures are held against.

    Attributes:
        device: Its facts.
        engine: Which of its processors.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.device = devices.load(options.device)
        kinds = [engine.name for engine in self.device.engines]
        # The engine that does the work, if the board's rates of it are known: its fastest bounds any other.
        wanted = "gpu" if options.gpu else "cpu"
        self.engine = wanted if wanted in kinds else kinds[0]

    def measure_again(self) -> None:
        """Measure the host once more; the better value of each rate counts."""
        self.device = host(again=True)

    def bounds(self, facts: ModelFacts, k: int, prompt: int) -> dict[str, float]:
        """Return the bound of each figure, and the memory that a formula expects."""
        device, engine, options = self.device, self.engine, self._options
        new = options.new_tokens
        # The second token of a trajectory attends to prompt + 1 tokens, the last to prompt + new - 1.
        best = step(
            device,
            facts,
            k,
            prompt + new // 2,
            prompt_tokens=prompt,
            kv_type=options.kv_type,
            threads=options.threads,
            engine=engine,
        ).tokens_per_second
        first = first_token_seconds(device, facts, prompt, engine=engine)
        return {
            "prefill_tokens_per_s": prefill_bound(device, facts, engine=engine),
            "first_token_s": first,
            "aggregate_tokens_per_s": best,
            "all_done_s": first + k * (new - 1) / best,
        }

    def expected_bytes(self, facts: ModelFacts, k: int, prompt: int) -> float:
        """Return the memory that the roofline's formula says."""
        options = self._options
        taken = memory(
            self.device,
            facts,
            k,
            prompt + options.new_tokens,
            prompt_tokens=prompt,
            kv_type=options.kv_type,
            engine=self.engine,
        )
        return taken.total

    def free_k(self, facts: ModelFacts, prompt: int) -> tuple[float | None, str]:
        """Return the K at which the roofline says that batching stops being free, and what ends it."""
        k, limit = free_batch(
            self.device,
            facts,
            prompt + self._options.new_tokens // 2,
            prompt_tokens=prompt,
            kv_type=self._options.kv_type,
            engine=self.engine,
        )
        return (k if math.isfinite(k) else None), limit


def row(case: _Case, prompt: int, measured: Measured, options: Options, board: Board) -> dict[str, Any]:
    """Return the row of one K: ``KEYS`` and ``EXTRAS``."""
    result: dict[str, Any] = dict.fromkeys((*KEYS, *EXTRAS))
    result |= {
        "runtime": case.runtime,
        "file": case.name,
        "k": measured.k,
        "prompt_tokens": prompt,
        "new_tokens": options.new_tokens,
        "threads": None if runtimes.is_url(case.file) else options.threads,
        "reason": measured.reason,
    }
    bounds: dict[str, float] = {}
    if case.facts is not None:
        bounds = board.bounds(case.facts, measured.k, prompt)
        result |= {
            "bounds": bounds,
            "bound_tokens_per_s": bounds["aggregate_tokens_per_s"],
            "expected_bytes": round(board.expected_bytes(case.facts, measured.k, prompt)),
        }
    if measured.reason is not None:
        return result
    known = {name: values for name, values in measured.figures.items() if values}
    medians = {name: statistics.median(values) for name, values in known.items()}
    result |= medians | {
        "per_trajectory_tokens_per_s": medians["aggregate_tokens_per_s"] / measured.k,
        "peak_bytes": measured.peak_bytes,
        "kv_bytes": measured.kv_bytes,
        "spread": {name: [min(values), max(values)] for name, values in known.items()},
        "share_of_bound": {
            name: bounds[name] / medians[name]
            if name.endswith("_s") and "per_s" not in name
            else medians[name] / bounds[name]
            for name in FIGURES
        }
        if bounds
        else None,
        "energy_source": measured.energy_source,
    }
    if measured.joules:
        result["joules_per_token"] = statistics.median(measured.joules) / (measured.k * options.new_tokens)
    return result


def doubles_at(rows: Sequence[dict[str, Any]]) -> float | None:
    """Return the K at which a step of all K takes twice as long as that of one, between the measured K.

    Args:
        rows: Of one file, runtime and prompt, K rising.

    Returns:
        None if K = 1 was not measured, or no K takes that long.
    """
    steps = [(one["k"], one["k"] / one["aggregate_tokens_per_s"]) for one in rows if one["reason"] is None]
    if not steps or steps[0][0] != 1:
        return None
    limit = _DOUBLE * steps[0][1]
    for (k, seconds), (next_k, next_seconds) in itertools.pairwise(steps):
        if next_seconds >= limit:
            return k + (next_k - k) * max(limit - seconds, 0.0) / (next_seconds - seconds)
    return None


class Bench:
    """Measures files and keeps what was found.

    Args:
        options: Of all files.
        command: What was typed, for the record.

    Attributes:
        rows: One per runtime, file, prompt and K that was measured or has a reason why not.

    Raises:
        UserError: No such board.
    """

    def __init__(self, options: Options, command: str) -> None:
        self._options = options
        self._command = command
        self._board = Board(options)
        self._when = time.time()
        self._cases: dict[Path, list[_Case]] = {}
        self._found: list[tuple[_Case, int, Measured]] = []
        self._files: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []

    def measure(self, files: Sequence[Path]) -> Iterator[str]:
        """Measure; yield after each run what is measured next."""
        options = self._options
        for file in files:
            yield f"{short_name(str(file))}: reading"
            cases = self._cases[file] = _cases(file, options.kv_type)
            if cases[0].facts is not None:
                sha256, size = digest(file)
                self._files.append(
                    {"file": str(file), "sha256": sha256, "bytes": size, "facts": asdict(cases[0].facts)}
                )
            for case in cases:
                for prompt in options.prompt_tokens:
                    yield from self._measure_case(case, prompt)

    def _measure_case(self, case: _Case, prompt: int) -> Iterator[str]:
        options = self._options
        if case.reason is not None:
            for k in options.ks:
                self._keep(case, prompt, Measured(k, reason=case.reason))
            return
        task = Task(
            case.file,
            case.runtime,
            options.ks,
            prompt,
            options.new_tokens,
            options.threads,
            options.repeats,
            options.kv_type,
            options.gpu,
        )
        name = f"{short_name(case.name)}, {case.runtime}"
        for message in measure(task):
            if message is not None:
                self._keep(case, prompt, message)
            yield name

    def interrupted(self, files: Sequence[Path]) -> None:
        """Keep for each K of some files that was not measured that this is because of an interrupt."""
        options = self._options
        known = {(case.name, case.runtime, prompt, measured.k) for case, prompt, measured in self._found}
        for file in files:
            # Which runtimes would have read a file that was not looked at yet is not known.
            for case in self._cases.get(file, [_Case(file, "")]):
                self._found += [
                    (case, prompt, Measured(k, reason=case.reason or _INTERRUPTED))
                    for prompt in options.prompt_tokens
                    for k in options.ks
                    if (case.name, case.runtime, prompt, k) not in known
                ]
        # All of them: the interrupt may have come between what was found and its row.
        self.rows = [row(*found, options, self._board) for found in self._found]

    def _keep(self, case: _Case, prompt: int, measured: Measured) -> None:
        self._found.append((case, prompt, measured))
        self.rows.append(row(case, prompt, measured, self._options, self._board))
        if self._options.device == HOST and _exceeds(self.rows[-1]):
            # A host that was busy when it was measured was measured too slow.
            self._board.measure_again()
            self.rows = [row(*found, self._options, self._board) for found in self._found]

    def groups(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of each file, runtime and prompt."""
        keys = list(dict.fromkeys((one["file"], one["runtime"], one["prompt_tokens"]) for one in self.rows))
        for key in keys:
            yield [one for one in self.rows if (one["file"], one["runtime"], one["prompt_tokens"]) == key]

    def batching(self) -> list[dict[str, Any]]:
        """Return for each file, runtime and prompt the K at which batching stops being free, measured and at best.

        ``limited_by`` is None where no best is known.
        """
        facts = {case.name: case.facts for case, _, _ in self._found}
        found = []
        for rows in self.groups():
            first = rows[0]
            model = facts[first["file"]]
            if all(one["reason"] is not None for one in rows):
                continue
            free, limit = (None, None) if model is None else self._board.free_k(model, first["prompt_tokens"])
            found.append(
                {name: first[name] for name in ("file", "runtime", "prompt_tokens")}
                | {"step_doubles_at_k": doubles_at(rows), "free_k_at_best": free, "limited_by": limit}
            )
        return found

    @property
    def device(self) -> Device:
        """The board of the bounds."""
        return self._board.device

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {
            "format": FORMAT,
            **provenance(self._command, self._when),
            "options": asdict(self._options),
            "sampling": asdict(RULE),
            "device": {
                "name": self.device.name,
                "title": self.device.title,
                "engine": self._board.engine,
                "bandwidth": self.device.bandwidth,
                "read_curves": {str(threads): points for threads, points in self.device.read_curves.items()},
                "engines": [asdict(engine) for engine in self.device.engines],
            },
            "files": self._files,
            "rows": self.rows,
            "batching": self.batching(),
        }


def _exceeds(one: dict[str, Any]) -> bool:
    return one["share_of_bound"] is not None and max(one["share_of_bound"].values()) > 1


def bench_command(
    files: Sequence[Path],
    *,
    ks: str,
    prompt_tokens: str,
    new_tokens: int,
    threads: int | None,
    repeats: int,
    kv_type: str,
    gpu: bool,
    device: str,
    json_file: Path | None,
    command: str,
) -> int:
    """Measure files, print the table, and return the exit code.

    Args:
        files: Files and folders.
        ks, prompt_tokens: Lists of numbers with commas.
        new_tokens, repeats, kv_type, gpu, device: See ``Options``.
        threads: CPU threads; the free physical cores if None.
        json_file: Where to write everything.
        command: What was typed, for the record.

    Returns:
        0 if something was measured, else 1; 130 after an interrupt, which keeps what was measured until then.

    Raises:
        UserError: An option is impossible, or there is no such board.
    """
    if json_file is not None:
        check_output(json_file, "--json")
    options = Options(
        ks=numbers("--k", ks),
        prompt_tokens=numbers("--prompt-tokens", prompt_tokens),
        new_tokens=new_tokens,
        threads=_cores.free_cores() if threads is None else threads,
        repeats=repeats,
        kv_type=kv_type,
        gpu=gpu,
        device=device,
    )
    bench = Bench(options, command)
    # Of each K: its warm-up, its runs, and their result.
    total = len(files) * len(options.prompt_tokens) * len(options.ks) * (options.repeats + 2)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    interrupted = False
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True), transient=True
    ) as progress:
        bar = progress.add_task("", total=total)
        try:
            for name in bench.measure(files):
                progress.update(bar, description=name, advance=0 if name.endswith(": reading") else 1)
        except KeyboardInterrupt:
            interrupted = True
    if interrupted:
        some = any(one["reason"] is None for one in bench.rows)
        kept = "what was measured until then is kept" if some else "nothing was measured until then"
        print(f"interrupted: {kept}", file=sys.stderr)
        bench.interrupted(files)
    print_table(Console(), list(bench.groups()), bench.batching(), bench.device, options.threads)
    if json_file is not None:
        with replacing_file(json_file) as temporary:
            temporary.write_text(json.dumps(bench.to_dict(), indent=1) + "\n", encoding="utf-8")
    if interrupted:
        return 130
    return 0 if any(one["reason"] is None for one in bench.rows) else 1
