"""Loading: GGUF, Hugging Face folders and hub ids give the same clean model; each bad input gives one clear error."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from qad import export
from qad.errors import UserError
from qad.model import (
    LoadedModel,
    check_finite,
    check_same_tokenizer,
    load_model,
    model_fingerprint,
    resolve_source,
)
from tests.helpers_models import MODELS, VARIED_TEXTS, make_artifact, make_model, make_tokenizer

MakeModel = Callable[..., PreTrainedModel]


@pytest.fixture(scope="module")
def smollm() -> LoadedModel:
    return load_model()


@pytest.fixture
def folder(tmp_path: Path, tiny_model: MakeModel, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """Return a whole Hugging Face folder of a tiny model."""
    tiny_model("qwen2").save_pretrained(tmp_path / "hf")
    tiny_tokenizer.save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def test_smollm_has_its_special_tokens_and_template(smollm: LoadedModel) -> None:
    tokenizer = smollm.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(prompt).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert "dequantized" in smollm.notes[0]
    config = smollm.model.config
    assert config.rope_parameters == {"rope_theta": 100000.0, "rope_type": "default"}
    assert smollm.model.get_output_embeddings().weight is smollm.model.get_input_embeddings().weight  # type: ignore[union-attr]
    assert getattr(config, "quantization_config", None) is None


def test_smollm_cuts_and_computes_as_llama_cpp_does(smollm: LoadedModel) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    judge = llama_cpp.Llama(smollm.source, n_ctx=256, logits_all=True, n_threads=1, n_threads_batch=1, verbose=False)
    for text in VARIED_TEXTS:
        assert smollm.tokenizer.encode(text) == judge.tokenize(text.encode(), special=True), text
        assert smollm.tokenizer.decode(smollm.tokenizer.encode(text)) == text
    ids = smollm.tokenizer.encode("The keeper had 42 boats and 17 cats. Every morning he counted them, and when one")
    judge.eval(ids)
    expected_TV = torch.tensor(judge.scores[: len(ids)]).log_softmax(-1)
    with torch.inference_mode():
        found_TV = smollm.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    # What remains is llama.cpp's rounding of activations to 8 bits.
    assert float((found_TV.exp() * (found_TV - expected_TV)).sum(-1).mean()) < 1e-2
    judge.close()


@pytest.mark.parametrize("case", MODELS)
def test_gguf_gives_back_the_model_that_was_exported(case: str, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, case)
    file = tmp_path / "model.gguf"
    export.get("gguf").write(artifact, file)
    loaded = load_model(str(file))
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, artifact.weight(name)), name
    for text in VARIED_TEXTS:
        assert loaded.tokenizer.encode(text) == make_tokenizer(MODELS[case].tokenizer).encode(text), text
    # Other parts of the configuration show in the logits: rotary embedding, norms, heads.
    original = make_model(case)
    original.load_state_dict(loaded.model.state_dict())
    ids_BT = torch.arange(40).unsqueeze(0)
    with torch.inference_mode():
        torch.testing.assert_close(loaded.model(ids_BT).logits, original(ids_BT).logits)


@pytest.mark.parametrize("case", ["llama-scaled", "qwen3-yarn"])
def test_a_loaded_gguf_saves_and_loads_as_a_folder(case: str, tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    export.get("gguf").write(make_artifact(tmp_path, case), file)
    loaded = load_model(str(file))
    loaded.model.save_pretrained(tmp_path / "hf")
    loaded.tokenizer.save_pretrained(tmp_path / "hf")
    again = load_model(str(tmp_path / "hf"))
    assert model_fingerprint(again.model) == model_fingerprint(loaded.model)
    assert again.model.config.rope_parameters == loaded.model.config.rope_parameters
    check_same_tokenizer(loaded.tokenizer, again.tokenizer)
    assert again.tokenizer.chat_template == loaded.tokenizer.chat_template
    assert again.notes == []


def test_a_folder_loads_in_another_dtype(folder: Path) -> None:
    assert load_model(str(folder), torch.bfloat16).model.dtype == torch.bfloat16


def test_fingerprint_sees_one_changed_value(tiny_model: MakeModel) -> None:
    model = tiny_model()
    before = model_fingerprint(model)
    assert model_fingerprint(tiny_model()) == before
    with torch.no_grad():
        next(model.parameters())[3, 5] += 1e-3
    assert model_fingerprint(model) != before


def test_default_source_is_the_packaged_file() -> None:
    assert resolve_source(None) == resolve_source("smollm2")
    assert Path(resolve_source(None)).is_file()
    assert resolve_source("some/model") == "some/model"


def test_default_source_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(UserError, match=r"pip install 'qad\[demo\]'"):
        resolve_source(None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "holds no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
        (lambda f: [(f / n).unlink() for n in ("tokenizer.json",)], "holds no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer of .* cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be read as a model folder"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "truncated or damaged"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "truncated or damaged"),
        (lambda f: _edit(f, model_type="mamba"), "'mamba'; supported are llama, qwen2, qwen3"),
        (lambda f: _edit(f, quantization_config={"quant_method": "gptq", "bits": 4}), "already quantized .gptq"),
        (lambda f: _edit(f, num_hidden_layers=3), "cannot be read as a model folder .*num_hidden_layers"),
        (lambda f: _drop(f, "model.layers.1.mlp.up_proj.weight"), "1 tensors are missing .*layers.1.mlp.up_proj"),
        (lambda f: (f / "config.json").write_text("[1]"), "holds no JSON object"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer of .* cannot be read .KeyError"),
        (lambda f: _edit(f, num_attention_heads=0), "cannot be read as a model folder .ZeroDivisionError"),
        (lambda f: _edit(f, dtype="float8"), "cannot be read as a model folder .*float8"),
        (lambda f: _edit(f, quantization_config="gptq"), "cannot be read as a model folder|already quantized"),
        (lambda f: _edit(f, rope_parameters={"rope_type": "banana"}), "rotary scaling .banana. of a qwen2 model"),
        (lambda f: _grow_tokenizer(f), r"token 3\d\d .'new\d+'. but the model's embedding only 320 rows"),
        (lambda f: _edit(f, intermediate_size=128), "0 tensors are missing and 6 have another shape"),
    ],
)
def test_damaged_folders(folder: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def _grow_tokenizer(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([f"new{number}" for number in range(40)])
    tokenizer.save_pretrained(folder)


def _drop(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_left_out_are_named(folder: Path) -> None:
    assert load_model(str(folder)).notes == []
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.extra.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"})
    (note,) = load_model(str(folder)).notes
    assert "1 tensors" in note
    assert "model.extra.weight" in note


def _set_byte(file: Path, after: bytes, offset: int, value: int) -> None:
    data = bytearray(file.read_bytes())
    data[data.index(after) + len(after) + offset] = value
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("after", "offset", "value", "message"),
    [
        (b"tokenizer.ggml.eos_token_id", 4 + 3, 0x40, "as its eos token but has 600 tokens"),
        # Type, item type and count of the array, length of the first merge: its first character.
        (b"tokenizer.ggml.merges", 4 + 4 + 8 + 8, 0x07, "the tokenizer in .* is damaged .*out of vocabulary"),
        (b"token_embd", 1, 0x78, "no token embedding"),
    ],
)
def test_a_gguf_with_a_wrong_byte_in_its_header(
    tmp_path: Path, after: bytes, offset: int, value: int, message: str
) -> None:
    file = tmp_path / "model.gguf"
    export.get("gguf").write(make_artifact(tmp_path / "run", "llama-tied"), file)
    _set_byte(file, after, offset, value)
    with pytest.raises(UserError, match=message):
        load_model(str(file))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(folder: Path, value: float) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][2, 3] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN or infinite"):
        load_model(str(folder))


def test_finite_models_pass(tiny_model: MakeModel) -> None:
    check_finite(tiny_model(), "a test")


def test_other_architectures_are_refused_before_anything_is_read(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=300)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="'gpt2'; supported are llama, qwen2, qwen3"):
        load_model(str(tmp_path))


def test_missing_truncated_and_foreign_gguf(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="missing"):
        load_model(str(tmp_path / "none.gguf"))
    cut = tmp_path / "cut.gguf"
    shutil.copyfile(resolve_source(None), cut)
    os.truncate(cut, 50_000_000)
    with pytest.raises(UserError, match="truncated or damaged"):
        load_model(str(cut))
    cut.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(UserError, match="not a GGUF file"):
        load_model(str(cut))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("someone/no-such-model", "Hugging Face hub did not give it"),
        ("./no-such-folder", "not a possible hub id|neither a file, a folder"),
        ("no such name!", "neither a file, a folder"),
    ],
)
def test_what_is_not_here_and_not_on_the_hub(source: str, message: str) -> None:
    # A process of its own, because the hub's client reads its settings once.
    code = (
        "import sys; from qad.model import load_model; from qad.errors import UserError\n"
        "try: load_model(sys.argv[1])\n"
        "except UserError as error: print(error); sys.exit(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 3, done.stderr
    assert len(done.stdout.strip().splitlines()) == 1
    assert re.search(message, done.stdout), done.stdout


def _tokenizer(changes: Callable[[Tokenizer], Any], **special: str) -> PreTrainedTokenizerFast:
    """Return a byte tokenizer with one merge, changed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", "<bos>", *alphabet, "ab", "bc"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    changes(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "<eos>", **special})


def test_tokenizers_that_differ_are_told_apart() -> None:
    plain = _tokenizer(lambda t: None)
    check_same_tokenizer(plain, _tokenizer(lambda t: None))
    with pytest.raises(UserError, match=r"different vocabularies \(260 and 261 tokens; 1 differ: '<extra>'"):
        check_same_tokenizer(plain, _tokenizer(lambda t: t.add_tokens(["<extra>"])))
    with pytest.raises(UserError, match="special tokens .eos_token_id 0 and 1"):
        check_same_tokenizer(plain, _tokenizer(lambda t: None, eos_token="<bos>"))
    for change in (
        lambda t: setattr(t, "normalizer", normalizers.NFC()),
        lambda t: setattr(t, "normalizer", normalizers.Lowercase()),
        lambda t: setattr(t.model, "unk_token", None) or setattr(t, "pre_tokenizer", pre_tokenizers.Digits(True)),
    ):
        with pytest.raises(UserError, match="cut text differently"):
            check_same_tokenizer(plain, _tokenizer(change))
