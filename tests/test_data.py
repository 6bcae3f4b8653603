"""Data: every way in gives the same rows, every bad input one clear error; packing loses no token; sampling repeats."""

import copy
import gzip
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from qad.data.generate import draw, sample_from_teacher, token_id
from qad.data.mix import default_mix
from qad.data.prompts import instruction_prompts, text_openings
from qad.data.rows import chat_row, text_row, with_id
from qad.data.sources import read_data, read_source, rows_to_dataset, split_held_out
from qad.data.tokenize import FEATURES, pack, tokenize_rows
from qad.errors import UserError
from qad.model import LoadedModel
from tests.helpers_models import MODELS, make_model, make_tokenizer

CHAT = {
    "prompt": [{"role": "user", "content": "Two and two?"}],
    "completion": [{"role": "assistant", "content": "Four."}],
}
RECORDS = [{"text": "Plain words."}, CHAT, {"prompt": "Say hi.", "completion": "Hi.", "meta": 3}]


def _write(path: Path, records: list[Any]) -> str:
    text = "".join(json.dumps(record) + "\n" for record in records)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    else:
        path.write_text(json.dumps(records) if path.suffix == ".json" else text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_json_files_of_every_kind(tmp_path: Path, name: str) -> None:
    rows = read_source(_write(tmp_path / name, RECORDS))
    assert rows == [text_row("Plain words."), with_id(CHAT), chat_row("Say hi.", "Hi.")]


def test_json_lines_under_the_name_json_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert [row["text"] for row in read_source(str(tmp_path / "a.json"))] == ["one", "two"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    _write(file, RECORDS)
    marked = b"\xef\xbb\xbf" + (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())
    file.write_bytes(gzip.compress(marked) if file.suffix == ".gz" else marked)
    assert read_source(str(file)) == [text_row("Plain words."), with_id(CHAT), chat_row("Say hi.", "Hi.")]


@pytest.mark.parametrize("records", [RECORDS[:1], [CHAT], RECORDS[2:]])
def test_parquet_files(tmp_path: Path, records: list[Any]) -> None:
    as_json = read_source(_write(tmp_path / "a.jsonl", records))
    assert read_source(_write(tmp_path / "a.parquet", records)) == as_json


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.jsonl is empty"),
        ("\n\n", "a.jsonl is empty"),
        ('{"text": "a"}\n{"text": \n', r"a.jsonl, line 2: invalid JSON"),
        ('{"text": "a"}\n[1]\n', "row 2 is list, not an object"),
        (
            '{"question": "a", "answer": "b"}\n',
            "wrong columns: found question, answer; expected `text`, or `prompt` and",
        ),
        ('{"prompt": "a"}\n', "wrong columns: found prompt"),
        ('{"text": "a"}\n{"text": 7}\n', "row 2: `text` is int; expected a string"),
        ('{"text": null}\n', "row 1: `text` is null"),
        ('{"prompt": 3, "completion": "b"}\n', "row 1: `prompt` is int"),
        ('{"prompt": "a", "completion": []}\n', "row 1: `completion` is list"),
        ('{"prompt": [{"role": "user"}], "completion": "b"}\n', "row 1: `prompt` holds a message that is not"),
        ('{"prompt": ["hi"], "completion": "b"}\n', "row 1: `prompt` holds a message that is not"),
        ('{"text": "a"}\n{"text": "b \\ud800"}\n', r"row 2 holds half of a surrogate pair \('\\ud800'\)"),
        ('{"prompt": "a", "completion": "\\udc00"}\n', "row 1 holds half of a surrogate pair"),
        ('{"text": "a"}\n' + "[" * 200_000 + "\n", "line 2: JSON that cannot be taken in"),
        ('{"text": ' + "9" * 5000 + "}\n", "line 1: JSON that cannot be taken in"),
    ],
)
def test_bad_json_lines(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=message):
        read_source(str(tmp_path / "a.jsonl"))


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.jsonl does not exist"):
        read_source(str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="is a folder"):
        read_source(str(tmp_path))
    (tmp_path / "a.csv").write_text("text\nhi\n")
    with pytest.raises(UserError, match=r"unknown format: give .jsonl"):
        read_source(str(tmp_path / "a.csv"))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "\xff\xfe"}\n')
    with pytest.raises(UserError, match="not UTF-8"):
        read_source(str(tmp_path / "a.jsonl"))
    (tmp_path / "a.json").write_text('[{"text": "a"},\n{]')
    with pytest.raises(UserError, match="line 2: invalid JSON"):
        read_source(str(tmp_path / "a.json"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:30])
    with pytest.raises(UserError, match="cannot be read"):
        read_source(str(tmp_path / "a.jsonl.gz"))
    damaged = bytearray(gzip.compress(b'{"text": "a"}\n' * 999))
    damaged[10] ^= 0xFF
    (tmp_path / "a.jsonl.gz").write_bytes(damaged)
    with pytest.raises(UserError, match="cannot be read"):
        read_source(str(tmp_path / "a.jsonl.gz"))
    (tmp_path / "a.json").write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(UserError, match="not UTF-8"):
        read_source(str(tmp_path / "a.json"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="truncated or not a Parquet file"):
        read_source(str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match="wrong columns: found question; expected `text`"):
        read_source(_write(tmp_path / "b.parquet", [{"question": "a"}]))
    with pytest.raises(UserError, match="every text is blank"):
        read_data([_write(tmp_path / "b.jsonl", [{"text": " \n"}])])


def test_hub_data_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # An address where nothing listens stands for a machine without network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        UserError, match=r"'someone/no-such-data:main@test' is not a file here, and the Hugging Face hub"
    ):
        read_source("someone/no-such-data:main@test")
    with pytest.raises(UserError, match="neither a file here nor a possible hub data set id"):
        read_source("no such name")


def test_sources_are_mixed_and_shuffled_by_the_seed(tmp_path: Path) -> None:
    first = _write(tmp_path / "a.jsonl", [{"text": f"a {i}"} for i in range(30)])
    second = _write(tmp_path / "b.jsonl", [CHAT])
    data = read_data([first, second], seed=1)
    assert len(data) == 31
    assert data["sample_id"][:] == read_data([first, second], seed=1)["sample_id"][:]
    other = read_data([first, second], seed=2)
    assert data["sample_id"][:] != other["sample_id"][:]
    assert set(data["sample_id"]) == set(other["sample_id"])
    assert all(len(name) == 16 for name in data["sample_id"])


def test_held_out_rows_are_not_in_the_training_rows() -> None:
    rows = [text_row(f"Text {i}") for i in range(20)]
    rows += [text_row(f"text   {i}\n") for i in range(20)]  # the same texts, written otherwise
    rows += [chat_row("Who?", answer) for answer in ("I.", "You.", "They.")]
    train, held = split_held_out(rows_to_dataset(rows), 0.3, seed=5)
    assert len(held) == 7  # of 21 distinct ones, rounded up
    texts = [{" ".join(str(r["text"] or r["prompt"]).lower().split()) for r in part} for part in (train, held)]  # type: ignore[index]
    assert not texts[0] & texts[1]
    assert len(texts[0]) + len(texts[1]) == 21
    again = split_held_out(rows_to_dataset(rows[::-1]), 0.3, seed=5)[1]
    assert {" ".join(str(r["text"] or r["prompt"]).lower().split()) for r in again} == texts[1]  # type: ignore[index]
    with pytest.raises(UserError, match="fewer than two different rows"):
        split_held_out(rows_to_dataset([text_row("a"), text_row("A ")]), 0.3)


def test_conversations_are_masked_and_texts_are_not(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = tokenize_rows([text_row("Three pears."), chat_row("Two and two?", "Four.")], tiny_tokenizer)
    text, chat = rows[0], rows[1]
    assert tiny_tokenizer.decode(text["input_ids"]) == "Three pears."
    assert set(text["completion_mask"]) == {1}
    answer = [i for i, m in zip(chat["input_ids"], chat["completion_mask"], strict=True) if m]
    question = chat["input_ids"][: -len(answer)]
    assert tiny_tokenizer.decode(answer) == "Four.<|im_end|>\n"
    assert tiny_tokenizer.decode(question) == "<|im_start|>user\nTwo and two?<|im_end|>\n<|im_start|>assistant\n"
    cut = tokenize_rows([chat_row("Two and two?", "Four.")], tiny_tokenizer, seq_len=9)
    assert cut[0]["input_ids"] == chat["input_ids"][:9]
    assert len(cut[0]["completion_mask"]) == 9


def test_a_chat_template_that_cannot_be_rendered(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    broken = copy.deepcopy(tiny_tokenizer)
    broken.chat_template = "{% for message in %}"
    with pytest.raises(UserError, match="chat template cannot be rendered"):
        tokenize_rows([chat_row("Two and two?", "Four.")], broken)
    assert len(tokenize_rows([text_row("Three pears.")], broken)) == 1


def test_tokenizing_bad_rows(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="every row is empty"):
        tokenize_rows([text_row("")], tiny_tokenizer)
    bare = make_tokenizer("smollm")
    template, bare.chat_template = bare.chat_template, None
    try:
        with pytest.raises(UserError, match="no chat template"):
            tokenize_rows([chat_row("a", "b")], bare)
        bare.chat_template = "{{ messages | length }}{{ messages[0].content }}"
        with pytest.raises(UserError, match="rewrites the prompt"):
            tokenize_rows([chat_row("a", "b")], bare)
    finally:
        bare.chat_template = template


@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    seq_len=st.integers(2, 24),
    keep=st.booleans(),
)
def test_packing_loses_no_token(lengths: list[int], seq_len: int, keep: bool) -> None:
    separator = 0
    documents = [[number + 1] * length for number, length in enumerate(lengths)]
    rows = Dataset.from_dict(
        {
            "input_ids": documents,
            "completion_mask": [[number % 2] * len(d) for number, d in enumerate(documents)],
            "sample_id": [str(number) for number in range(len(documents))],
        },
        features=FEATURES,
    )
    packed = pack(rows, seq_len, separator, keep_remainder=keep)
    stream = [token for document in documents for token in (*document, separator)]
    found = [token for ids in packed["input_ids"] for token in ids]
    masks = [bit for mask in packed["completion_mask"] for bit in mask]
    assert found == stream[: len(found)]
    assert masks == [1 if token == separator else (token - 1) % 2 for token in found]
    assert all(len(ids) == seq_len for ids in packed["input_ids"][:-1])
    if keep or len(stream) < seq_len:
        assert len(found) == len(stream)
    else:
        assert len(stream) - len(found) < seq_len
    assert len(set(packed["sample_id"])) == len(packed)
    assert packed["sample_id"][:] == pack(rows, seq_len, separator, keep_remainder=keep)["sample_id"][:]


def test_packing_does_not_double_the_end_of_a_document() -> None:
    rows = Dataset.from_dict(
        {"input_ids": [[5, 9], [6]], "completion_mask": [[1, 1], [1]], "sample_id": ["a", "b"]}, features=FEATURES
    )
    assert pack(rows, 8, separator=9)["input_ids"][0] == [5, 9, 6, 9]


def test_prompts_are_many_distinct_and_repeatable() -> None:
    prompts = instruction_prompts(2000, seed=3)
    assert len(set(prompts)) == 2000
    assert prompts == instruction_prompts(2000, seed=3)
    assert prompts != instruction_prompts(2000, seed=4)
    openings = text_openings(500, seed=3)
    assert len(openings) == 500
    assert "" in openings
    assert not any("{" in prompt for prompt in openings)


@pytest.fixture(scope="module")
def teacher() -> LoadedModel:
    return LoadedModel(make_model("llama-tied"), make_tokenizer("smollm"), "made here")


def test_sampling_repeats_and_obeys_its_limits(teacher: LoadedModel) -> None:
    prompts = ["", "One pear", "Three apples and four pears make", "<|im_start|>user\nHi<|im_end|>\n"] * 3
    counts: list[int] = []
    options: dict[str, Any] = {"new_tokens": 24, "batch_size": 3, "seed": 7}
    state = torch.get_rng_state()
    first = sample_from_teacher(teacher, prompts, on_progress=counts.append, **options)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.texts == sample_from_teacher(teacher, prompts, **options).texts
    assert first.texts != sample_from_teacher(teacher, prompts, **{**options, "seed": 8}).texts
    assert len(first.texts) == len(prompts)
    assert all(text is not None for text in first.texts)
    assert 0 < first.tokens <= 24 * len(prompts)
    assert all(before <= after for before, after in pairwise(counts))
    assert f"sampled {first.tokens} tokens" in first.note
    # The same prompt three times with draws of its own each time.
    assert len({first.texts[2], first.texts[6], first.texts[10]}) == 3


def test_sampling_stops_at_the_wanted_tokens(teacher: LoadedModel) -> None:
    prompts = ["Three apples"] * 400
    samples = sample_from_teacher(teacher, prompts, new_tokens=20, wanted_tokens=600, batch_size=4)
    assert any(text is None for text in samples.texts)
    assert 300 < samples.tokens < 1200


def test_a_failing_callback_ends_the_sampling(teacher: LoadedModel) -> None:
    def fail(tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample_from_teacher(teacher, ["a"] * 50, new_tokens=50, batch_size=2, on_progress=fail)


@pytest.mark.parametrize("case", ["llama-tied", "qwen2", "qwen3"])
def test_cold_sampling_is_greedy_decoding(case: str) -> None:
    """Padding, pieces of a prompt, and sequences that leave the batch early change no token."""
    teacher = LoadedModel(make_model(case), make_tokenizer(MODELS[case].tokenizer), "made here")
    prompts = [
        "Three apples and",
        "One",
        "The keeper had 42 boats and 17 cats, and he counted them all.",
        "We",
        "It is",
    ]

    def greedy(prompt: str, stop: set[int]) -> list[int]:
        ids = teacher.tokenizer.encode(prompt)
        new: list[int] = []
        while len(new) < 12:
            token = int(teacher.model(torch.tensor([ids + new])).logits[0, -1].argmax())
            if token in stop:
                break
            new.append(token)
        return new

    with torch.inference_mode():
        # What the first prompt's fourth token is ends a text: that sequence leaves the batch early.
        stop = {token_id(teacher.tokenizer, teacher.tokenizer.eos_token), greedy(prompts[0], set())[3]}
        expected = [str(teacher.tokenizer.decode(greedy(p, stop), skip_special_tokens=True)) for p in prompts]
    assert teacher.model.generation_config is not None
    teacher.model.generation_config.eos_token_id = sorted(stop)  # type: ignore[assignment]
    for batch_size in (2, 5):
        found = sample_from_teacher(teacher, prompts, new_tokens=12, temperature=1e-5, batch_size=batch_size)
        assert found.texts == expected, batch_size


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    chances_B = (torch.arange(1000) + 0.5) / 1000
    tokens = draw(logits.expand(1000, 4), chances_B, temperature=1.0, top_p=0.9)
    # The nucleus of 0.9 is the first three tokens, and they share what the fourth loses.
    shares = torch.bincount(tokens, minlength=4) / 1000
    torch.testing.assert_close(shares, torch.tensor([0.526, 0.316, 0.158, 0.0]), atol=1.1e-3, rtol=0)
    assert set(draw(logits.expand(1000, 4), chances_B, temperature=1.0, top_p=0.4).tolist()) == {0}
    sharper = draw(logits.expand(1000, 4), chances_B, temperature=0.5, top_p=1.0)
    assert (sharper == 0).float().mean() == pytest.approx(0.25 / 0.365, abs=1e-2)


def test_default_mix_holds_every_kind_and_is_found_again(teacher: LoadedModel, tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    progress: list[tuple[int, int]] = []
    report: Callable[[int, int], None] = lambda done, of: progress.append((done, of))  # noqa: E731
    mix = default_mix(teacher, tokens=6000, seed=1, cache=tmp_path, on_progress=report)
    rows = [dict(row) for row in mix.rows]  # type: ignore[call-overload]
    answers = [row["completion"][0]["content"] for row in rows if row["text"] is None]
    assert any(answer.startswith("<think>\n") and "</think>\n\\boxed{" in answer for answer in answers)
    assert any("\nThe answer is " in answer for answer in answers)
    assert any(row["text"] is not None for row in rows)
    assert progress[-1][0] <= progress[-1][1] * 1.5
    again = default_mix(teacher, tokens=6000, seed=1, cache=tmp_path)
    assert again.rows["sample_id"][:] == mix.rows["sample_id"][:]
    assert "reused" in again.notes[0]
    assert len(list(tmp_path.iterdir())) == 1
    other = default_mix(teacher, tokens=6000, seed=2, cache=tmp_path)
    assert other.rows["sample_id"][:] != mix.rows["sample_id"][:]


def test_default_mix_needs_a_chat_template() -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer("smollm").backend_tokenizer)
    with pytest.raises(UserError, match="no chat template"):
        default_mix(LoadedModel(make_model("llama-tied"), bare, "a model"), tokens=100)
