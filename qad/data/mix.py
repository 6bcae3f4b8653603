"""The default mix, made offline: worked word problems, instructions that the teacher answers, and its own free text.

A student trained by KL on one narrow text fits that text and gains less elsewhere, so the mix is broad on purpose. By
tokens: a fifth chains of reasoning-gym's ``gsm_symbolic``, in three formats; two fifths answers to instructions of many
kinds; two fifths documents that the teacher writes from short openings. What a teacher says under sampling is also where
its student will find itself when it generates. No text of any evaluation is used.
"""

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from qad.data.generate import sample_from_teacher
from qad.data.prompts import instruction_prompts, text_openings
from qad.data.rows import Row, chat_row, text_row
from qad.data.sources import rows_to_dataset
from qad.errors import UserError
from qad.files import replacing_file
from qad.model import LoadedModel, model_fingerprint

CHAIN_SHARE = 0.2
NEW_TOKENS = 256
TEMPERATURE = 0.9
TOP_P = 0.95
# A sampled answer shorter than this (in characters) says nothing.
_SHORTEST = 20
_FORM = " Give the result as your final answer. Do not include units."
_FORMATS = (
    "Question: {question}\nAnswer: {worked}",
    "{question}\n\n{worked}",
    "Problem: {question}\n\nSolution: {worked}",
    "Q: {question}\nA: {worked}",
)


@dataclass(frozen=True)
class Mix:
    """The rows, and sentences for the log."""

    rows: Dataset
    notes: list[str]


def _chains(wanted: int, count: Callable[[Row], int], seed: int) -> list[Row]:
    """Return worked word problems until their tokens are enough: a third each as reasoning, as chat, as plain text."""
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise UserError(
            "the default data needs the package reasoning-gym: run `pip install 'qad[demo]'` or give data with --data"
        ) from error
    draw = random.Random(seed)
    size = max(16, wanted // 60)  # a problem and its chain take more than 60 tokens, so these suffice
    problems = create_dataset("gsm_symbolic", seed=seed, size=size)
    rows: list[Row] = []
    tokens = 0
    for number in range(size):
        item = problems[number]
        question, answer = " ".join(item["question"].split()), str(item["answer"])
        worked = str(item["metadata"]["answer_cot"]).split("####")[0].strip()
        if number % 3 == 2:
            # This request about the form belongs into a chat; a page of worked problems would not carry it.
            question = question.removesuffix(_FORM)
        if number % 3 == 0:
            steps = "\n\n".join(line for line in worked.splitlines() if line.strip())
            row = chat_row(question, f"<think>\n{steps}\n</think>\n\\boxed{{{answer}}}")
        elif number % 3 == 1:
            row = chat_row(question, f"{worked}\nThe answer is {answer}.")
        else:
            row = text_row(draw.choice(_FORMATS).format(question=question, worked=f"{worked}\nThe answer is {answer}."))
        rows.append(row)
        tokens += count(row)
        if tokens >= wanted:
            break
    return rows


def _cache_file(cache: Path, teacher: LoadedModel, seed: int, tokens: int, prompts: list[str]) -> Path:
    """Return where the sampled rows of these very settings are kept."""
    settings = [model_fingerprint(teacher.model), seed, tokens, NEW_TOKENS, TEMPERATURE, TOP_P, prompts]
    return cache / f"mix-{hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]}.jsonl"


def default_mix(
    teacher: LoadedModel,
    *,
    tokens: int = 80_000,
    seed: int = 0,
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Mix:
    """Return the default training rows, shuffled, made from installed packages and the teacher alone.

    Args:
        teacher: Who answers and writes.
        tokens: About how many tokens, counted with its tokenizer, prompts included.
        seed: Of the prompts, the problems and the sampling.
        cache: Folder in which sampled rows are kept (as JSON Lines) and found again; None keeps none.
        on_progress: Called with (tokens drawn, tokens expected), from any thread.

    Raises:
        UserError: reasoning-gym is not installed, or the teacher has no chat template.
    """
    tokenizer = teacher.tokenizer
    if tokenizer.chat_template is None:
        raise UserError(f"{teacher.source} has no chat template, which the default data needs: give data with --data")

    def count(row: Row) -> int:
        text = row["text"] if row["text"] is not None else row["prompt"][0]["content"] + row["completion"][0]["content"]
        return len(tokenizer.encode(text))

    chain_tokens = round(tokens * CHAIN_SHARE)
    rows = _chains(chain_tokens, count, seed)
    # A question and a document take more than 60 tokens, so the prompts do not run out before the tokens are drawn.
    pairs = max(16, tokens // 120)
    questions, openings = instruction_prompts(pairs, seed), text_openings(pairs, seed)
    file = None if cache is None else _cache_file(cache, teacher, seed, tokens, questions + openings)
    if file is not None and file.is_file():
        with file.open(encoding="utf-8") as lines:
            sampled = [json.loads(line) for line in lines]
        notes = [f"reused {len(sampled)} rows sampled from this teacher before ({file})"]
    else:
        sampled, note = _sample(teacher, questions, openings, tokens - chain_tokens, seed, on_progress)
        notes = [note]
        if file is not None:
            with replacing_file(file) as temporary:
                temporary.write_text("".join(json.dumps(row) + "\n" for row in sampled), encoding="utf-8")
    rows += sampled
    random.Random(seed).shuffle(rows)
    total = sum(count(row) for row in rows)
    notes.append(f"default mix: {len(rows)} rows, {total} tokens ({len(rows) - len(sampled)} worked problems)")
    return Mix(rows_to_dataset(rows), notes)


def _sample(
    teacher: LoadedModel,
    questions: list[str],
    openings: list[str],
    wanted: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[list[Row], str]:
    """Return the rows that the teacher makes of questions and openings, and a note."""
    asked = [
        str(
            teacher.tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        )
        for question in questions
    ]
    # In turn, because both kinds take about as many tokens each, and in one call, because a batch pays off when it is
    # full for long.
    prompts = [prompt for pair in zip(asked, openings, strict=True) for prompt in pair]
    samples = sample_from_teacher(
        teacher,
        prompts,
        new_tokens=NEW_TOKENS,
        temperature=TEMPERATURE,
        top_p=TOP_P,
        seed=seed,
        wanted_tokens=wanted,
        on_progress=None if on_progress is None else lambda tokens: on_progress(tokens, wanted),
    )
    rows: list[Row] = []
    for number, answer in enumerate(samples.texts):
        if answer is None:
            continue
        if number % 2 == 0 and len(answer) >= _SHORTEST:
            rows.append(chat_row(questions[number // 2], answer))
        elif number % 2 and len(document := openings[number // 2] + answer) >= _SHORTEST:
            rows.append(text_row(document))
    return rows, samples.note
