"""Runtimes: llama.cpp computes what torch computes, cuts text as the tokenizer does, and says what it cannot open."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter

from qad import export, runtimes
from qad.agreement import compare_runtime, log_softmax
from qad.artifact import Artifact, open_artifact
from qad.errors import UserError
from qad.runtimes import GREEDY, Runtime, Sampling, Session, _cores, choose
from qad.runtimes import llamacpp as llamacpp_module
from qad.runtimes import reference as reference_module
from tests.helpers_models import MODELS, TOKENIZERS, VARIED_TEXTS, make_artifact, make_tokenizer, verify_text

# The assignments make the type checker hold each module to the protocol.
LLAMA: Runtime = llamacpp_module
REFERENCE: Runtime = reference_module
_REASON = LLAMA.available()
needs_llama = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))
Run = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a maker of run folders and their GGUF files, each made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(case: str) -> tuple[Path, Path]:
        if case not in made:
            run = tmp_path_factory.mktemp(case)
            export.get("gguf").write(make_artifact(run, case), run / "model.gguf")
            made[case] = run, run / "model.gguf"
        return made[case]

    return make


def family_case(family: str) -> str:
    return next(case for case, tiny in MODELS.items() if tiny.tokenizer == family)


@needs_llama
@pytest.mark.parametrize("case", MODELS)
def test_llamacpp_computes_what_torch_computes(case: str, exported: Run) -> None:
    run, file = exported(case)
    agreement = compare_runtime(run, file, verify_text(), threads=1)
    assert agreement.kl < 1e-2
    assert agreement.same_top > 0.9
    assert agreement.same_tokens
    assert agreement.tokens >= 512


@needs_llama
@pytest.mark.parametrize("family", TOKENIZERS)
def test_llamacpp_cuts_text_as_the_tokenizer_does(family: str, exported: Run) -> None:
    tokenizer = make_tokenizer(family)
    with LLAMA.open(exported(family_case(family))[1], threads=1) as session:
        for text in (*VARIED_TEXTS, verify_text()):
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert session.tokenize(text) == tokens
            assert session.detokenize(tokens) == tokenizer.decode(tokens)


@needs_llama
@pytest.mark.parametrize("family", TOKENIZERS)
def test_both_runtimes_template_a_chat_alike(family: str, exported: Run) -> None:
    run, file = exported(family_case(family))
    messages = [{"role": "user", "content": "How many apples? 12!"}]
    wanted = make_tokenizer(family).apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for session in (LLAMA.open(file, threads=1), REFERENCE.open(run, threads=1)):
        with session:
            assert session.chat_prompt("How many apples? 12!") == wanted


def sessions(exported: Run, case: str) -> list[Session]:
    run, file = exported(case)
    opened = [REFERENCE.open(run, threads=1)]
    return [*opened, LLAMA.open(file, threads=1)] if _REASON is None else opened


def test_greedy_stream_follows_the_logits(exported: Run) -> None:
    for session in sessions(exported, "llama-tied"):
        with session:
            prompt = session.chat_prompt("Why does ice float?")
            pieces = list(session.stream(prompt, 12))
            ending = pieces[-1].ending
            assert ending is not None
            made = [piece.token for piece in pieces if piece.token is not None]
            assert (ending.prompt_tokens, ending.new_tokens) == (len(prompt), len(made))
            assert ending.tokens_per_second > 0
            logits = session.logits([[*prompt, *made]])
            assert logits.shape == (1, len(prompt) + len(made), session.vocabulary)
            assert logits[0].argmax(axis=1)[len(prompt) - 1 : -1].tolist() == made


def test_stream_ends_when_the_model_does(exported: Run) -> None:
    end = make_tokenizer("smollm").eos_token_id
    for session in sessions(exported, "llama-tied"):
        with session:
            # A random model ends an answer by chance: some seed among these does.
            for seed in range(40):
                pieces = list(session.stream([5, 6, 7], 200, Sampling(temperature=3.0, seed=seed)))
                ending = pieces[-1].ending
                assert ending is not None
                assert end not in [piece.token for piece in pieces]
                assert (ending.reason == "stop") == (ending.new_tokens < 200)
                if ending.reason == "stop":
                    break
            else:
                pytest.fail("no answer ended")


@needs_llama
def test_a_stream_that_was_overtaken_says_so(exported: Run) -> None:
    with LLAMA.open(exported("llama-tied")[1], threads=1) as session:
        stream = session.stream([5, 6, 7], 20)
        next(stream)
        session.logits([[1, 2, 3]])
        with pytest.raises(RuntimeError, match="something else"):
            list(stream)


def test_seeds_repeat(exported: Run) -> None:
    hot = Sampling(temperature=1.5, top_p=0.9, top_k=50, seed=3)
    for session in sessions(exported, "llama-tied"):
        with session:
            first, again = ([piece.token for piece in session.stream([9, 8, 7], 16, hot)] for _ in range(2))
            assert first == again


def test_pieces_join_to_whole_characters(exported: Run) -> None:
    for session in sessions(exported, "qwen2"):
        with session:
            pieces = list(session.stream(session.tokenize("漢字👩‍🚀"), 60, Sampling(temperature=2.0, seed=1)))
            made = [piece.token for piece in pieces if piece.token is not None]
            special = set(make_tokenizer("qwen").all_special_ids)
            if not special & set(made):
                whole = session.detokenize([token for token in made if token < session.vocabulary])
                assert "".join(piece.text for piece in pieces).rstrip("\ufffd") == whole.rstrip("\ufffd")


def test_batches_equal_single_sequences(exported: Run) -> None:
    rows = np.random.default_rng(0).integers(5, 500, (3, 40))
    for session in sessions(exported, "qwen3"):
        with session:
            together = session.logits(rows)
            for row in range(3):
                alone = log_softmax(session.logits(rows[row : row + 1])[0])
                np.testing.assert_allclose(log_softmax(together[row]), alone, atol=1e-3)


def test_long_sequences_are_read_in_pieces(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied", max_position_embeddings=2048)
    export.get("gguf").write(artifact, tmp_path / "model.gguf")
    row = np.random.default_rng(0).integers(5, 500, (1, 1100))
    with REFERENCE.open(tmp_path, threads=1) as judge:
        wanted = log_softmax(judge.logits(row)[0])
    if _REASON is None:
        with LLAMA.open(tmp_path / "model.gguf", threads=1) as session:
            found = log_softmax(session.logits(row)[0])
        assert (np.exp(wanted) * (wanted - found)).sum(axis=1).mean() < 1e-2


def test_context_and_token_limits(exported: Run) -> None:
    for session in sessions(exported, "llama-tied"):
        with session, pytest.raises(UserError, match="context of 512"):
            list(session.stream([1] * 500, 100))
    if _REASON is None:
        with LLAMA.open(exported("llama-tied")[1], threads=1) as session, pytest.raises(ValueError, match="must lie"):
            session.logits([[1, 10**6]])


def test_closing_twice(exported: Run) -> None:
    for session in sessions(exported, "llama-tied"):
        session.close()
        session.close()


@pytest.mark.parametrize("case", MODELS)
def test_reference_holds_the_artifacts_weights(case: str, tmp_path: Path) -> None:
    artifact: Artifact = make_artifact(tmp_path, case)
    model = reference_module.build_model(artifact)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, artifact.weight(name)), name
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) is artifact.tied_head  # type: ignore[union-attr]


def test_reference_opens_plain_folders(exported: Run, tmp_path: Path) -> None:
    run, _ = exported("qwen2")
    artifact = open_artifact(run)
    reference_module.build_model(artifact).save_pretrained(tmp_path)
    make_tokenizer("qwen").save_pretrained(tmp_path)
    with REFERENCE.open(run, threads=1) as ours, REFERENCE.open(tmp_path, threads=1) as plain:
        np.testing.assert_array_equal(ours.logits([[4, 5, 6]]), plain.logits([[4, 5, 6]]))


def test_damaged_config_of_an_artifact(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    config = (artifact.folder / "config.json").read_text()
    (artifact.folder / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(UserError, match="does not fit"):
        reference_module.build_model(open_artifact(tmp_path))


@pytest.mark.parametrize("name", runtimes.names())
def test_runtimes_offer_what_the_protocol_asks(name: str) -> None:
    runtime = runtimes.get(name)
    assert runtime.FORMATS
    reason = runtime.available()
    assert reason is None or reason


def test_choice_of_runtime(exported: Run, tmp_path: Path) -> None:
    run, file = exported("llama-tied")
    assert runtimes.runtime_for(run) is REFERENCE
    assert runtimes.runtime_for(run / "artifact") is REFERENCE
    if _REASON is None:
        assert runtimes.runtime_for(file) is LLAMA
    with pytest.raises(UserError, match="missing"):
        runtimes.runtime_for(tmp_path / "none.gguf")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match="neither"):
        runtimes.runtime_for(tmp_path / "notes.txt")
    with pytest.raises(UserError, match=r"unknown runtime 'vllm'; known: .*llamacpp"):
        runtimes.get("vllm")


@needs_llama
def test_truncated_file_is_explained(exported: Run, tmp_path: Path) -> None:
    data = exported("llama-tied")[1].read_bytes()
    broken = tmp_path / "model.gguf"
    broken.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match="truncated or damaged: tensor"):
        LLAMA.open(broken)


@needs_llama
def test_refusal_of_llamacpp_is_explained(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"llama.cpp cannot load .*(context_length|key not found|tokenizer)"):
        LLAMA.open(file, threads=1)


@pytest.mark.parametrize("runtime", [LLAMA, REFERENCE])
def test_unusable_devices(runtime: Runtime, exported: Run) -> None:
    run, file = exported("llama-tied")
    path = run if runtime is REFERENCE else file
    if runtime.available() is not None:
        pytest.skip(str(runtime.available()))
    with pytest.raises(UserError, match="unknown device 'tpu'"):
        runtime.open(path, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="GPU"):
            runtime.open(path, device="gpu")


def test_sampling_rules() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    generator = np.random.default_rng(0)

    def drawn(sampling: Sampling) -> list[float]:
        picks = [choose(logits, sampling, generator) for _ in range(4000)]
        return [picks.count(token) / 4000 for token in range(4)]

    assert choose(logits, GREEDY, generator) == 0
    np.testing.assert_allclose(drawn(Sampling(temperature=1.0)), [0.5, 0.3, 0.15, 0.05], atol=0.04)
    np.testing.assert_allclose(drawn(Sampling(temperature=1.0, top_k=2)), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(drawn(Sampling(temperature=1.0, top_p=0.8)), [0.625, 0.375, 0, 0], atol=0.04)
    np.testing.assert_allclose(drawn(Sampling(temperature=1.0, top_p=0.81))[3], 0)
    assert drawn(Sampling(temperature=1.0, top_p=0.01))[0] == 1
    squares = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(drawn(Sampling(temperature=0.5)), squares / squares.sum(), atol=0.04)


@pytest.mark.parametrize(
    "bad",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"seed": -1}],
)
def test_impossible_sampling(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match="impossible"):
        Sampling(**bad)  # type: ignore[arg-type]


def test_a_chat_template_that_cannot_be_rendered(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    (artifact.folder / "chat_template.jinja").write_text("{% for message in %}")
    with (
        runtimes.get("reference").open(tmp_path, threads=1) as session,
        pytest.raises(UserError, match="cannot be rendered"),
    ):
        session.chat_prompt("Hello?")


def test_free_cores_is_a_sane_number() -> None:
    assert _cores.free_cores() >= 1


def test_llamacpp_reports_whether_it_is_installed() -> None:
    assert (importlib.util.find_spec("llama_cpp") is None) <= (_REASON is not None)


@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="ONNX Runtime is not installed")
def test_telemetry_is_off(tmp_path: Path) -> None:
    # ONNX Runtime sends nothing where continuous integration runs: it must not take this for such a place.
    wanted = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
    inherited = {name: os.environ[name] for name in wanted if name in os.environ}

    def kept(program: str, home: Path) -> list[Path]:
        home.mkdir()
        environment = {**inherited, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True)
        return [path for path in home.rglob("*") if path.is_file()]

    if not kept("import onnxruntime", tmp_path / "without"):
        pytest.skip("this ONNX Runtime keeps no identifier of the machine")
    assert kept("from qad.runtimes import ort; assert ort.available() is None", tmp_path / "with") == []
