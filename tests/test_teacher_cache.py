"""The teacher's top-k on disk: keyed by sample, whole or not there, as good as the live teacher."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qad.errors import UserError
from qad.losses import CachedTeacher, LiveTeacher, LossSettings, chunked_distillation
from qad.measure import last_hidden, output_head
from qad.recipe import Recipe
from qad.teacher import TeacherCache, build_cache
from qad.train import Collator
from tests.helpers_runs import make_trainer, tiny, token_rows

VOCABULARY = 600


def batches(count: int = 10, size: int = 3, length: int = 24, ragged: bool = True) -> list[dict[str, Any]]:
    """Return batches of rows, some of which are shorter than their batch."""
    rows = [dict(row) for row in token_rows(count, length)]  # type: ignore[call-overload]
    for number, row in enumerate(rows):
        cut = length - 5 * (number % 3) if ragged else length
        row["input_ids"], row["completion_mask"] = row["input_ids"][:cut], row["completion_mask"][:cut]
    collator = Collator(0, "all")
    return [collator(rows[start : start + size]) for start in range(0, count, size)]


def build(folder: Path, teacher: Any, data: list[dict[str, Any]], **changes: Any) -> TeacherCache:
    return build_cache(folder, teacher, data, **{"top_k": 8, "key": "tiny", "vocabulary": VOCABULARY, **changes})


def live_log_probs(teacher: Any, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return teacher(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_lookup_gives_the_teacher_s_likeliest_tokens(tmp_path: Path, order: list[int]) -> None:
    teacher, data = tiny(), batches()
    cache = build(tmp_path / "cache", teacher, data)
    for index in order:
        batch = data[index]
        counted = batch["labels"] != -100
        tokens, log_probs = cache.lookup(batch["sample_id"], counted)
        expected = live_log_probs(teacher, batch)[counted]
        assert tokens.dtype == torch.int64
        assert log_probs.dtype == torch.float32
        assert torch.allclose(log_probs, expected.topk(8).values, atol=5e-3)  # float16
        assert torch.allclose(expected.gather(-1, tokens), log_probs, atol=5e-3)


def test_lookup_follows_the_sample_not_the_position(tmp_path: Path) -> None:
    """Rows that come in another order, and in batches padded otherwise, find their own teacher."""
    teacher, data = tiny(), batches()
    cache = build(tmp_path / "cache", teacher, data)
    rows = [(batch, row) for batch in data for row in range(len(batch["sample_id"]))]
    picked = [rows[index] for index in (9, 2, 5, 2)]
    counted = torch.stack([batch["labels"][row] != -100 for batch, row in picked])
    got, _ = cache.lookup([batch["sample_id"][row] for batch, row in picked], counted)
    expected = [cache.lookup([b["sample_id"][r]], (b["labels"][r : r + 1] != -100))[0] for b, r in picked]
    assert torch.equal(got, torch.cat(expected))


def test_only_counted_positions_come(tmp_path: Path) -> None:
    teacher, data = tiny(), batches()
    cache = build(tmp_path / "cache", teacher, data)
    ids = data[0]["sample_id"][:1]
    everything = torch.ones(1, 24, dtype=torch.bool)
    some = torch.zeros(1, 24, dtype=torch.bool)
    some[0, [3, 17]] = True
    assert torch.equal(cache.lookup(ids, some)[0], cache.lookup(ids, everything)[0][[3, 17]])
    assert cache.lookup(ids, torch.zeros(1, 24, dtype=torch.bool))[0].shape == (0, 8)


def test_samples_spread_over_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, data = tiny(), batches(ragged=False)
    one = build(tmp_path / "one", teacher, data)
    monkeypatch.setattr("qad.teacher._SHARD_TOKENS", 50)
    monkeypatch.setattr("qad.teacher._CHUNK_TOKENS", 7)
    several = build(tmp_path / "several", teacher, data)
    assert len(list((tmp_path / "several").glob("*.safetensors"))) == 4
    for batch in data:
        counted = batch["labels"] != -100
        for ours, theirs in zip(
            several.lookup(batch["sample_id"], counted), one.lookup(batch["sample_id"], counted), strict=True
        ):
            assert torch.allclose(ours.float(), theirs.float(), atol=2e-3)


def test_a_padded_vocabulary_is_cut(tmp_path: Path) -> None:
    teacher, data = tiny(), batches()
    cache = build(tmp_path / "cache", teacher, data, vocabulary=100, top_k=5000)
    tokens, log_probs = cache.lookup(data[0]["sample_id"], data[0]["labels"] != -100)
    assert tokens.shape[1] == 100
    assert int(tokens.max()) == 99
    assert torch.allclose(log_probs.exp().sum(-1), torch.ones(len(log_probs)), atol=5e-3)


# ---------------------------------------------------------------------------------------------------- reuse, damage


class Refuses(torch.nn.Module):
    """A teacher that must not be asked."""

    def get_output_embeddings(self) -> Any:
        raise AssertionError("the teacher was asked")


def test_a_cache_of_the_same_key_is_reused_and_of_another_is_not(tmp_path: Path) -> None:
    data = batches()
    build(tmp_path, tiny(), data)
    assert data[0]["sample_id"][0] in build(tmp_path, Refuses(), data)
    for changes in ({"key": "another"}, {"top_k": 9}):
        with pytest.raises(AssertionError, match="the teacher was asked"):
            build(tmp_path, Refuses(), data, **changes)


def test_an_interrupted_build_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    teacher, data = tiny(), batches()

    def interrupted() -> Any:
        yield from data[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path, teacher, interrupted(), top_k=8, key="tiny", vocabulary=VOCABULARY)
    with pytest.raises(UserError, match="no readable teacher cache"):
        TeacherCache(tmp_path)
    assert data[3]["sample_id"][0] in build(tmp_path, teacher, data)


def test_a_rebuild_that_is_interrupted_does_not_leave_the_old_index(tmp_path: Path) -> None:
    teacher, data = tiny(), batches()
    build(tmp_path, teacher, data)

    def interrupted() -> Any:
        yield data[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path, teacher, interrupted(), top_k=8, key="another", vocabulary=VOCABULARY)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"top_k": 8}', '{"top_k": 8, "key": "tiny", "samples": 3}']
)
def test_a_damaged_index_is_an_error(tmp_path: Path, content: str) -> None:
    data = batches()
    build(tmp_path, tiny(), data)
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(UserError, match="no readable teacher cache.*delete it"):
        build(tmp_path, Refuses(), data)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_shard_is_an_error(tmp_path: Path, damage: str) -> None:
    data = batches()
    build(tmp_path, tiny(), data)
    shard = tmp_path / "shard-00000.safetensors"
    if damage == "cut":
        os.truncate(shard, 300)
    else:
        shard.unlink()
    with pytest.raises(UserError, match=re.escape(str(shard)) + ".*delete the folder"):
        TeacherCache(tmp_path).lookup(data[0]["sample_id"], data[0]["labels"] != -100)


def test_a_sample_that_is_not_cached_is_an_error(tmp_path: Path) -> None:
    cache = build(tmp_path, tiny(), batches())
    assert "unheard-of" not in cache
    with pytest.raises(UserError, match="sample unheard-of is not in .*delete the folder"):
        cache.lookup(["unheard-of"], torch.ones(1, 4, dtype=torch.bool))


def test_a_sample_of_another_length_is_an_error(tmp_path: Path) -> None:
    data = batches()
    cache = build(tmp_path, tiny(), data)
    with pytest.raises(UserError, match="is shorter than the data's"):
        cache.lookup(data[0]["sample_id"][:1], torch.ones(1, 25, dtype=torch.bool))


def test_a_full_disk(small_disk: Path) -> None:
    with pytest.raises(UserError, match="disk is full"):
        build(small_disk / "cache", tiny(), batches(30), top_k=500)
    with pytest.raises(UserError, match="no readable teacher cache"):
        TeacherCache(small_disk / "cache")


def test_the_index_names_its_settings(tmp_path: Path) -> None:
    build(tmp_path, tiny(), batches())
    index = json.loads((tmp_path / "index.json").read_text())
    assert (index["top_k"], index["key"], len(index["samples"])) == (8, "tiny", 10)
    assert [length for _, _, length in index["samples"].values()] == [24, 19, 14] * 3 + [24]  # no padding


# ---------------------------------------------------------------------------------------------------- training from it


def test_the_loss_of_a_whole_vocabulary_is_the_live_teacher_s(tmp_path: Path) -> None:
    teacher, student, data = tiny(), tiny("llama-tied", num_hidden_layers=1), batches()
    cache = build(tmp_path, teacher, data, top_k=VOCABULARY)
    for batch in data:
        counted = batch["labels"] != -100
        hidden = last_hidden(student, batch)[counted].detach()
        head = output_head(student).detach()
        labels = batch["labels"][counted]
        live = LiveTeacher(last_hidden(teacher, batch)[counted].detach(), output_head(teacher).detach())  # type: ignore[union-attr]
        from_cache = CachedTeacher(*cache.lookup(batch["sample_id"], counted))
        losses = [
            chunked_distillation(hidden, head, labels, t, LossSettings()).loss / len(labels) for t in (live, from_cache)
        ]
        assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-3)


def test_a_run_from_the_cache_is_a_run_from_the_teacher(tmp_path: Path) -> None:
    """Shuffled batches, several epochs, every token of the vocabulary cached."""
    # Nothing moves: a weight that float16 tips over a rounding border would part the two runs.
    recipe = Recipe(steps=9, batch_size=4, micro_batch=2, lr=0.0, kept_lr=0.0, init="rtn", scales="absmax")
    rows = token_rows(10)
    collator = Collator(0, "all")
    kl = {}
    for kind in ("live", "cache"):
        teacher = tiny()
        cache = None
        if kind == "cache":
            every = [collator([rows[n] for n in range(start, start + 2)]) for start in range(0, 10, 2)]  # type: ignore[misc]
            cache = build(tmp_path / "cache", teacher, every, top_k=VOCABULARY)
        parts = make_trainer(tmp_path / kind, recipe, teacher=teacher, train_rows=rows, cache=cache)
        parts.trainer.train()
        kl[kind] = [entry["kl"] for entry in parts.trainer.state.log_history if "kl" in entry]
    assert len(kl["live"]) == 9
    assert len(set(kl["live"])) > 5  # other rows from step to step
    assert kl["cache"] == pytest.approx(kl["live"], abs=1e-3)
