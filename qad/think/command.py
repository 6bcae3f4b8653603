"""``qad think``: one question, K trajectories, one answer."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.text import Text

from qad import interrupts, runtimes
from qad.errors import UserError, unknown_name
from qad.files import check_output, replacing_file
from qad.final_answer import Kind
from qad.runtimes import Sampling, Trajectory
from qad.think.confidence import lowest_window, mean_logprob
from qad.think.deliberation import lacks_room
from qad.think.engine import think
from qad.think.judge import Printer
from qad.think.options import PRESETS, ThinkOptions, preset_for
from qad.think.show import lines, print_thought
from qad.think.thought import Thought


def think_command(
    source: str,
    question: str,
    *,
    options: ThinkOptions,
    sampling: dict[str, float | int | None],
    preset: str | None,
    kind: str | None,
    threads: int | None,
    gpu: bool,
    kv_type: str,
    json_file: Path | None,
    command: str,
) -> int:
    """Ask a model and print what came of it: the reply to standard output, all else to standard error.

    Args:
        source: What ``qad.runtimes.open_model`` opens.
        question: What to ask.
        options: How; its sampling is replaced.
        sampling: Fields of the sampling rule that differ from the preset; None: they do not.
        preset: Name of a preset; None: by the model's size.
        kind: How answers are compared; None: as they come.
        threads: Of the CPU.
        gpu: Whether to run on the GPU.
        kv_type: Of the key-value cache.
        json_file: Where to write everything to as well.
        command: As it was given, for the file.

    Returns:
        Exit status: 0; 1 if deliberations were asked for and there are none; 130 after an interrupt.

    Raises:
        UserError: Bad input, or a model that cannot be run.
    """
    if kind is not None and kind not in get_args(Kind):
        raise unknown_name("kind of answer", kind, list(get_args(Kind)))
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise UserError("the question is not UTF-8 text: check the encoding of the terminal") from error
    if not question.strip():
        raise UserError("the question is empty: say what to ask")
    if json_file is not None:
        check_output(json_file, "--json")
    console = Console(stderr=True)
    thought: Thought | None = None
    resolved = options
    try:
        with interrupts.remembered():
            name, reason = (preset, None) if preset is not None else preset_for(source)
            resolved = dataclasses.replace(options, sampling=_sampling(name, sampling))
            device = "gpu" if gpu else "cpu"
            with runtimes.open_model(source, device=device, threads=threads, kv_type=kv_type) as session:
                # Libraries that load a model may swallow an interrupt.
                interrupts.check()
                if reason is not None:
                    console.print(f"[dim]preset {name} ({reason})[/]")
                if options.method == "auto" and (lacking := lacks_room(session, question, resolved)):
                    told = f"answers that cannot be compared may not be deliberated on, but the best shown: {lacking}"
                    console.print(Text(f"note: {told}", style="yellow"), soft_wrap=True)
                printer = _printer(console) if kind == "code" else None
                with lines(console) as shown:
                    thought = think(session, question, resolved, kind=kind, printer=printer, on_event=shown)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        if thought is None:
            told = f"none of {options.k} trajectories had begun, so there is no answer"
            told += f", and {json_file} was not written" if json_file else " and nothing to keep"
            console.print(Text("interrupted: ", style="bold yellow") + Text(told, style="default"), soft_wrap=True)
            return 130
        thought.interrupted = True
    if json_file is not None:
        write_json(json_file, thought, source=source, question=question, options=resolved, command=command)
    print_thought(thought, console, resolved.k, unfinished=resolved.certainty is None)
    if thought.interrupted:
        kept = f"all that was sampled is kept in {json_file}" if json_file else "nothing is kept: --json FILE does that"
        console.print(Text(kept), soft_wrap=True)
        return 130
    # What was asked for by name was not done; the notes say why.
    return 1 if options.method == "deliberate" != thought.method else 0


def _printer(console: Console) -> Printer | None:
    """Return what tells the output of a program, run in a sandbox; None where there is none, which is said."""
    from qad.evals import sandbox

    if reason := sandbox.refusal():
        console.print(f"programs are compared by their form, not by what they print: {reason}", markup=False)
        return None

    def printed(program: str) -> str | None:
        done = sandbox.run(program)
        return done.stdout if done.status == 0 else None

    return printed


def _sampling(preset: str, changes: dict[str, float | int | None]) -> Sampling:
    """Return the sampling rule of a preset with some fields changed."""
    if preset not in PRESETS:
        raise unknown_name("preset", preset, list(PRESETS))
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(PRESETS[preset], **given)  # type: ignore[arg-type]


def write_json(
    file: Path, thought: Thought, *, source: str, question: str, options: ThinkOptions, command: str
) -> None:
    """Write everything about a thought to a file."""
    result = {
        "format": 1,
        "kind": "think",
        "command": command,
        "model": str(source),
        "question": question,
        "options": dataclasses.asdict(options),
        "answer": thought.answer,
        "text": thought.text,
        "method": thought.method,
        "vote": None if thought.vote is None else dataclasses.asdict(thought.vote),
        "tokens": thought.tokens,
        "tokens_saved": thought.tokens_saved,
        "seconds": thought.seconds,
        "notes": thought.notes,
        "interrupted": thought.interrupted,
        "trajectories": _rows(thought.trajectories, thought.answers, options.window),
        "deliberations": _rows(thought.deliberations, None, options.window),
        "work": [dataclasses.asdict(work) for work in thought.works],
    }
    with replacing_file(file) as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _rows(
    trajectories: Sequence[Trajectory], answers: Sequence[str | None] | None, window: int
) -> list[dict[str, Any]]:
    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    rows = []
    for place, one in enumerate(trajectories):
        row: dict[str, Any] = {
            "index": one.index,
            "text": one.text,
            "n_tokens": len(one.tokens),
            "mean_logprob": finite(mean_logprob(one.logprobs)),
            "lowest_window_logprob": finite(lowest_window(one.logprobs, window)),
            "reason": one.reason,
            "seconds": one.seconds,
        }
        if answers is not None:
            row["answer"] = answers[place]
        rows.append(row)
    return rows
