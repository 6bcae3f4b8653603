"""A run from recipe to artifact: load, gather text, initialise, train, keep the best, tell how it went.

RUN/
recipe.json          the resolved recipe
plan.json            which tensor gets which grid
data/                text sampled from the teacher, kept so that a resumed run trains on the same
teacher_cache/       the teacher's top-k, if the recipe asks for it
checkpoints/         the newest checkpoint while training lasts
artifact/            the best student so far, see ``artifact.py``
run.jsonl            one line per step and evaluation
result.json          the figures of the finished run
"""

import contextlib
import copy
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedModel, set_seed

from qad.artifact import save_artifact
from qad.callbacks import JsonLog, ProgressBar
from qad.checkpoints import CHECKPOINTS, check_checkpoint, checkpoint_step, last_checkpoint
from qad.errors import UserError
from qad.files import replacing_file
from qad.gptq_init import initialize
from qad.measure import Quality, output_head
from qad.model import LoadedModel, model_fingerprint
from qad.ops import describe, why_reference
from qad.outcome import Outcome, load_outcome
from qad.plan import KEEP, Plan, is_tied, stored_bytes
from qad.planning import measured_plan, plan_from_recipe, save_plan
from qad.prepare import calibration_tokens, gather_rows, load_pair, progress_bar, starting
from qad.recipe import Recipe
from qad.student import Masters
from qad.teacher import TeacherCache, build_cache
from qad.tensor import dequantize
from qad.train import Collator, QADTrainer, padding_id

_ROUNDED = "rounded.json"


def _measure_rounded(run: Path, student: PreTrainedModel, plan: Plan, trainer_measure: Any) -> Quality:
    """Return the figures of the student rounded to nearest; kept in the run folder for when it is resumed."""
    if (stored := _stored_rounded(run)) is not None:
        return stored
    rounded = copy.deepcopy(student)
    initialize(rounded, plan, "rtn")
    quality = trainer_measure(rounded)
    with replacing_file(run / _ROUNDED) as path:
        path.write_text(json.dumps(quality.to_dict()))
    return quality


def _stored_rounded(run: Path) -> Quality | None:
    """Return those figures if they were measured before; None if not, or if they were damaged, which is no loss."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Quality.of(json.loads((run / _ROUNDED).read_text()))
    return None


def _teacher_cache(
    recipe: Recipe, run: Path, teacher: LoadedModel, student: PreTrainedModel, rows: Dataset, console: Console
) -> TeacherCache | None:
    if not recipe.cache_top_k:
        return None
    collator = Collator(padding_id(teacher.tokenizer), recipe.loss_on)
    batches = (
        collator([rows[i] for i in range(start, min(start + recipe.micro_batch, len(rows)))])  # type: ignore[misc]
        for start in range(0, len(rows), recipe.micro_batch)
    )
    vocabulary = min(output_head(model).shape[0] for model in (teacher.model, student))
    with progress_bar(console, "teacher's top-k (sequences)", len(rows)) as update:
        return build_cache(
            run / "teacher_cache",
            teacher.model,
            batches,
            top_k=recipe.cache_top_k,
            key=model_fingerprint(teacher.model),
            vocabulary=vocabulary,
            on_progress=update,
        )


def distill(recipe: Recipe, run: Path, *, resume: bool, console: Console) -> Outcome:
    """Make, or continue, a run.

    Args:
        recipe: What to do.
        run: The run folder.
        resume: Continue what stands there; a finished run is only reported, an absent one is started.
        console: Where to tell.

    Raises:
        UserError: Bad input; nothing that stood in the folder is lost, and none is made for a run that cannot start.
    """
    with starting(recipe, run, resume) as finished:
        if finished:
            console.print(f"{run} is finished")
            return load_outcome(run)
        return _distill(recipe, run, console)


def _tell_kernels(device: torch.device, console: Console) -> None:
    reason = why_reference(device)
    console.print(f"kernels on {device}: {escape(describe(device))}", highlight=False)
    if reason is not None:
        console.print(
            "[bold yellow]WARNING[/]: fake quantization runs in plain torch, several times slower, with the same result"
        )


def _distill(recipe: Recipe, run: Path, console: Console) -> Outcome:
    if recipe.tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise UserError("--tensorboard needs a package: pip install 'qad[tensorboard]', or leave the option out")
    set_seed(recipe.seed)
    teacher, student = load_pair(recipe, console)
    taught = recipe.loss.needs_teacher
    plan = plan_from_recipe(recipe, run, student, console)
    train_rows, held_out_rows = gather_rows(recipe, run, teacher, console)
    plan = plan or measured_plan(recipe, student, calibration_tokens(train_rows, recipe), console)
    save_plan(plan, run, student, console)
    cache = _teacher_cache(recipe, run, teacher, student, train_rows, console)
    checkpoint = last_checkpoint(run)
    if checkpoint is not None:
        with console.status("checking the checkpoint"):
            check_checkpoint(checkpoint)
        console.print(f"continuing after step {checkpoint_step(checkpoint)} of {recipe.steps}", highlight=False)
    # Without a teacher the first row of the table is the model itself, before anything is rounded.
    fresh = not (taught and _stored_rounded(run) is not None)
    untrained = copy.deepcopy(student) if fresh else student
    # A checkpoint brings its own masters and scales: then any initialisation gives the right shapes.
    init = recipe.init if checkpoint is None else "rtn"
    quantized_names = [name for name, grid in plan.items() if grid != KEEP]
    with progress_bar(console, f"{init} rounding (tensors)", len(quantized_names)) as update:
        calibration = calibration_tokens(train_rows, recipe) if init == "gptq" else None
        start = initialize(student, plan, init, calibration, on_progress=update)
    masters = Masters(student, start, recipe.scales)
    del start
    _tell_kernels(masters.device, console)
    size = stored_bytes(student, plan)

    def keep_best(step: int, quality: Quality) -> None:
        forward = dict(student.named_parameters())
        quantized = masters.quantized()
        for name, tensor in quantized.items():
            weight = forward[name].detach().to("cpu", torch.float32)
            assert torch.equal(dequantize(tensor).cpu().view(torch.int32), weight.view(torch.int32)), name
        save_artifact(
            run,
            config=student.config,
            tokenizer=teacher.tokenizer,
            quantized=quantized,
            kept={name: forward[name] for name, grid in plan.items() if grid == KEEP},
            tied_head=is_tied(student),
            forward_sha256=masters.fingerprint(),
            recipe=recipe.to_dict(),
        )

    lengths = [len(ids) for ids in train_rows["input_ids"]]
    bar = ProgressBar(console, recipe.batch_size * sum(lengths) / len(lengths))
    trainer = QADTrainer(
        model=student,
        masters=masters,
        teacher=teacher.model if taught else None,
        tokenizer=teacher.tokenizer,
        recipe=recipe,
        run=run,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        cache=cache,
        on_best=keep_best,
        callbacks=[bar, JsonLog(run, None if checkpoint is None else checkpoint_step(checkpoint))],
    )
    whole_quality = trainer.measure_model(teacher.model if taught else untrained)
    rounded_quality = _measure_rounded(run, untrained, plan, trainer.measure_model)
    del untrained
    if checkpoint is None:
        trainer.evaluate()
        assert trainer.best is not None
        figure = (lambda quality: f"{quality.kl:.4g}") if taught else (lambda quality: f"{quality.perplexity:.4g}")
        console.print(
            f"held-out {'KL' if taught else 'perplexity'}: rounded to nearest {figure(rounded_quality)}, "
            f"after {init} {figure(trainer.best[1])}"
        )
    if checkpoint is not None and checkpoint_step(checkpoint) >= recipe.steps:
        trainer.restore(checkpoint)
    elif recipe.steps:
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            bar.stop()
    assert trainer.best is not None
    best_step, best = trainer.best
    whole_bytes = sum(parameter.numel() for parameter in teacher.model.parameters()) * 2
    outcome = Outcome(
        run,
        [
            (f"{'teacher' if taught else 'before'} (size at 16 bits)", whole_quality, whole_bytes),
            (f"rounded to {recipe.plan_label}, untrained", rounded_quality, size),
            (f"trained on the grid (step {best_step})", best, size),
        ],
        best_step,
    )
    outcome.save()
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    return outcome
