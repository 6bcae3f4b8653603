"""``qad think`` on the command line."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qad.cli_options import ModelArgument, ThreadsOption
from qad.errors import UserError


def think(
    file: ModelArgument,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    k: Annotated[int, typer.Option("--k", help="Trajectories: answers that are sampled side by side.", min=1)] = 8,
    method: Annotated[
        str,
        typer.Option(
            help="vote; weighted: a vote by confidence; best: the most confident text; deliberate: one more pass over "
            "all trajectories; auto: vote if more than half give an answer that can be compared, else deliberate."
        ),
    ] = "auto",
    kind: Annotated[
        str | None,
        typer.Option(
            help="How answers are found and compared: math, choice, code or text.",
            show_default="what a text marks as its answer, as mathematics",
        ),
    ] = None,
    summary_k: Annotated[int, typer.Option("--summary-k", help="Deliberations side by side.", min=1)] = 1,
    iterations: Annotated[
        int, typer.Option(help="Rounds of deliberation, each over the texts of the one before.", min=1)
    ] = 1,
    budget: Annotated[
        int | None,
        typer.Option(
            help="Tokens of all trajectories in a deliberation.", min=1, show_default="what the context has left"
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            help="Stop early when the rest leaves the vote as it is: surely (1), or with this probability.",
            min=0.5,
            max=1.0,
            show_default="1",
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full", help="Sample every trajectory to its end; after Ctrl-C, show those that had not ended."),
    ] = False,
    wave: Annotated[
        int | None,
        typer.Option(
            help="Trajectories that run at a time.", min=1, show_default="half of K where a vote may stop early, else K"
        ),
    ] = None,
    drop: Annotated[
        bool,
        typer.Option(
            "--drop", help="Drop trajectories less confident than all that ended; with --confidence below 1, or --full."
        ),
    ] = False,
    measure: Annotated[
        str,
        typer.Option(
            help="What confidence is: lowest (the lowest mean log-probability of a window of tokens) or mean (of all)."
        ),
    ] = "lowest",
    window: Annotated[int, typer.Option(help="Tokens of a window of --measure lowest.", min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(help="Longest trajectory and deliberation.", min=1)] = 512,
    preset: Annotated[
        str | None, typer.Option(help="Sampling: tiny or large.", show_default="by parameters: large from 7B on")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="In place of the preset's.", min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option(help="In place of the preset's.", min=0.0, max=1.0)] = None,
    top_k: Annotated[int | None, typer.Option(help="In place of the preset's; 0 is all tokens.", min=0)] = None,
    min_p: Annotated[float | None, typer.Option(help="In place of the preset's.", min=0.0, max=1.0)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling and of the order in deliberations.", min=0)] = 0,
    threads: ThreadsOption = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on the GPU, where the runtime was built for one.")] = False,
    kv_type: Annotated[str, typer.Option(help="Type of the key-value cache in llama.cpp: f16, q8_0 or q4_0.")] = "f16",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Ask a question K times and return one answer: by vote, by confidence, or by deliberating."""
    import shlex

    from qad.think.command import think_command
    from qad.think.options import ThinkOptions

    if full and confidence is not None:
        raise UserError("--full stops nothing early, and --confidence says when to stop early: give one of both")
    options = ThinkOptions(
        k=k,
        method=method,  # type: ignore[arg-type]
        new_tokens=new_tokens,
        certainty=None if full else 1.0 if confidence is None else confidence,
        wave=wave,
        drop=drop,
        measure=measure,  # type: ignore[arg-type]
        window=window,
        summary_k=summary_k,
        iterations=iterations,
        budget=budget,
    )
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    status = think_command(
        str(file),
        question,
        options=options,
        sampling=sampling,
        preset=preset,
        kind=kind,
        threads=threads,
        gpu=gpu,
        kv_type=kv_type,
        json_file=json_file,
        command=shlex.join(["qad", *sys.argv[1:]]),
    )
    raise typer.Exit(status)
