"""Tiny runs: a random model with a tokenizer in a folder, some text, and the parts of a trainer built by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from qad.gptq_init import initialize
from qad.measure import Quality
from qad.plan import Plan, make_plan
from qad.recipe import Recipe
from qad.student import Masters
from qad.train import QADTrainer
from tests.helpers_models import make_model, make_tokenizer, verify_text
from tests.helpers_rows import write_rows

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "head_dim": 32,
}


def tiny(case: str = "llama-tied", **changes: Any) -> PreTrainedModel:
    """Return a case of ``helpers_models`` made small, with weights large enough for layers to matter."""
    return make_model(case, **(SIZES | changes))


def save_model(folder: Path, case: str = "llama-tied", family: str = "smollm", **changes: Any) -> str:
    """Save a tiny model with its tokenizer; return the folder as ``--teacher`` takes it."""
    tiny(case, **changes).save_pretrained(folder)
    make_tokenizer(family).save_pretrained(folder)
    return str(folder)


def save_text(file: Path, characters: int = 300) -> str:
    """Save a page of text as rows of JSON Lines; return the file as ``--data`` takes it."""
    text = verify_text()
    parts = [text[start : start + characters] for start in range(0, len(text), characters)]
    return str(write_rows(file, [{"text": part} for part in parts]))


def save_chats(file: Path, count: int = 24) -> str:
    """Save prompt/completion rows."""
    rows = [{"prompt": f"What is {n} plus {n + 1}?", "completion": f"It is {2 * n + 1}."} for n in range(count)]
    return str(write_rows(file, rows))


def token_rows(count: int, length: int = 24, vocabulary: int = 600, seed: int = 0) -> Dataset:
    """Return rows of random tokens; the second half of each is its completion."""
    ids = torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(seed))
    return Dataset.from_dict(
        {
            "input_ids": ids.tolist(),
            "completion_mask": [[int(t >= length // 2) for t in range(length)]] * count,
            "sample_id": [f"{seed}-{n}" for n in range(count)],
        }
    )


@dataclass
class Parts:
    """A trainer and what it was made of."""

    trainer: QADTrainer
    student: PreTrainedModel
    teacher: Any
    masters: Masters
    plan: Plan
    best: list[tuple[int, Quality]]


def make_trainer(
    run: Path,
    recipe: Recipe,
    *,
    teacher: PreTrainedModel | None = None,
    student: PreTrainedModel | None = None,
    make_masters: Callable[..., Masters] = Masters,
    train_rows: Dataset | None = None,
    held_out_rows: Dataset | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    **options: Any,
) -> Parts:
    """Build a QADTrainer as ``qad.distill`` does, on random tokens unless rows are given."""
    if recipe.loss.needs_teacher:
        teacher = tiny() if teacher is None else teacher
        teacher.requires_grad_(False)
    student = tiny() if student is None else student
    plan = make_plan(student, recipe.bits)
    masters = make_masters(student, initialize(student, plan, "rtn"), recipe.scales)
    best: list[tuple[int, Quality]] = []
    trainer = QADTrainer(
        model=student,
        masters=masters,
        teacher=teacher,
        tokenizer=make_tokenizer("smollm") if tokenizer is None else tokenizer,
        recipe=recipe,
        run=run,
        train_rows=token_rows(16) if train_rows is None else train_rows,
        held_out_rows=token_rows(4, seed=1) if held_out_rows is None else held_out_rows,
        on_best=lambda step, quality: best.append((step, quality)),
        **{"callbacks": [], **options},
    )
    return Parts(trainer, student, teacher, masters, plan, best)
