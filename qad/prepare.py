"""What comes before any weight is rounded: the run folder, the models, the text."""

import contextlib
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel

from qad import interrupts
from qad.data.mix import default_mix
from qad.data.sources import read_data, read_source, shuffled, split_held_out
from qad.data.tokenize import end_rows, pack, tokenize_rows
from qad.data.worked import worked_rows
from qad.errors import UserError
from qad.files import is_dropping
from qad.model import LoadedModel, check_same_tokenizer, load_model
from qad.outcome import RESULT_FILE
from qad.recipe import RECIPE_FILE, Recipe, load_recipe


@contextlib.contextmanager
def progress_bar(console: Console, what: str, total: int | None) -> Iterator[Any]:
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
        changed = [
            "the rules of the plan" if key == "rules" else f"{key} {stored[key]!r} -> {wanted[key]!r}"
            for key in wanted
            if stored[key] != wanted[key]
        ]
        if changed:
            raise UserError(
                f"{run} was started with another recipe ({'; '.join(changed)}): resume it with the options it was "
                "started with, or name another folder with -o"
            )
        return (run / RESULT_FILE).exists()
    if run.is_dir() and not all(map(is_dropping, run.iterdir())):
        raise UserError(f"{run} is not empty and holds no run; name another folder with -o")
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the run folder {run} cannot be made ({error.strerror}); name another with -o") from error
    recipe.save(run)
    return False


@contextlib.contextmanager
def starting(recipe: Recipe, run: Path, resume: bool) -> Iterator[bool]:
    """Prepare the run folder, yield whether the run is finished already, and leave no folder if it cannot start.

    Raises:
        UserError: See ``prepare_folder``.
    """
    fresh = not (run / RECIPE_FILE).exists()
    finished = prepare_folder(recipe, run, resume)
    try:
        yield finished
    except Exception:
        if fresh and [path.name for path in run.iterdir() if not is_dropping(path)] == [RECIPE_FILE]:
            # Else the corrected command would find another run in its folder.
            (run / RECIPE_FILE).unlink()
            with contextlib.suppress(OSError):
                run.rmdir()
        raise


def load_pair(recipe: Recipe, console: Console) -> tuple[LoadedModel, PreTrainedModel]:
    """Load teacher and student; say what there is to know about them.

    If the loss has no divergence in it there is no teacher: both are the student then, loaded once and not copied.

    Raises:
        UserError: See ``model.load_model``; or their tokenizers differ.
    """
    taught = recipe.loss.needs_teacher
    first = recipe.teacher if taught else recipe.student_source
    with console.status(f"loading {first}"):
        teacher = load_model(first)
    for note in teacher.notes:
        console.print(f"{'teacher' if taught else 'student'}: {note}")
    if not taught:
        student = teacher.model
    elif recipe.student_source == recipe.teacher:
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
    if taught:
        teacher.model.requires_grad_(False)
    return teacher, student


def gather_rows(recipe: Recipe, run: Path, teacher: LoadedModel, console: Console) -> tuple[Dataset, Dataset]:
    """Return training and held-out rows, packed or each of its own length.

    Raises:
        UserError: Missing, empty or unusable data.
    """
    if recipe.tasks:
        worked = worked_rows(recipe.tasks, recipe.task_rows, recipe.seed)
        for note in worked.notes:
            console.print(f"data: {note}")
        data = shuffled([*worked.rows, *(row for source in recipe.data for row in read_source(source))], recipe.seed)
    elif recipe.data:
        data = read_data(recipe.data, recipe.seed)
    elif not recipe.loss.needs_teacher:
        raise UserError("with kl_weight 0 there is no teacher to sample text from: give --data or --tasks")
    else:
        with progress_bar(console, "text from the teacher (tokens)", recipe.mix_tokens) as update:
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
        keep = bool(recipe.data or recipe.tasks)
        if recipe.packed:
            parts.append(pack(tokenized, recipe.seq_len, separator, keep_remainder=keep))  # type: ignore[arg-type]
        else:
            parts.append(end_rows(tokenized, recipe.seq_len, separator))  # type: ignore[arg-type]
            if left_out := len(tokenized) - len(parts[-1]):
                console.print(f"data: {left_out} rows are longer than --seq-len {recipe.seq_len} and left out")
    train, held_out = parts
    if recipe.loss_on == "completion" and not any(any(mask[1:]) for mask in held_out["completion_mask"]):
        raise UserError("no completion token in the held-out rows: --loss-on completion needs prompt/completion data")
    upto = "" if recipe.packed else "up to "
    console.print(
        f"data: {len(train)} training and {len(held_out)} held-out sequences of {upto}{recipe.seq_len} tokens"
    )
    return train, held_out


def calibration_tokens(rows: Dataset, recipe: Recipe) -> Tensor:
    """Return training sequences [B, T] for the initialisation, all of one length."""
    if not recipe.packed:
        stream = list(itertools.islice(itertools.chain.from_iterable(rows["input_ids"]), recipe.calibration_tokens))
        length = min(recipe.seq_len, len(stream))
        return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    length = min(recipe.seq_len, max(len(ids) for ids in rows["input_ids"]))
    whole = [ids for ids in rows["input_ids"] if len(ids) == length]
    return torch.tensor(whole[: max(1, recipe.calibration_tokens // length)])
