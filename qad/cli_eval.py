"""``qad eval`` on the command line."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from qad.cli_options import ThreadsOption


def evaluate(
    context: typer.Context,
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Models; with --compare results (--json) or samples (.jsonl).", metavar="FILE..."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task by name, or FILE.jsonl of prompt, solution; may be repeated.")
    ] = None,
    trained: Annotated[
        list[str] | None,
        typer.Option(help="Task that the model was trained on, to tell a lack of training from a lack of capacity."),
    ] = None,
    near: Annotated[list[str] | None, typer.Option(help="Task near it: the same at a higher level.")] = None,
    far: Annotated[list[str] | None, typer.Option(help="Task far from it: never trained on.")] = None,
    task_file: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: a local file of a published task's items.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most items of each task; all if it is left out.", min=1)] = None,
    k: Annotated[int, typer.Option(help="Answers to each item.", min=1)] = 8,
    methods: Annotated[
        str, typer.Option(help="How K answers become one, with commas: vote, weighted, best, deliberate.")
    ] = "vote",
    summary_k: Annotated[int, typer.Option(help="Deliberations of each item.", min=1)] = 1,
    new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Of the sampling; 0 always takes the likeliest token.",
            min=0.0,
            show_default="0 for --k 1, 0.6, or 1.0 from 7B parameters on",
        ),
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the likeliest tokens that have this share together (nucleus).", min=0.0, max=1.0),
    ] = 0.95,
    top_k: Annotated[
        int | None,
        typer.Option(
            help="Draw from so many of the likeliest tokens; 0: from all.",
            min=0,
            show_default="0, or 10 from 7B parameters on",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of generated items and of sampling.", min=0)] = 0,
    reference: Annotated[
        str | None, typer.Option(help="Teacher: evaluated too, and what the others are held against.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare results that were made before.")] = False,
    margin: Annotated[
        float,
        typer.Option(
            help="Loss of a metric up to which a model still counts as as good as the other.", min=0.0, max=1.0
        ),
    ] = 0.05,
    after: Annotated[
        Path | None,
        typer.Option(
            help="Results (--json or samples) of the same items after training on them: which failures that mends."
        ),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(
            help="How confidences are calibrated: isotonic or platt.", show_default="isotonic from 1000 answers on"
        ),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text file for perplexity, and for KL to --reference.")] = None,
    chunk_tokens: Annotated[
        int, typer.Option(help="Tokens of the chunks that the text is cut into; the second half of each is judged.")
    ] = 512,
    chunks: Annotated[int | None, typer.Option(help="Most chunks of the text; all if it is left out.", min=1)] = None,
    threads: ThreadsOption = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on the GPU, where the runtime was built for one.")] = False,
    kv_type: Annotated[str, typer.Option(help="Type of the key-value cache in llama.cpp: f16, q8_0 or q4_0.")] = "f16",
    plots: Annotated[Path | None, typer.Option(help="Folder for reliability plots.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for the answers, from which a later call goes on.")
    ] = Path("runs/eval"),
) -> None:
    """Measure how often models are right, with intervals; go on where it stopped; compare them item by item."""
    import shlex

    from qad.evals.arguments import Arguments, run

    raise typer.Exit(
        run(
            Arguments(
                files=tuple(files or ()),
                tasks={None: task or (), "trained": trained or (), "near": near or (), "far": far or ()},
                task_files=tuple(task_file or ()),
                limit=limit,
                k=k,
                methods=methods,
                summary_k=summary_k,
                new_tokens=new_tokens,
                temperature=temperature,
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                reference=reference,
                compare=compare,
                margin=margin,
                after=after,
                fit=fit,
                text=text,
                chunk_tokens=chunk_tokens,
                chunks=chunks,
                threads=threads,
                gpu=gpu,
                kv_type=kv_type,
                plots=plots,
                json_file=json_file,
                output=output,
                command=shlex.join(["qad", *sys.argv[1:]]),
                typed=_typed(context),
            )
        )
    )


def _typed(context: typer.Context) -> tuple[str, ...]:
    """Return the options that were typed, by their long names."""
    return tuple(
        max(one.opts, key=len)
        for one in context.command.params
        if one.param_type_name == "option"
        and one.name is not None
        and getattr(context.get_parameter_source(one.name), "name", None) == "COMMANDLINE"
    )
