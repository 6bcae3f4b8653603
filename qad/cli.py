"""The command line: ``qad <verb>``. Each verb loads what it needs when it is called, so that help is instant."""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

# Set before any library that reads them is imported. TRL pings its makers once per trainer; qad does not.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import typer
from typer.core import TyperGroup

from qad import interrupts
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

RunArgument = Annotated[Path, typer.Argument(help="Run folder, as made by `qad train`.")]
ModelArgument = Annotated[
    Path,
    typer.Argument(help="Exported file or folder, run, or a server: http://host:8000/v1, #MODEL if it has several."),
]
BitsOption = Annotated[
    int | None, typer.Option(help="4 or 8: the portable grid of the linear layers.", show_default="4")
]
GridOption = Annotated[
    str | None, typer.Option(help="Any grid for the linear layers (embedding and head get at least 8 bits).")
]
PlanOption = Annotated[
    str | None,
    typer.Option(
        help="Mixture of grids: q4_k_s, q4_k_m, q5_k_s, q5_k_m, q6_k; or a JSON file of name patterns and grids or "
        '"keep", of which the first that matches counts, and --grid or --bits where none does.'
    ),
]
BudgetOption = Annotated[
    float | None,
    typer.Option(
        help="Stored bits per quantized weight, embedding and head included: each tensor's grid is chosen by what its "
        "rounding costs in KL.",
        min=1.0,
    ),
]
FormatsOption = Annotated[
    list[str] | None,
    typer.Option(help="Format whose grids --budget chooses among; may be repeated.", show_default="gguf"),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        help="JSONL or Parquet file of `text` or `prompt`/`completion` rows, or a hub data set id; may be repeated",
        show_default="worked problems, and text sampled from the teacher",
    ),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Continue the run in -o with the options it has, or start it.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="CPU threads; by default the free physical cores.", min=1)]


@app.command()
def train(
    bits: BitsOption = None,
    grid: GridOption = None,
    plan: PlanOption = None,
    budget: BudgetOption = None,
    formats: FormatsOption = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Hugging Face folder, hub id or GGUF file.", show_default="the packaged SmolLM2-135M"),
    ] = None,
    student: Annotated[str | None, typer.Option(help="The model to quantize.", show_default="the teacher")] = None,
    data: DataOption = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of reasoning-gym, with a level or without, such as chain_sum@1,gcd: trains on worked problems "
            "of these, and on --data if that is given too."
        ),
    ] = None,
    task_rows: Annotated[int | None, typer.Option(help="Problems of each task.", min=1, show_default="2000")] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe to start from: quick, thorough, reasoning.", show_default="quick")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; 0 stops after --init.", min=0, show_default="32")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Sequences per optimizer step.", min=1, show_default="4")
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(help="Sequences per forward pass.", min=1, show_default="4")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.", min=2, show_default="256")] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Learning rate of the weights, in grid steps per optimizer step (0.02: a fiftieth of one); 0 leaves "
            "them where --init put them, while norms, biases and learned scales go on learning.",
            show_default="0.002",
        ),
    ] = None,
    lr_unit: Annotated[
        str | None,
        typer.Option(
            help="What --lr is counted in: grid (steps) or weight (shares of the tensor's root mean square).",
            show_default="grid",
        ),
    ] = None,
    packed: Annotated[
        bool | None,
        typer.Option(
            "--packed/--no-packed",
            help="Fill sequences with documents, or make each row a sequence of its own.",
            show_default="packed",
        ),
    ] = None,
    noise: Annotated[
        str | None, typer.Option(help="none, uniform, stochastic or partial.", show_default="none")
    ] = None,
    noise_until: Annotated[
        float | None,
        typer.Option(help="Share of the steps after which all rounding is hard.", min=0.0, max=1.0, show_default="0.5"),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Where training starts: rtn, mse or gptq.", show_default="gptq")
    ] = None,
    scales: Annotated[str | None, typer.Option(help="absmax, mse or learned.", show_default="learned")] = None,
    kl: Annotated[str | None, typer.Option(help="forward, reverse or jsd.", show_default="forward")] = None,
    kl_weight: Annotated[
        float | None,
        typer.Option(
            help="Weight of the KL to the teacher; 0 runs no teacher and leaves the next-token loss.",
            show_default="1.0",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of both models in the loss.", show_default="1.0")
    ] = None,
    next_token_weight: Annotated[
        float | None, typer.Option(help="Weight of the plain next-token loss.", show_default="0.0")
    ] = None,
    loss_on: Annotated[
        str | None, typer.Option(help="all tokens, or completion tokens only.", show_default="all")
    ] = None,
    cache_top_k: Annotated[
        int | None,
        typer.Option(
            help="Compute the teacher's K likeliest tokens once and train from these.", min=0, show_default="0"
        ),
    ] = None,
    mix_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the default text.", min=1, show_default="40000")
    ] = None,
    held_out_tokens: Annotated[
        int | None, typer.Option(help="Tokens set aside for evaluation.", min=1, show_default="4096")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations; 0: at the end.", min=0, show_default="8")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; 0: none.", min=0, show_default="16")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Trade time for memory.")
    ] = None,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard", help="Also log to RUN/tensorboard.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data, noise and sampling.", show_default="0")] = None,
    resume: ResumeOption = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder.")] = Path("runs/run"),
) -> None:
    """Train a student on its grid, by KL to a teacher or on worked answers; leaves RUN/artifact."""
    from rich.console import Console

    from qad import recipes
    from qad.recipe import RECIPE_FILE, load_recipe

    # A resumed run has its recipe; options given again must agree with it.
    stored = load_recipe(output) if resume and (output / RECIPE_FILE).is_file() else None
    base = recipes.get(recipe or "quick") if stored is None else stored
    resolved = base.override(
        name=recipe,
        bits=bits,
        grid=grid,
        **_plan_options(plan),
        budget=budget,
        formats=tuple(formats) if formats else None,
        teacher=teacher,
        student=student,
        data=tuple(data) if data else None,
        # The recipe's own tasks are what it trains on where nothing else is named.
        tasks=tuple(tasks.split(",")) if tasks else () if data else None,
        task_rows=task_rows,
        packed=packed,
        lr_unit=lr_unit,
        steps=steps,
        batch_size=batch_size,
        micro_batch=micro_batch,
        seq_len=seq_len,
        lr=lr,
        noise=noise,
        noise_until=noise_until,
        init=init,
        scales=scales,
        kl=kl,
        kl_weight=kl_weight,
        temperature=temperature,
        next_token_weight=next_token_weight,
        loss_on=loss_on,
        cache_top_k=cache_top_k,
        mix_tokens=mix_tokens,
        held_out_tokens=held_out_tokens,
        eval_every=eval_every,
        save_every=save_every,
        gradient_checkpointing=gradient_checkpointing,
        tensorboard=tensorboard,
        seed=seed,
    )
    from qad.distill import distill
    from qad.outcome import print_outcome

    console = Console()
    try:
        with interrupts.remembered():
            outcome = distill(resolved, output, resume=resume, console=console)
    except KeyboardInterrupt:
        console.print(f"\ninterrupted; continue with: qad train --resume -o {output}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    print_outcome(outcome, console)
    # Not folded: the command is there to be copied.
    console.print(f"artifact: {output}/artifact    next: qad export {output} --format gguf -o FILE", soft_wrap=True)


def _plan_options(plan: str | None) -> dict[str, object]:
    """Return the recipe's fields for ``--plan``: a plan's name, or the rules that a file holds.

    Raises:
        UserError: Neither.
    """
    if plan is None:
        return {}
    from qad.errors import unknown_name
    from qad.plan import read_rules
    from qad.plans import NAMED

    if plan in NAMED:
        return {"plan": plan}
    if not plan.endswith(".json") and not Path(plan).exists():
        raise unknown_name("plan", plan, [*NAMED, "a JSON file"])
    return {"rules": read_rules(Path(plan))}


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face folder, hub id, GGUF file, or smollm2.")],
    bits: BitsOption = None,
    grid: GridOption = None,
    plan: PlanOption = None,
    budget: BudgetOption = None,
    formats: FormatsOption = None,
    init: Annotated[
        str | None, typer.Option(help="How weights are rounded: rtn, mse or gptq.", show_default="gptq")
    ] = None,
    data: DataOption = None,
    mix_tokens: Annotated[
        int | None, typer.Option(help="Tokens of the default text.", min=1, show_default="40000")
    ] = None,
    calibration_tokens: Annotated[
        int | None, typer.Option(help="Tokens of text for gptq and --budget.", min=1, show_default="16384")
    ] = None,
    held_out_tokens: Annotated[
        int | None, typer.Option(help="Tokens set aside for evaluation.", min=1, show_default="4096")
    ] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.", min=2, show_default="256")] = None,
    seed: Annotated[int | None, typer.Option(help="Of data and sampling.", show_default="0")] = None,
    resume: ResumeOption = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Run folder.")] = Path("runs/quantized"),
) -> None:
    """Round a model onto its grids without training; leaves RUN/artifact, which export, verify and run take."""
    from rich.console import Console

    from qad.recipe import RECIPE_FILE, Recipe, load_recipe

    base = Recipe(name="quantize", steps=0)
    if resume and (output / RECIPE_FILE).is_file():
        base = load_recipe(output)
        if base.name != "quantize":
            raise UserError(f"{output} is a run of `qad train`: continue it with that, or name another folder with -o")
    resolved = base.override(
        teacher=model,
        bits=bits,
        grid=grid,
        **_plan_options(plan),
        budget=budget,
        formats=tuple(formats) if formats else None,
        init=init,
        data=tuple(data) if data else None,
        mix_tokens=mix_tokens,
        calibration_tokens=calibration_tokens,
        held_out_tokens=held_out_tokens,
        seq_len=seq_len,
        seed=seed,
    )
    from qad.outcome import print_outcome
    from qad.quantize import quantize_model

    console = Console()
    try:
        with interrupts.remembered():
            outcome = quantize_model(resolved, output, resume=resume, console=console)
    except KeyboardInterrupt:
        again = f"qad quantize {model} --resume -o {output}"
        console.print(f"\ninterrupted; continue with: {again}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    print_outcome(outcome, console)
    console.print(f"artifact: {output}/artifact    next: qad export {output} --format gguf -o FILE", soft_wrap=True)
    console.print(
        f"to train under the same plan: qad train --teacher {model} --plan {output}/plan.json", soft_wrap=True
    )


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
            "--requantize", help="Round again where a format does not carry the trained grid. Not the trained weights."
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
    text: Annotated[Path | None, typer.Option(help="Text to compare runtime and torch on.")] = None,
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
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus.", min=0.0, max=1.0)] = 0.95,
    top_k: Annotated[int, typer.Option(help="0 is all tokens.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
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


@app.command()
def think(
    file: ModelArgument,
    question: Annotated[str, typer.Argument(help="What to ask.")],
    k: Annotated[int, typer.Option("--k", help="Trajectories.", min=1)] = 8,
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
            help="Trajectories at a time.", min=1, show_default="half of K where a vote may stop early, else K"
        ),
    ] = None,
    drop: Annotated[
        bool,
        typer.Option(
            "--drop", help="Drop trajectories less confident than all that ended; with --confidence below 1, or --full."
        ),
    ] = False,
    measure: Annotated[
        str, typer.Option(help="Confidence: the lowest mean log-probability of a window, or the mean of all tokens.")
    ] = "lowest",
    window: Annotated[int, typer.Option(help="Tokens of that window.", min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(help="Longest trajectory and deliberation.", min=1)] = 512,
    preset: Annotated[
        str | None, typer.Option(help="Sampling: tiny or large.", show_default="by parameters: large from 7B on")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="In place of the preset's.", min=0.0)] = None,
    top_p: Annotated[float | None, typer.Option(help="In place of the preset's.", min=0.0, max=1.0)] = None,
    top_k: Annotated[int | None, typer.Option(help="In place of the preset's; 0 is all tokens.", min=0)] = None,
    min_p: Annotated[float | None, typer.Option(help="In place of the preset's.", min=0.0, max=1.0)] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling and of the order in deliberations.", min=0)] = 0,
    threads: ThreadsOption = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on the GPU, where the runtime was built for one.")] = False,
    kv_type: Annotated[str, typer.Option(help="Of the key-value cache in llama.cpp: f16, q8_0 or q4_0.")] = "f16",
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


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(help="Exported files and folders, runs, servers.", metavar="FILE...")],
    ks: Annotated[str, typer.Option("--k", help="Trajectories at once, with commas.")] = "1,2,4,8,16",
    prompt_tokens: Annotated[
        str, typer.Option(help="Tokens of the prompt that all share; several with commas sweep the context.")
    ] = "128",
    new_tokens: Annotated[int, typer.Option(help="Tokens of each trajectory, exactly.", min=2)] = 128,
    device: Annotated[str, typer.Option(help="Board whose bound stands beside each figure.")] = "host",
    threads: ThreadsOption = None,
    repeats: Annotated[int, typer.Option(help="Runs of each figure, of which the median is told.", min=1)] = 3,
    kv_type: Annotated[str, typer.Option(help="Of the key-value cache in llama.cpp: f16, q8_0 or q4_0.")] = "f16",
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


@app.command("eval")
def evaluate(
    files: Annotated[
        list[str] | None,
        typer.Argument(help="Models; with --compare results (--json) or samples (.jsonl).", metavar="FILE..."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="Task by name, or FILE.jsonl of prompt, solution; may be repeated.")
    ] = None,
    trained: Annotated[
        list[str] | None, typer.Option(help="Task that the model was trained on, which failures are told by.")
    ] = None,
    near: Annotated[list[str] | None, typer.Option(help="Task near it: the same at a higher level.")] = None,
    far: Annotated[list[str] | None, typer.Option(help="Task far from it: never trained on.")] = None,
    task_file: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: a local file of a published task's items.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Most items of each task.", min=1)] = None,
    k: Annotated[int, typer.Option(help="Answers to each item.", min=1)] = 8,
    methods: Annotated[
        str, typer.Option(help="How K answers become one, with commas: vote, weighted, best, deliberate.")
    ] = "vote",
    summary_k: Annotated[int, typer.Option(help="Deliberations of each item.", min=1)] = 1,
    new_tokens: Annotated[int, typer.Option(help="Longest answer.", min=1)] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 is greedy.", min=0.0, show_default="0 for --k 1, 0.6, or 1.0 from 7B parameters on"),
    ] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus.", min=0.0, max=1.0)] = 0.95,
    top_k: Annotated[
        int | None, typer.Option(help="0 is all tokens.", min=0, show_default="0, or 10 from 7B parameters on")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of generated items and of sampling.", min=0)] = 0,
    reference: Annotated[
        str | None, typer.Option(help="Teacher: evaluated too, and what the others are held against.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Compare results that were made before.")] = False,
    margin: Annotated[float, typer.Option(help="Loss that still counts as as good.", min=0.0, max=1.0)] = 0.05,
    after: Annotated[
        Path | None, typer.Option(help="Results of a model that was trained on these levels, for the failures.")
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(help="Of confidences: isotonic or platt.", show_default="isotonic from 1000 answers on"),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text for perplexity, and for KL to --reference.")] = None,
    chunk_tokens: Annotated[int, typer.Option(help="The text is cut into chunks; half of each is judged.")] = 512,
    chunks: Annotated[int | None, typer.Option(help="Most chunks of the text.", min=1)] = None,
    threads: ThreadsOption = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Run on the GPU, where the runtime was built for one.")] = False,
    kv_type: Annotated[str, typer.Option(help="Of the key-value cache in llama.cpp: f16, q8_0 or q4_0.")] = "f16",
    plots: Annotated[Path | None, typer.Option(help="Folder for reliability plots.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write everything to this file.")] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the samples.")] = Path("runs/eval"),
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
            )
        )
    )


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(help="Hugging Face folder, hub id or GGUF file to look into.")] = None,
) -> None:
    """Tell what is installed, which kernels and runtimes work and why not, and what a model needs."""
    from qad.doctor import doctor_command

    raise typer.Exit(doctor_command(model))


@app.command()
def devices(
    name: Annotated[str | None, typer.Argument(help="A board, or host; all boards if none is named.")] = None,
    model: Annotated[Path | None, typer.Option(help="Exported file, run or model folder to look at on it.")] = None,
    k: Annotated[int, typer.Option(help="Trajectories at once.", min=1)] = 8,
    context: Annotated[int, typer.Option(help="Tokens of each trajectory, the prompt included.", min=1)] = 4096,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(help="Tokens of the prompt that all share.", min=0, show_default="128, or half the context"),
    ] = None,
    kv_type: Annotated[str, typer.Option(help="Of the key-value cache: f16, q8_0 or q4_0.")] = "f16",
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
        # What is not written through qad.files: logs, the caches of libraries.
        explained = explain(error, Path(error.filename or "a file"))
        if explained is None:
            raise
        print(f"error: {explained}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
