"""The verbs that make a run: ``qad train`` and ``qad quantize``."""

from pathlib import Path
from typing import Annotated

import typer

from qad import interrupts
from qad.cli_options import BitsOption, BudgetOption, DataOption, FormatsOption, GridOption, PlanOption, ResumeOption
from qad.errors import UserError


def train(
    bits: BitsOption = None,
    grid: GridOption = None,
    plan: PlanOption = None,
    budget: BudgetOption = None,
    formats: FormatsOption = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Hugging Face folder, hub id, GGUF file, or smollm2.", show_default="the packaged SmolLM2-135M"
        ),
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
        str | None,
        typer.Option(
            help="What stands in for hard rounding at first: none, uniform, stochastic or partial.", show_default="none"
        ),
    ] = None,
    noise_until: Annotated[
        float | None,
        typer.Option(help="Share of the steps after which all rounding is hard.", min=0.0, max=1.0, show_default="0.5"),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Where training starts: rtn, mse or gptq.", show_default="gptq")
    ] = None,
    scales: Annotated[
        str | None, typer.Option(help="How scales are found: absmax, mse or learned.", show_default="learned")
    ] = None,
    kl: Annotated[
        str | None,
        typer.Option(
            help="Direction of the KL to the teacher: forward, reverse or jsd (between both).", show_default="forward"
        ),
    ] = None,
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
        str | None,
        typer.Option(
            help="Tokens that the loss counts: all, or completion (of prompt/completion rows).", show_default="all"
        ),
    ] = None,
    cache_top_k: Annotated[
        int | None,
        typer.Option(
            help="Compute the teacher's K likeliest tokens once and train from these; 0 runs it at every step.",
            min=0,
            show_default="0",
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
        bool | None,
        typer.Option(
            "--gradient-checkpointing", help="Keep fewer activations and compute them again: less memory, more time."
        ),
    ] = None,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard", help="Also log to RUN/tensorboard.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data, noise and sampling.", show_default="0")] = None,
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
    given = dict(
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
    if resume and stored is None and all(value is None for value in given.values()):
        # With the options of a run this starts it; without any it would train another model than was meant.
        raise UserError(f"{output} holds no run to continue: check -o, or give the options that start one")
    resolved = base.override(**given)
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
    seed: Annotated[int | None, typer.Option(help="Seed of data and sampling.", show_default="0")] = None,
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
