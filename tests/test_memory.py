"""Models and caches that do not fit are refused before they are made, with what would fit."""

import re
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from qad import export
from qad.errors import UserError
from qad.model_facts import model_facts
from qad.runtimes import Step, _memory, llamacpp, open_model
from tests.helpers_models import make_artifact
from tests.helpers_runtimes import needs

needs_llama = needs("llamacpp")
PROMPT = [9, 8, 7, 30]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("memory")
    artifact = make_artifact(run, "llama-tied", num_hidden_layers=8, head_dim=64, max_position_embeddings=4096)
    export.get("gguf").write(artifact, run / "model.gguf")
    return run


def only(monkeypatch: pytest.MonkeyPatch, available: float) -> None:
    """Let the machine have that much memory left."""
    memory = type("Memory", (), {"available": int(available)})()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def all_of(k: int) -> Callable[[Step], range]:
    """Return a callback that drops all trajectories at once."""
    return lambda step: range(k)


@needs_llama
def test_what_fits_really_does(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with llamacpp.open(run / "model.gguf", threads=1) as session:
        only(monkeypatch, 24e6)
        with pytest.raises(UserError, match=r"a prompt of 4 tokens and 64 x 2000 new ones need \d+") as caught:
            session.sample(PROMPT, 64, new_tokens=2000)
        told = str(caught.value)
        (fewer,) = re.findall(r"(\d+) at a time", told)
        (shorter,) = re.findall(r"(\d+) new tokens each", told)
        # What is offered is the most: one more of either is refused, with the same words.
        for k, new_tokens in ((int(fewer) + 1, 2000), (64, int(shorter) + 1)):
            with pytest.raises(UserError, match="would fit"):
                session.sample(PROMPT, k, new_tokens=new_tokens)
        for k, new_tokens in ((int(fewer), 2000), (64, int(shorter))):
            assert len(session.sample(PROMPT, k, new_tokens=new_tokens, on_token=all_of(k))) == k
    only(monkeypatch, 8e9)
    with llamacpp.open(run / "model.gguf", threads=1) as session:
        need = _memory.cache_need(model_facts(run / "model.gguf"), 4, 64, 500, "q8_0")
        only(monkeypatch, need + 1e6)
        with pytest.raises(UserError, match="or a cache of type q8_0 or a cache of type q4_0 would fit"):
            session.sample(PROMPT, 64, new_tokens=500)
    only(monkeypatch, 8e9)
    with llamacpp.open(run / "model.gguf", threads=1, kv_type="q8_0") as session:
        only(monkeypatch, need + 1e6)
        assert len(session.sample(PROMPT, 64, new_tokens=500, on_token=all_of(64))) == 64


@needs_llama
def test_weights_that_do_not_fit(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = model_facts(run / "model.gguf")
    # The reference computes in float32: seven times the file's 4 and 8 bits or so.
    assert _memory.weight_bytes(facts, "reference") > 4 * _memory.weight_bytes(facts, "llamacpp")
    only(monkeypatch, facts.file_bytes * 2)
    open_model(run / "model.gguf", threads=1).close()
    with pytest.raises(UserError, match=r"for its weights and .* MB of memory are free"):
        open_model(run, threads=1)
    only(monkeypatch, facts.file_bytes * 0.9)
    with pytest.raises(UserError, match=r"model.gguf needs .* end other programs, or use a smaller model"):
        open_model(run / "model.gguf", threads=1)


def test_caches_of_the_other_runtimes(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(run, threads=1) as session:
        session.sample(PROMPT, 3, new_tokens=2)
        # What the rule says of a token is what the cache takes: four tokens and the first new one.
        assert session.work.cache_bytes == 3 * 5 * session._token_bytes  # type: ignore[attr-defined]
        only(monkeypatch, 40e6)
        with pytest.raises(UserError, match=r"50 x 900 new ones need .* 40\.0 MB are free: \d+ at a time or") as caught:
            session.sample(PROMPT, 50, new_tokens=900)
        (fewer,) = re.findall(r"(\d+) at a time", str(caught.value))
        assert len(session.sample(PROMPT, int(fewer), new_tokens=900, on_token=all_of(int(fewer)))) == int(fewer)


def test_free_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, 8e9)
    monkeypatch.setattr(_memory, "_GROUP", tmp_path)
    assert _memory.free_bytes() == 8e9
    (tmp_path / "memory.current").write_text("900000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\nactive_file 100000000\ninactive_file 300000000\n")
    for limit, free in (("max", 8e9), ("2000000000", 1.5e9), ("400000000", 0)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert _memory.free_bytes() == free
