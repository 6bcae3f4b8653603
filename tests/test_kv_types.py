"""Caches of other types and more threads: trajectories keep what they have with f16 and one thread."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from qad import export
from qad.runtimes import Sampling, Step, llamacpp
from tests.helpers_models import make_artifact
from tests.helpers_runtimes import needs

pytestmark = needs("llamacpp")
HOT = Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, seed=5)
PROMPT = [9, 8, 7, 30, 31, 200, 201, 77, 5, 6]
NEW = 16


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kv-types")
    export.get("gguf").write(make_artifact(run, "llama-tied", num_hidden_layers=4, head_dim=64), run / "model.gguf")
    return run / "model.gguf"


@pytest.fixture(params=[("q8_0", 1), ("q4_0", 1), ("f16", 2), ("q8_0", 2)], ids=lambda it: f"{it[0]}-{it[1]}")
def session(request: pytest.FixtureRequest, gguf: Path) -> Iterator[llamacpp.LlamaSession]:
    kind, threads = request.param
    with llamacpp.open(gguf, threads=threads, kv_type=kind) as opened:
        yield opened


def test_bits_depend_on_neither_k_nor_drops(session: llamacpp.LlamaSession) -> None:
    greedy = [one for k in (1, 2, 5, 8) for one in session.sample(PROMPT, k, new_tokens=NEW)]
    assert {tuple(one.tokens) for one in greedy} == {tuple(greedy[0].tokens)}
    assert {tuple(one.logprobs) for one in greedy} == {tuple(greedy[0].logprobs)}
    assert [piece.token for piece in session.stream(PROMPT, NEW) if piece.token is not None] == greedy[0].tokens
    many = session.sample(PROMPT, 8, HOT, new_tokens=NEW, ignore_end=True)
    few = session.sample(PROMPT, 3, HOT, new_tokens=NEW, ignore_end=True)
    assert [(one.tokens, one.logprobs) for one in few] == [(one.tokens, one.logprobs) for one in many[:3]]
    assert len({tuple(one.tokens) for one in many}) == 8
    seen = 0

    def drop(step: Step) -> list[int] | None:
        nonlocal seen
        seen += 1
        return [0, 7] if seen == 8 * 6 else None

    left = session.sample(PROMPT, 8, HOT, new_tokens=NEW, ignore_end=True, on_token=drop)
    assert [one.reason for one in left] == ["dropped", *["length"] * 6, "dropped"]
    assert [(one.tokens, one.logprobs) for one in left[1:7]] == [(one.tokens, one.logprobs) for one in many[1:7]]


def test_a_small_cache_is_another_one(gguf: Path) -> None:
    # Without this the tests above would also pass if the type were ignored.
    found = []
    for kind in ("f16", "q8_0", "q4_0"):
        with llamacpp.open(gguf, threads=1, kv_type=kind) as session:
            found.append(tuple(session.sample(PROMPT, 1, new_tokens=NEW)[0].logprobs))
    assert len(set(found)) == 3
