"""From what was typed after ``qad eval`` to what is evaluated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

from qad.errors import UserError, unknown_name
from qad.evals.calibration import Fit
from qad.evals.command import Options, TaskRequest, eval_command
from qad.evals.compare_command import compare_command
from qad.evals.runner import Asking, check_methods
from qad.evals.shift import Label
from qad.runtimes import Sampling
from qad.think.options import PRESETS, preset_for

# What means something to a comparison.
_OF_COMPARE = ("--compare", "--margin", "--json")


@dataclass(frozen=True)
class Arguments:
    """The command line, as ``qad.cli`` describes each option.

    Attributes:
        tasks: By label, None for tasks without one.
        command: What was typed.
        typed: Options that were typed rather than left as they are.
    """

    files: tuple[str, ...]
    tasks: Mapping[Label | None, Sequence[str]]
    task_files: tuple[str, ...]
    limit: int | None
    k: int
    methods: str
    summary_k: int
    new_tokens: int
    temperature: float | None
    top_p: float
    top_k: int | None
    seed: int
    reference: str | None
    compare: bool
    margin: float
    after: Path | None
    fit: str | None
    text: Path | None
    chunk_tokens: int
    chunks: int | None
    threads: int | None
    gpu: bool
    kv_type: str
    plots: Path | None
    json_file: Path | None
    output: Path
    command: str
    typed: tuple[str, ...] = ()


def sampling_of(arguments: Arguments) -> Sampling:
    """Return the sampling of all models: what was typed, else the preset of the first, or greedy for one answer."""
    name, _ = preset_for(arguments.reference or arguments.files[0])
    preset = PRESETS[name]
    temperature = arguments.temperature
    if temperature is None:
        temperature = preset.temperature if arguments.k > 1 else 0.0
    top_k = preset.top_k if arguments.top_k is None else arguments.top_k
    return replace(preset, temperature=temperature, top_p=arguments.top_p, top_k=top_k, seed=arguments.seed)


def _local_files(pairs: Sequence[str]) -> dict[str, Path]:
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals:
            raise UserError(f"--task-file {pair!r} names no task: write NAME=FILE")
        found[name] = Path(path)
    return found


def _requests(arguments: Arguments) -> tuple[TaskRequest, ...]:
    local = _local_files(arguments.task_files)
    requests = tuple(
        TaskRequest(name, label, local.pop(name, None)) for label, names in arguments.tasks.items() for name in names
    )
    if local:
        raise UserError(f"--task-file names {', '.join(local)}, which is no task of this evaluation: add --task")
    return requests


def run(arguments: Arguments) -> int:
    """Evaluate or compare, and return the exit code.

    Raises:
        UserError: Options are impossible or do not go together; see ``eval_command`` and ``compare_command``.
    """
    if not arguments.files and not arguments.reference:
        raise UserError("no model is named: give exported files, runs or model folders; with --compare results")
    if arguments.compare:
        if given := [name for name in arguments.typed if name not in _OF_COMPARE]:
            told = f"{', '.join(given)} {'means' if len(given) == 1 else 'mean'}"
            raise UserError(f"--compare asks no model, so {told} nothing: leave out the one or the other")
        return compare_command(
            [Path(file) for file in arguments.files],
            margin=arguments.margin,
            json_file=arguments.json_file,
            command=arguments.command,
        )
    if arguments.fit not in (None, *get_args(Fit)):
        raise unknown_name("fit", str(arguments.fit), list(get_args(Fit)))
    methods = check_methods([part.strip() for part in arguments.methods.split(",") if part.strip()])
    if not methods:
        raise UserError("--methods names none: leave it out for vote")
    model_options: dict[str, Any] = {
        "device": "gpu" if arguments.gpu else "cpu",
        "threads": arguments.threads,
        "kv_type": arguments.kv_type,
    }
    options = Options(
        tasks=_requests(arguments),
        asking=Asking(
            k=arguments.k,
            sampling=sampling_of(arguments),
            new_tokens=arguments.new_tokens,
            deliberations=arguments.summary_k if "deliberate" in methods else 0,
        ),
        methods=methods,
        limit=arguments.limit,
        task_seed=arguments.seed,
        output=arguments.output,
        fit=cast(Fit | None, arguments.fit),
        margin=arguments.margin,
        after=arguments.after,
        text=arguments.text,
        chunk_tokens=arguments.chunk_tokens,
        chunks=arguments.chunks,
        model_options=model_options,
    )
    return eval_command(
        arguments.files,
        arguments.reference,
        options,
        plots=arguments.plots,
        json_file=arguments.json_file,
        command=arguments.command,
    )
