"""The artifact: what goes in comes out bit for bit, and what is damaged is refused with a reason."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from qad.artifact import Artifact, open_artifact, save_artifact, tensor_sha256
from qad.errors import UserError
from qad.grid import get_grid
from qad.plan import KEEP, is_tied, make_plan
from qad.tensor import QuantizedTensor, dequantize, quantize

Saver = Callable[..., Artifact]


def parts_of(model: PreTrainedModel, bits: int = 4) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
    plan = make_plan(model, bits)
    weights = dict(model.named_parameters())
    quantized = {
        name: quantize(weights[name], get_grid(grid), name=name) for name, grid in plan.items() if grid != KEEP
    }
    return quantized, {name: weights[name] for name, grid in plan.items() if grid == KEEP}


@pytest.fixture
def save(tiny_model: Callable[..., PreTrainedModel], tiny_tokenizer: PreTrainedTokenizerFast) -> Saver:
    """Return a function that saves a tiny model's artifact in a run folder."""

    def save_run(run: Path, architecture: str = "llama", seed: int = 0, **changes: Any) -> Artifact:
        model = tiny_model(architecture, **changes)
        quantized, kept = parts_of(model)
        return save_artifact(
            run,
            config=model.config,
            tokenizer=tiny_tokenizer,
            quantized=quantized,
            kept=kept,
            tied_head=is_tied(model),
            forward_sha256={name: tensor_sha256(dequantize(tensor)) for name, tensor in quantized.items()},
            recipe={"teacher": "tiny", "seed": seed},
        )

    return save_run


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip(
    tmp_path: Path, save: Saver, tiny_model: Callable[..., PreTrainedModel], architecture: str, tied: bool
) -> None:
    saved = save(tmp_path, architecture, tie_word_embeddings=tied)
    opened = open_artifact(tmp_path)
    assert opened == saved == open_artifact(tmp_path / "artifact")
    assert opened.tied_head == tied
    assert ("lm_head.weight" in opened.grids) != tied
    assert opened.recipe == {"teacher": "tiny", "seed": 0}
    assert opened.config["model_type"] == architecture
    quantized, kept = parts_of(tiny_model(architecture, tie_word_embeddings=tied))
    assert list(opened.grids) == list(quantized)
    assert opened.kept == list(kept)
    for name, tensor in quantized.items():
        stored = opened.quantized(name)
        assert stored.grid == tensor.grid
        assert torch.equal(stored.codes_NK, tensor.codes_NK)
        assert torch.equal(stored.scales_NG.view(torch.int16), tensor.scales_NG.view(torch.int16))
        assert opened.shape(name) == tuple(tensor.codes_NK.shape)
        assert tensor_sha256(opened.weight(name)) == opened.forward_sha256[name]
    for name, tensor in kept.items():
        assert torch.equal(opened.weight(name), tensor.detach())
        assert opened.shape(name) == tuple(tensor.shape)


def test_hugging_face_reads_its_files(tmp_path: Path, save: Saver, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    folder = save(tmp_path, "qwen3").folder
    assert AutoConfig.from_pretrained(folder).model_type == "qwen3"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Three apples and four pears?"}]
    ours = tiny_tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(chat, add_generation_prompt=True) == ours


def test_the_same_run_has_the_same_hash_and_another_has_not(tmp_path: Path, save: Saver) -> None:
    first = save(tmp_path / "a")
    assert save(tmp_path / "b").run_hash == first.run_hash
    assert save(tmp_path / "c", seed=1).run_hash != first.run_hash
    assert save(tmp_path / "d", intermediate_size=128).run_hash != first.run_hash


def test_hash_of_a_tensor_sees_every_bit() -> None:
    tensor = torch.tensor([[1.0, -0.0], [2.0, 3.0]])
    known = tensor_sha256(tensor)
    assert known == tensor_sha256(tensor.t().contiguous().t())
    assert known == tensor_sha256(tensor.double())
    assert known != tensor_sha256(tensor + 0.0)  # -0.0 became 0.0
    assert known != tensor_sha256(tensor.t())


def test_a_flipped_code_breaks_the_promise(tmp_path: Path, save: Saver) -> None:
    artifact = save(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(artifact.weights_file)
    tensors[f"{name}.codes"][3, 5] ^= 1
    save_file(tensors, artifact.weights_file)
    broken = [
        n for n in artifact.grids if tensor_sha256(open_artifact(tmp_path).weight(n)) != artifact.forward_sha256[n]
    ]
    assert broken == [name]


# ---------------------------------------------------------------------------------------------------- damage


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run.*qad train -o"):
        open_artifact(tmp_path / "nowhere")


def test_what_is_no_run_but_looks_like_something(tmp_path: Path, save: Saver) -> None:
    file = tmp_path / "student.gguf"
    file.touch()
    with pytest.raises(UserError, match=r"student.gguf is a file: name the run folder"):
        open_artifact(file)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model is a model and no run: `qad quantize .*model -o RUN`"):
        open_artifact(tmp_path / "model")
    artifact = save(tmp_path / "run")
    (artifact.folder / "artifact.json").unlink()
    for lost in (tmp_path / "run", artifact.folder):
        with pytest.raises(UserError, match="no such run"):
            open_artifact(lost)


def test_an_unfinished_run(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("{}")
    with pytest.raises(UserError, match="unfinished.*--resume"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("name", ["artifact.json", "config.json", "weights.safetensors"])
@pytest.mark.parametrize("keep", [0, 20, 0.5], ids=["empty", "20 bytes", "half"])
def test_a_cut_file(tmp_path: Path, save: Saver, name: str, keep: float) -> None:
    file = save(tmp_path).folder / name
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(UserError, match=r"damaged.*train or copy it again"):
        open_artifact(tmp_path)


def test_a_missing_file(tmp_path: Path, save: Saver) -> None:
    save(tmp_path).weights_file.unlink()
    with pytest.raises(UserError, match="damaged"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("part", ["model.embed_tokens.weight.scales", "model.norm.weight"])
def test_a_missing_tensor(tmp_path: Path, save: Saver, part: str) -> None:
    file = save(tmp_path).weights_file
    tensors = load_file(file)
    del tensors[part]
    save_file(tensors, file)
    with pytest.raises(UserError, match=f"lacks .*{part}"):
        open_artifact(tmp_path)


def test_a_format_of_the_future(tmp_path: Path, save: Saver) -> None:
    file = save(tmp_path).folder / "artifact.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="artifact format 99; this qad reads format 1"):
        open_artifact(tmp_path)


def test_an_unknown_grid(tmp_path: Path, save: Saver) -> None:
    artifact = save(tmp_path)
    with pytest.raises(UserError, match="unknown grid 'q1_0'; known: .*q4_0"):
        replace(artifact, grids={"model.embed_tokens.weight": "q1_0"}).quantized("model.embed_tokens.weight")


# ---------------------------------------------------------------------------------------------------- a full disk


def test_the_previous_artifact_survives_a_full_disk(small_disk: Path, save: Saver) -> None:
    before = save(small_disk)
    with pytest.raises(UserError, match="disk is full while writing .*artifact.*untouched"):
        save(small_disk, seed=1, intermediate_size=1024)
    assert open_artifact(small_disk) == before
    assert [path.name for path in small_disk.iterdir()] == ["artifact"]
