"""A run from recipe to artifact: load, gather text, initialise, train, keep the best, tell how it went.

RUN/
recipe.json          the resolved recipe
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from qad import interrupts
from qad.artifact import save_artifact
from qad.callbacks import JsonLog, ProgressBar
from qad.data.mix import default_mix
from qad.data.sources import read_data, split_held_out
from qad.data.tokenize import pack, tokenize_rows
from qad.errors import UserError
from qad.files import replacing_file
from qad.gptq_init import initialize
from qad.grid import get_grid
from qad.measure import Quality, output_head
from qad.model import LoadedModel, check_same_tokenizer, load_model, model_fingerprint
from qad.ops import describe, why_reference
from qad.plan import KEEP, Plan, is_tied, make_plan
from qad.recipe import RECIPE_FILE, Recipe, load_recipe
from qad.student import Masters
from qad.teacher import TeacherCache, build_cache
from qad.tensor import dequantize
from qad.train import CHECKPOINTS, Collator, QADTrainer, checkpoint_step, last_checkpoint, padding_id

RESULT_FILE = "result.json"


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: The run folder.
        rows: (what, quality, bytes) of the teacher, of the student rounded to nearest, and of the trained one.
        best_step: The optimizer step whose weights the artifact holds; 0 is the initialisation.
    """

    run: Path
    rows: list[tuple[str, Quality, int]]
    best_step: int

    @property
    def warning(self) -> str | None:
        """A sentence if training was of no use or did harm."""
        rounded, trained = self.rows[1][1], self.rows[2][1]
        if trained.kl > rounded.kl:
            return (
                f"training made things WORSE: KL {trained.kl:.4g} against {rounded.kl:.4g} of plain rounding. "
                "Lower --lr, use --init gptq, or give more varied text with --data."
            )
        if self.best_step == 0 and load_recipe(self.run).steps > 0:
            return (
                "no training step improved on the initialisation, which the artifact therefore holds. "
                "Lower --lr, or give more varied text with --data."
            )
        return None

    def save(self) -> None:
        """Write ``result.json``."""
        rows = [{"what": what, **quality.to_dict(), "bytes": size} for what, quality, size in self.rows]
        with replacing_file(self.run / RESULT_FILE) as path:
            path.write_text(json.dumps({"rows": rows, "best_step": self.best_step}, indent=1) + "\n")


def load_outcome(run: Path) -> Outcome:
    """Read ``result.json`` of a finished run.

    Raises:
        UserError: It is damaged.
    """
    file = run / RESULT_FILE
    try:
        values = json.loads(file.read_text())
        rows = [
            (row["what"], Quality(row["kl"], row["nll"], row["same_top1"], row["tokens"]), row["bytes"])
            for row in values["rows"]
        ]
        return Outcome(run, rows, values["best_step"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}), the artifact beside it need not be: export it, "
            "or delete the file and train again with --resume"
        ) from error


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Print the table teacher / rounded / trained, and the warning if there is one."""
    tokens = outcome.rows[0][1].tokens
    table = Table(title=f"held-out text, {tokens:,} tokens, against the teacher")
    for heading in ("", "KL", "perplexity", "same top-1", "size"):
        table.add_column(heading, justify="left" if not heading else "right")
    for what, quality, size in outcome.rows:
        table.add_row(
            what, f"{quality.kl:.4g}", f"{quality.perplexity:.3f}", f"{quality.same_top1:.1%}", f"{size / 1e6:.1f} MB"
        )
    console.print(table)
    if outcome.warning:
        console.print(f"[bold red]WARNING[/]: {outcome.warning}")


@contextlib.contextmanager
def _bar(console: Console, what: str, total: int | None) -> Iterator[Any]:
    """Yield ``update(done, total)`` of a progress bar."""
    columns = (
        TextColumn(f"[bold]{what}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)

        def update(done: int, of: int | None = total) -> None:
            interrupts.check()
            progress.update(task, completed=done, total=of)

        yield update


def prepare_folder(recipe: Recipe, run: Path, resume: bool) -> bool:
    """Check the run folder and write the recipe into it.

    Returns:
        Whether the run is finished already.

    Raises:
        UserError: The folder holds another run, or something that is no run.
    """
    if run.exists() and not run.is_dir():
        raise UserError(f"{run} is a file; name a folder for the run with -o")
    if (run / RECIPE_FILE).exists():
        if not resume:
            raise UserError(f"{run} holds another run: continue it with --resume, or name another folder with -o")
        stored, wanted = load_recipe(run).to_dict(), recipe.to_dict()
        changed = [f"{key} {stored[key]!r} -> {wanted[key]!r}" for key in wanted if stored[key] != wanted[key]]
        if changed:
            raise UserError(
                f"{run} was started with another recipe ({'; '.join(changed)}): resume it with the options it was "
                "started with, or name another folder with -o"
            )
        return (run / RESULT_FILE).exists()
    if run.is_dir() and any(run.iterdir()):
        raise UserError(f"{run} is not empty and holds no run; name another folder with -o")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {run} cannot be made ({error.strerror}); name another with -o") from error
    recipe.save(run)
    return False


def load_pair(recipe: Recipe, console: Console) -> tuple[LoadedModel, PreTrainedModel]:
    """Load teacher and student; say what there is to know about them.

    Raises:
        UserError: See ``model.load_model``; or their tokenizers differ.
    """
    with console.status(f"loading {recipe.teacher}"):
        teacher = load_model(recipe.teacher)
    for note in teacher.notes:
        console.print(f"teacher: {note}")
    if recipe.student_source == recipe.teacher:
        student = copy.deepcopy(teacher.model)
    else:
        with console.status(f"loading {recipe.student_source}"):
            loaded = load_model(recipe.student_source)
        for note in loaded.notes:
            console.print(f"student: {note}")
        check_same_tokenizer(teacher.tokenizer, loaded.tokenizer)
        student = loaded.model
    for model in (teacher.model, student):
        context = model.config.max_position_embeddings
        if recipe.seq_len > context:
            raise UserError(
                f"seq_len {recipe.seq_len} exceeds the {context} tokens that the model reads; use --seq-len"
            )
    if teacher.tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {teacher.source} names no end-of-text token, which parts the documents in training: set "
            "eos_token in its tokenizer_config.json"
        )
    teacher.model.requires_grad_(False)
    return teacher, student


def gather_rows(recipe: Recipe, run: Path, teacher: LoadedModel, console: Console) -> tuple[Dataset, Dataset]:
    """Return packed training and held-out rows.

    Raises:
        UserError: Missing, empty or unusable data.
    """
    if recipe.data:
        data = read_data(recipe.data, recipe.seed)
    else:
        with _bar(console, "text from the teacher (tokens)", recipe.mix_tokens) as update:
            mix = default_mix(
                teacher, tokens=recipe.mix_tokens, seed=recipe.seed, cache=run / "data", on_progress=update
            )
        for note in mix.notes:
            console.print(f"data: {note}")
        data = mix.rows
    tokens = sum(len(ids) for ids in tokenize_rows(data, teacher.tokenizer)["input_ids"])  # type: ignore[arg-type]
    share = min(0.5, recipe.held_out_tokens / max(tokens, 1))
    separator = teacher.tokenizer.eos_token_id
    parts = []
    for rows in split_held_out(data, share, recipe.seed):
        tokenized = tokenize_rows(rows, teacher.tokenizer)  # type: ignore[arg-type]
        parts.append(pack(tokenized, recipe.seq_len, separator, keep_remainder=bool(recipe.data)))  # type: ignore[arg-type]
    train, held_out = parts
    if recipe.loss_on == "completion" and not any(any(mask[1:]) for mask in held_out["completion_mask"]):
        raise UserError("no completion token in the held-out rows: --loss-on completion needs prompt/completion data")
    console.print(f"data: {len(train)} training and {len(held_out)} held-out sequences of {recipe.seq_len} tokens")
    return train, held_out


def stored_bytes(model: nn.Module, plan: Plan) -> int:
    """Return the bytes of a model's weights as stored under a plan, fp32 for what is kept."""
    bits = 0.0
    for name, parameter in model.named_parameters():
        if name in plan:
            bits += parameter.numel() * (32.0 if plan[name] == KEEP else get_grid(plan[name]).bits_per_weight)
    return round(bits / 8)


def _measure_rounded(recipe: Recipe, run: Path, student: PreTrainedModel, plan: Plan, trainer_measure: Any) -> Quality:
    """Return the figures of the student rounded to nearest; kept in the run folder for when it is resumed."""
    file = run / "rounded.json"
    if file.exists():
        return Quality(**json.loads(file.read_text()))
    rounded = copy.deepcopy(student)
    initialize(rounded, plan, "rtn")
    quality = trainer_measure(rounded)
    with replacing_file(file) as path:
        path.write_text(json.dumps(quality.__dict__))
    return quality


def _calibration(rows: Dataset, recipe: Recipe) -> Tensor:
    """Return training sequences [B, T] for the initialisation, all of one length."""
    length = min(recipe.seq_len, max(len(ids) for ids in rows["input_ids"]))
    whole = [ids for ids in rows["input_ids"] if len(ids) == length]
    return torch.tensor(whole[: max(1, recipe.calibration_tokens // length)])


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
    with _bar(console, "teacher's top-k (sequences)", len(rows)) as update:
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
    fresh = not (run / RECIPE_FILE).exists()
    if prepare_folder(recipe, run, resume):
        console.print(f"{run} is finished")
        return load_outcome(run)
    try:
        return _distill(recipe, run, console)
    except Exception:
        if fresh and [path.name for path in run.iterdir()] == [RECIPE_FILE]:
            # Else the corrected command would find another run in its folder.
            (run / RECIPE_FILE).unlink()
            with contextlib.suppress(OSError):
                run.rmdir()
        raise


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
    plan = make_plan(student, recipe.bits)
    train_rows, held_out_rows = gather_rows(recipe, run, teacher, console)
    cache = _teacher_cache(recipe, run, teacher, student, train_rows, console)
    checkpoint = last_checkpoint(run)
    untrained = copy.deepcopy(student) if not (run / "rounded.json").exists() else student
    # A checkpoint brings its own masters and scales: then any initialisation gives the right shapes.
    init = recipe.init if checkpoint is None else "rtn"
    quantized_names = [name for name, grid in plan.items() if grid != KEEP]
    with _bar(console, f"{init} rounding (tensors)", len(quantized_names)) as update:
        calibration = _calibration(train_rows, recipe) if init == "gptq" else None
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

    bar = ProgressBar(console, recipe.batch_size * recipe.seq_len)
    trainer = QADTrainer(
        model=student,
        masters=masters,
        teacher=teacher.model,
        tokenizer=teacher.tokenizer,
        recipe=recipe,
        run=run,
        train_rows=train_rows,
        held_out_rows=held_out_rows,
        cache=cache,
        on_best=keep_best,
        callbacks=[bar, JsonLog(run, None if checkpoint is None else checkpoint_step(checkpoint))],
    )
    teacher_quality = trainer.measure_teacher()
    rounded_quality = _measure_rounded(recipe, run, untrained, plan, trainer.measure_model)
    del untrained
    if checkpoint is None:
        trainer.evaluate()
        assert trainer.best is not None
        console.print(
            f"held-out KL: rounded to nearest {rounded_quality.kl:.4g}, after {init} {trainer.best[1].kl:.4g}"
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
    teacher_bytes = sum(parameter.numel() for parameter in teacher.model.parameters()) * 2
    outcome = Outcome(
        run,
        [
            ("teacher (size at 16 bits)", teacher_quality, teacher_bytes),
            (f"rounded to {recipe.bits} bits, untrained", rounded_quality, size),
            (f"trained on the grid (step {best_step})", best, size),
        ],
        best_step,
    )
    outcome.save()
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
    return outcome
