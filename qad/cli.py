"""The command line: ``qad <verb>``. Each verb loads what it needs when it is called, so that help is instant.

Verbs with many options have a module of their own, beside this one.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

# Set before any library that reads them is imported.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from typer.core import TyperGroup

from qad import cli_eval, cli_think, cli_train
from qad.cli_options import ModelArgument, RunArgument, ThreadsOption
from qad.errors import UserError
from qad.files import explain


class _Verbs(TyperGroup):
    """The verbs. Typer ends without a word where an interrupt comes that a verb does not take, such as in an import."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Verbs,
    name="qad",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train a quantized student on the very grid that the device stores, and export exactly those weights.",
)

app.command()(cli_train.train)
app.command()(cli_train.quantize)


@app.command()
def export(
    run: RunArgument,
    format: Annotated[  # noqa: A002
        str,
        typer.Option(
            "--format", help="gguf (a file), gptq or onnx (folders); several with commas, and a manifest beside them."
        ),
    ] = "gguf",
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File or folder to write; for several formats the folder to put them in."),
    ] = None,
    requantize: Annotated[
        bool,
        typer.Option(
            "--requantize",
            help="Round again where a format does not carry the trained grid: other weights than the trained ones.",
        ),
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", help="Of an ONNX folder: cpu (a graph in float32) or cuda (in fp16).", show_default="cpu"
        ),
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            help="Of an ONNX folder on the CPU: 1 computes in float32, 4 rounds inputs of products to 8 bits and is "
            "fast. The weights are the same.",
            show_default="4",
        ),
    ] = None,
    wide_inputs: Annotated[
        str | None,
        typer.Option(
            help="At accuracy level 4, which products keep more than 8 bits of their input: none, sensitive (the head "
            "and attention's first) or all.",
            show_default="sensitive",
        ),
    ] = None,
) -> None:
    """Pack a run's codes and scales into files for runtimes, without touching a value."""
    onnx = {"target": target, "accuracy_level": accuracy_level, "wide_inputs": wide_inputs}
    onnx = {name: value for name, value in onnx.items() if value is not None}
    try:
        from qad.deliver import export_command
    except KeyboardInterrupt:  # typer would end without a word
        print("interrupted: nothing was written")
        raise typer.Exit(130) from None
    raise typer.Exit(export_command(run, format, output, requantize, onnx))


@app.command()
def verify(
    run: RunArgument,
    files: Annotated[list[Path], typer.Argument(help="Exported files and folders.", metavar="FILE...")],
    text: Annotated[
        Path | None, typer.Option(help="Text file to compare runtime and torch on, in place of the packaged one.")
    ] = None,
    runtime: Annotated[bool, typer.Option(help="Also run each file and compare with torch.")] = True,
    threads: ThreadsOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Prove that files decode to the trained weights, bit for bit; exit with 1 if not, with 2 if one is unreadable."""
    import shlex

    from qad.verify_command import verify_command

    command = shlex.join(["qad", *sys.argv[1:]])
    raise typer.Exit(verify_command(run, files, text, runtime, threads, json_file, command))


@app.command()
def run(
    file: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 256,
    temperature: Annotated[
        float, typer.Option(help="Of the sampling; 0 always takes the likeliest token.", min=0.0)
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the likeliest tokens that have this share together (nucleus).", min=0.0, max=1.0),
    ] = 0.95,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest tokens; 0: from all.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.", min=0)] = 0,
    threads: ThreadsOption = None,
) -> None:
    """Stream an answer from an exported file or a server, with the model's chat template."""
    from qad.answer import answer

    answer(
        file,
        prompt,
        new_tokens=new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        threads=threads,
    )


app.command()(cli_think.think)


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="Exported files and folders, runs, servers.", metavar="FILE...")],
    ks: Annotated[
        str, typer.Option("--k", help="Answers that are made side by side (trajectories); several numbers with commas.")
    ] = "1,2,4,8,16",
    prompt_tokens: Annotated[
        str, typer.Option(help="Tokens of the prompt that all share; several with commas sweep the context.")
    ] = "128",
    new_tokens: Annotated[int, typer.Option(help="Tokens of each trajectory, exactly.", min=2)] = 128,
    device: Annotated[
        str,
        typer.Option(help="Board whose bound stands beside each figure: one of `qad devices`, or host, this machine."),
    ] = "host",
    threads: ThreadsOption = None,
    repeats: Annotated[int, typer.Option(help="Runs of each figure, of which the median is told.", min=1)] = 3,
    kv_type: Annotated[str, typer.Option(help="Type of the key-value cache in llama.cpp: f16, q8_0 or q4_0.")] = "f16",
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on the GPU, where the runtime was built for one.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
) -> None:
    """Measure tokens/s, latency, memory and energy of K trajectories, file after file, beside the board's bound."""
    import shlex

    from qad.bench import bench_command

    raise typer.Exit(
        bench_command(
            files,
            ks=ks,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            threads=threads,
            repeats=repeats,
            kv_type=kv_type,
            gpu=gpu,
            device=device,
            json_file=json_file,
            command=shlex.join(["qad", *sys.argv[1:]]),
        )
    )


app.command("eval")(cli_eval.evaluate)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder, hub id or GGUF file to look into.")] = None,
) -> None:
    """Tell what is installed, which kernels and runtimes work and why not, and what a model needs."""
    from qad.doctor import doctor_command

    raise typer.Exit(doctor_command(model))


@app.command()
def devices(
    name: Annotated[
        str | None, typer.Argument(help="A board, or host, this machine; all boards if none is named.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Exported file, run or model folder to look at on it.")] = None,
    k: Annotated[int, typer.Option(help="Answers that are made side by side (trajectories).", min=1)] = 8,
    context: Annotated[int, typer.Option(help="Tokens of each trajectory, the prompt included.", min=1)] = 4096,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the prompt that all share.", min=0, show_default="128, or half the context"),
    ] = None,
    kv_type: Annotated[str, typer.Option(help="Type of the key-value cache: f16, q8_0 or q4_0.")] = "f16",
    memory: Annotated[float | None, typer.Option(help="GiB of memory, where a board is sold with several.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine again; for host.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """List boards; tell whether a model fits one, how fast it can be for each K, and which flags to use."""
    from qad.boards import devices_command

    devices_command(
        name,
        model=model,
        k=k,
        context=context,
        prompt_tokens=prompt_tokens,
        kv_type=kv_type,
        memory_gib=memory,
        measure=measure,
        as_json=as_json,
    )


@app.command()
def report(
    records: Annotated[
        list[Path],
        typer.Argument(
            help="Run folders, and JSON of bench, verify, eval and bench/quality.py.", metavar="RUN|JSON..."
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path("report.html"),
    title: Annotated[
        str | None, typer.Option(help="Heading of the page.", show_default="the names of what is given")
    ] = None,
) -> None:
    """Put what was measured on one page: quality at size, proof, speed, memory, training, evaluation."""
    import shlex

    from qad.report.command import report_command

    report_command(records, output, title=title, command=shlex.join(["qad", *sys.argv[1:]]))


def main() -> None:
    """Run the command line. A user's error is one message and status 2, an interrupt status 130."""
    # Where torchao is installed transformers loads it, which warns of CUDA kernels that a CPU torch cannot load.
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        app()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        # What is not written through qad.files: standard output, logs, the caches of libraries.
        explained = explain(error, Path(error.filename or "standard output or a log"))
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
