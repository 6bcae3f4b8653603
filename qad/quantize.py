"""An artifact without training: a model rounded under a plan, as good as its initialisation makes it.

The run folder is one that every other verb takes. What a student would start from is seen before any step is paid for;
where that is good enough, it is the result.
"""

from pathlib import Path

import torch
from datasets import Dataset
from rich.console import Console
from transformers import PreTrainedTokenizerBase, set_seed

from qad.artifact import save_artifact, tensor_sha256
from qad.gptq_init import initialize
from qad.measure import Batch, measure
from qad.outcome import Outcome, load_outcome
from qad.plan import KEEP, is_tied, stored_bytes
from qad.planning import measured_plan, plan_from_recipe, save_plan
from qad.prepare import calibration_tokens, gather_rows, load_pair, progress_bar, starting
from qad.recipe import Recipe
from qad.tensor import dequantize
from qad.train import Collator, padding_id


def quantize_model(recipe: Recipe, run: Path, *, resume: bool, console: Console) -> Outcome:
    """Make, or continue, a run that only rounds.

    Args:
        recipe: What to do; of training it needs nothing.
        run: The run folder.
        resume: Continue what stands there; sampled text and a measured plan are not made again.
        console: Where to tell.

    Raises:
        UserError: Bad input; nothing that stood in the folder is lost, and none is made for a run that cannot start.
    """
    with starting(recipe, run, resume) as finished:
        if finished:
            console.print(f"{run} is finished")
            return load_outcome(run)
        return _quantize_model(recipe, run, console)


def held_out_batches(rows: Dataset, recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """Return the batches that a model is measured on."""
    collator = Collator(padding_id(tokenizer), recipe.loss_on)
    starts = range(0, len(rows), recipe.micro_batch)
    return [collator(list(rows.select(range(s, min(s + recipe.micro_batch, len(rows)))))) for s in starts]  # type: ignore[arg-type]


def _quantize_model(recipe: Recipe, run: Path, console: Console) -> Outcome:
    set_seed(recipe.seed)
    teacher, student = load_pair(recipe, console)
    plan = plan_from_recipe(recipe, run, student, console)
    train_rows, held_out_rows = gather_rows(recipe, run, teacher, console)
    calibration = calibration_tokens(train_rows, recipe)
    plan = plan or measured_plan(recipe, student, calibration, console)
    save_plan(plan, run, student, console)
    quantized_names = [name for name, grid in plan.items() if grid != KEEP]
    with progress_bar(console, f"{recipe.init} rounding (tensors)", len(quantized_names)) as update:
        rounded = initialize(student, plan, recipe.init, calibration, on_progress=update)
    batches = held_out_batches(held_out_rows, recipe, teacher.tokenizer)
    with console.status("measuring"):
        teacher_quality = measure(teacher.model, teacher.model, batches)
        quality = measure(student, teacher.model, batches)
    # The very tensors that the measurement multiplied with.
    forward = dict(student.named_parameters())
    for name, of in rounded.items():
        bits = dequantize(of.quantized).view(torch.int32)
        assert torch.equal(bits, forward[name].detach().view(torch.int32)), name
    save_artifact(
        run,
        config=student.config,
        tokenizer=teacher.tokenizer,
        quantized={name: of.quantized for name, of in rounded.items()},
        kept={name: forward[name] for name, grid in plan.items() if grid == KEEP},
        tied_head=is_tied(student),
        forward_sha256={name: tensor_sha256(forward[name]) for name in rounded},
        recipe=recipe.to_dict(),
    )
    teacher_bytes = sum(parameter.numel() for parameter in teacher.model.parameters()) * 2
    outcome = Outcome(
        run,
        [
            ("teacher (size at 16 bits)", teacher_quality, teacher_bytes),
            (f"quantized to {recipe.plan_label} ({recipe.init})", quality, stored_bytes(student, plan)),
        ],
        0,
    )
    outcome.save()
    return outcome
