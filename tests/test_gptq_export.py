"""GPTQ export: bit-exact by the format's text, by GPTQModel's own layers, and as a model that runs; clear refusals."""

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, GPTQConfig

from qad import runtimes
from qad.agreement import compare_runtime
from qad.artifact import Artifact, open_artifact
from qad.errors import UserError
from qad.export import Exporter, Rounding
from qad.export import gptq as gptq_module
from qad.grid import GRIDS
from qad.runtimes import Runtime
from qad.runtimes import gptq as gptq_runtime
from qad.verify import verify
from qad.verify_command import verify_command
from tests.helpers_commands import qad
from tests.helpers_exports import WIDE, Exported, exports_made_once, make_export
from tests.helpers_models import MODELS, make_artifact, make_tokenizer, verify_text
from tests.helpers_runtimes import needs

# The assignments make the type checker hold the modules to their protocols.
EXPORTER: Exporter = gptq_module
RUNTIME: Runtime = gptq_runtime
needs_gptqmodel = needs("gptq")

# Case of helpers_models, grid of its linear layers.
CASES = {
    "llama-tied": "q4_0",
    "llama-untied": "q8_0",
    "llama-biases": "int4_g64",
    "qwen2": "int4_g128",
    "qwen3": "int8_g64",
    "qwen3-yarn": "int8_g128",
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a maker of artifacts and their folders, each made once and not to be changed."""
    return exports_made_once(
        EXPORTER, "student-gptq", tmp_path_factory, lambda case: {"linear_grid": CASES[case], **WIDE}
    )


def linear_names(artifact: Artifact) -> list[str]:
    return [name for name in artifact.grids if ".layers." in name]


def position(file: Path, tensor: str) -> int:
    """Return where in a safetensors file a tensor's bytes begin."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return 8 + length + json.loads(data[8 : 8 + length])[tensor]["data_offsets"][0]


def flip(file: Path, tensor: str, byte: int, bits: int) -> None:
    data = bytearray(file.read_bytes())
    data[position(file, tensor) + byte] ^= bits
    file.write_bytes(data)


# ------------------------------------------------------------------------------------------------ what is exact


@every_case
def test_linear_layers_are_bit_exact_whatever_the_scales(case: str, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, case, extreme=True, linear_grid=CASES[case], **WIDE)
    rounded = EXPORTER.write(artifact, tmp_path / "student-gptq")
    result = verify(tmp_path, tmp_path / "student-gptq")
    assert result.ok, result.mismatches
    assert result.quantized == result.exact == len(linear_names(artifact)) == 14
    assert result.kept == 0
    assert set(rounded) == set(result.half) == EXPORTER.only_half(artifact)
    assert len(result.half) == len(artifact.grids) - 14 + len(artifact.kept)
    assert result.file_run_hash == artifact.run_hash


@every_case
def test_the_tensors_are_those_of_the_format(case: str, exported: Exported) -> None:
    artifact, folder = exported(case)
    grid = GRIDS[CASES[case]]
    tensors = load_file(folder / "model.safetensors")
    packed = 32 // grid.bits
    for name in linear_names(artifact):
        rows, columns = artifact.shape(name)
        layer = name.removesuffix(".weight")
        parts = {part: tensors.pop(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
        assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()} == {
            "qweight": (torch.int32, (columns // packed, rows)),
            "qzeros": (torch.int32, (columns // grid.block, rows // packed)),
            "scales": (torch.float16, (columns // grid.block, rows)),
            "g_idx": (torch.int32, (columns,)),
        }
        zero = {4: 0x77777777, 8: 0x7F7F7F7F}[grid.bits]
        assert bool((parts["qzeros"] == zero).all())
        assert parts["g_idx"].tolist() == [column // grid.block for column in range(columns)]
        torch.testing.assert_close(parts["scales"], artifact.quantized(name).scales_NG.T, rtol=0, atol=0)
    assert set(tensors) == {name for name in (*artifact.grids, *artifact.kept) if name not in linear_names(artifact)}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert ("lm_head.weight" in tensors) is not artifact.tied_head


@needs_gptqmodel
@every_case
def test_gptqmodel_decodes_the_trained_weights(case: str, exported: Exported) -> None:
    """4-bit products fit fp16 exactly; 8-bit ones are its nearest values."""
    artifact, folder = exported(case)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = gptq_runtime.load(folder)
    decoded = 0
    for name, module in model.named_modules():
        if not hasattr(module, "qweight"):
            continue
        decoded += 1
        exact = artifact.weight(f"{name}.weight")
        found = module.dequantize_weight().T
        assert type(module).__name__ == "TorchLinear"
        assert found.dtype == torch.float16
        wanted = exact if GRIDS[CASES[case]].bits == 4 else exact.to(torch.float16).float()
        assert torch.equal(found.float().contiguous().view(torch.int32), wanted.view(torch.int32)), name
    assert decoded == 14
    others = {name: tensor for name, tensor in model.state_dict().items() if name in EXPORTER.only_half(artifact)}
    assert set(others) == EXPORTER.only_half(artifact)
    for name, tensor in others.items():
        assert torch.equal(tensor, artifact.weight(name).to(torch.float16)), name
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@needs_gptqmodel
@every_case
def test_gptqmodel_computes_what_torch_computes(case: str, exported: Exported) -> None:
    """fp16 activations, embeddings and norms: KL of 5e-6 to 2e-5 on these models, whose logits are steep."""
    artifact, folder = exported(case)
    agreement = compare_runtime(artifact.folder.parent, folder, verify_text(), threads=1)
    assert agreement.kl < 1e-4
    assert agreement.same_top > 0.97
    assert agreement.same_tokens
    assert runtimes.runtime_for(folder) is gptq_runtime


@needs_gptqmodel
def test_transformers_loads_the_folder(exported: Exported) -> None:
    pytest.importorskip("optimum")
    from transformers import AutoModelForCausalLM

    artifact, folder = exported("llama-untied")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu")
    tokens = torch.tensor([make_tokenizer("llama3").encode("The gulls follow the boats past the breakwater.")])
    with torch.inference_mode(), runtimes.get("reference").open(artifact.folder.parent, threads=1) as reference:
        found = model(tokens).logits.float().log_softmax(-1)
        wanted = torch.from_numpy(reference.logits(tokens)).log_softmax(-1)
    assert float((wanted.exp() * (wanted - found)).sum(-1).mean()) < 1e-3


def test_rounding_to_fp16_is_measured(exported: Exported) -> None:
    artifact, folder = exported("llama-untied")
    result = verify(artifact.folder.parent, folder)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        exact = artifact.weight(name).double()
        errors = (exact.half().double() - exact).abs()[exact != 0] / exact.abs()[exact != 0]
        measured = result.half[name]
        assert measured.values == errors.numel()
        assert measured.changed == int((errors > 0).sum())
        assert (measured.largest, measured.mean) == pytest.approx((float(errors.max()), float(errors.mean())))
        noted = json.loads((folder / "quantize_config.json").read_text())["meta"]["fp16_relative_error"][name]
        assert (noted["largest"], noted["mean"]) == pytest.approx((measured.largest, measured.mean))
        assert 0 < measured.largest <= 2**-11
    assert result.products is not None
    assert 0.3 < result.products.changed / result.products.values < 0.7
    artifact, folder = exported("llama-tied")
    four = verify(artifact.folder.parent, folder).products
    assert four is not None
    assert four.changed == 0


def test_what_fp16_does_not_reach_counts_as_infinitely_wrong() -> None:
    rounding = Rounding.of(np.array([1.0, 0.0, 1e6, 2.0**-30], dtype=np.float32))
    assert (rounding.values, rounding.changed, rounding.largest) == (3, 2, float("inf"))


# ------------------------------------------------------------------------------------------------ one wrong bit


@pytest.mark.parametrize(
    ("part", "byte", "bits", "row", "column"),
    [
        ("qweight", 0, 0x01, 0, 0),
        ("qweight", 4 * 3 + 1, 0x80, 3, 3),
        ("qzeros", 1, 0x10, 3, 0),
        ("scales", 2 * 5, 1, 5, 0),
    ],
)
def test_one_flipped_bit(part: str, byte: int, bits: int, row: int, column: int, tmp_path: Path) -> None:
    artifact, folder = make_export(EXPORTER, tmp_path / "run" / "student-gptq", "llama-tied")
    flip(folder / "model.safetensors", f"model.layers.1.mlp.down_proj.{part}", byte, bits)
    (mismatch,) = verify(artifact.folder.parent, folder).mismatches
    assert mismatch.name == "model.layers.1.mlp.down_proj.weight"
    assert mismatch.first[0] == row
    assert mismatch.first[1] >= column
    assert mismatch.differing == 1 if part == "qweight" else 1 < mismatch.differing <= 32


def test_verify_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, folder = make_export(EXPORTER, tmp_path / "student-gptq", "llama-untied")
    run = artifact.folder.parent
    assert verify_command(run, [folder], runtime=False) == 0
    out = capsys.readouterr().out
    assert "bit-exact: 14 of 14 tensors" in out
    assert "held in fp16 only: 7 of 7 tensors are the nearest fp16 values" in out
    assert "model.embed_tokens.weight: relative error" in out
    assert "exact in float32; a runtime that multiplies in fp16 rounds" in out
    flip(folder / "model.safetensors", "model.norm.weight", 4, 1)
    flip(folder / "model.safetensors", "model.layers.0.self_attn.q_proj.qweight", 4, 1)
    assert verify_command(run, [folder], runtime=False) == 1
    out = capsys.readouterr().out
    assert "bit-exact: 13 of 14 tensors" in out
    assert "held in fp16 only: 6 of 7" in out
    assert "model.norm.weight: the file's weights are not the artifact's rounded to fp16 (1 weights" in out


@needs_gptqmodel
def test_verify_runs_the_folder(exported: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, folder = exported("llama-tied")
    assert verify_command(artifact.folder.parent, [folder], threads=1) == 0
    out = capsys.readouterr().out
    assert "keeps every one of them too" in out
    assert "same top-1" in out
    assert "INFO" not in out


def test_another_runs_folder(exported: Exported, tmp_path: Path) -> None:
    _, folder = exported("llama-tied")
    make_artifact(tmp_path, "qwen3", **WIDE)
    result = verify(tmp_path, folder)
    assert not result.ok
    assert result.exact == 0
    assert result.file_run_hash != result.run_hash


# ------------------------------------------------------------------------------------------------ configurations


@every_case
def test_configurations_are_accepted(case: str, exported: Exported) -> None:
    artifact, folder = exported(case)
    grid = GRIDS[CASES[case]]
    own = json.loads((folder / "quantize_config.json").read_text())
    config: Any = AutoConfig.from_pretrained(folder)
    assert config.quantization_config == own
    assert config.tie_word_embeddings is artifact.tied_head
    assert config.dtype == torch.float16
    # What vLLM's loader asks for: the class, and these keys.
    assert config.architectures == [
        f"{ {'llama': 'Llama', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3'}[config.model_type] }ForCausalLM"
    ]
    wanted = {"bits": grid.bits, "group_size": grid.block, "sym": True, "desc_act": False, "lm_head": False}
    assert {key: own[key] for key in wanted} == wanted
    assert (own["quant_method"], own["checkpoint_format"], own["pack_dtype"]) == ("gptq", "gptq", "int32")
    assert own["meta"]["run_hash"] == artifact.run_hash
    parsed: Any = GPTQConfig.from_dict(own)
    assert (parsed.bits, parsed.group_size, parsed.sym, parsed.desc_act) == (grid.bits, grid.block, True, False)
    for key, value in artifact.config.items():
        if key not in ("dtype", "architectures", "tie_word_embeddings"):
            assert json.loads((folder / "config.json").read_text())[key] == value


@every_case
def test_tokenizer_and_generation_settings_come_along(case: str, exported: Exported) -> None:
    _, folder = exported(case)
    wanted = make_tokenizer(MODELS[case].tokenizer)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(verify_text())["input_ids"] == wanted(verify_text())["input_ids"]
    assert tokenizer.chat_template == wanted.chat_template
    settings: Any = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == wanted.eos_token_id
    assert not (folder / "artifact.json").exists()
    assert not (folder / "weights.safetensors").exists()


def test_generation_settings_of_the_artifact_are_kept(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    GenerationConfig(eos_token_id=[2, 5], temperature=0.6, do_sample=True).save_pretrained(artifact.folder)
    EXPORTER.write(artifact, tmp_path / "out")
    settings: Any = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (settings.eos_token_id, settings.temperature) == ([2, 5], 0.6)


# ------------------------------------------------------------------------------------------------ files


def test_shards(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "qwen2", **WIDE)
    seen: list[tuple[int, int]] = []
    limit = 300_000
    gptq_module.write(artifact, tmp_path / "out", lambda done, total: seen.append((done, total)), shard_bytes=limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert count > 2
    assert [file.name for file in files] == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    total = 0
    for file in files:
        tensors = load_file(file)
        assert all(index["weight_map"][name] == file.name for name in tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= limit or len(tensors) == 1
        total += size
    assert total == index["metadata"]["total_size"] == seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)
    assert len(index["weight_map"]) == sum(len(load_file(file)) for file in files)
    assert verify(tmp_path, tmp_path / "out").ok
    (tmp_path / "out" / files[1].name).unlink()
    with pytest.raises(UserError, match="missing, truncated or damaged"):
        verify(tmp_path, tmp_path / "out")


def test_every_tensor_is_aligned(exported: Exported) -> None:
    _, folder = exported("qwen2")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
        size = {"I32": 4, "F16": 2}
        for name in names:
            assert position(folder / "model.safetensors", name) % size[file.get_slice(name).get_dtype()] == 0


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"intermediate_size": 4096, "tie_word_embeddings": True}
    peaks = []
    for layers in (2, 10):
        artifact = make_artifact(tmp_path / str(layers), "llama-tied", num_hidden_layers=layers, **sizes)
        EXPORTER.write(artifact, tmp_path / "warm")
        tracemalloc.start()
        EXPORTER.write(artifact, tmp_path / f"out-{layers}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 4096 * 192 / 2


def test_full_disk_keeps_the_previous_folder(small_disk: Path, tmp_path: Path) -> None:
    target = small_disk / "student-gptq"
    small = make_artifact(tmp_path / "small", "llama-tied", vocab_size=600, num_hidden_layers=1, intermediate_size=32)
    EXPORTER.write(small, target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(UserError, match="disk is full"):
        EXPORTER.write(make_artifact(tmp_path / "large", "llama-untied"), target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert list(small_disk.iterdir()) == [target]
    assert verify(tmp_path / "small", target).ok


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    artifact, folder = make_export(EXPORTER, tmp_path / "run" / "student-gptq", "llama-tied")
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    EXPORTER.write(artifact, folder)
    assert not (folder / "model-00001-of-00002.safetensors").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "quantize_config.json").write_text('{"bits": 4, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}')
    for target in (tmp_path / "thesis", foreign, artifact.folder.parent, artifact.folder, tmp_path):
        before = sorted(path for path in target.rglob("*"))
        with pytest.raises(UserError, match="no GPTQ export of qad: name another folder with -o"):
            EXPORTER.write(artifact, target)
        assert sorted(path for path in target.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    EXPORTER.write(artifact, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        EXPORTER.write(artifact, tmp_path / "file")


# ------------------------------------------------------------------------------------------------ the command line


@needs_gptqmodel
def test_export_and_run_by_command(tmp_path: Path) -> None:
    make_artifact(tmp_path, "llama-untied", **WIDE)
    folder = tmp_path / "student-gptq"
    done = qad("export", tmp_path, "--format", "gptq")
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout
    assert "model.embed_tokens.weight: relative error" in done.stdout
    assert "norms and biases: relative error" in done.stdout
    asked = qad("run", folder, "How many apples?", "--new-tokens", "5", "--threads", "1")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    assert "GPT-QModel" not in asked.stdout + asked.stderr
    assert "tokens/s" in asked.stderr


# ------------------------------------------------------------------------------------------------ refusals


def test_one_width_for_all_linear_layers(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied", grids={"model.layers.1.mlp.down_proj.weight": "q8_0"})
    with pytest.raises(UserError, match=r"one group size for all linear layers.*q4_0, q8_0; formats that can: gguf"):
        EXPORTER.write(artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_features_that_no_word_packs(tmp_path: Path) -> None:
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 36}
    artifact = make_artifact(tmp_path, "qwen3", **heads)
    wanted = r"k_proj.weight has 36 output features.*zero points of 8 into a word; formats that can: gguf"
    with pytest.raises(UserError, match=wanted):
        EXPORTER.write(artifact, tmp_path / "out")


def test_values_that_fp16_does_not_reach(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied", extreme=True)
    with pytest.raises(
        UserError, match=r"model.embed_tokens.weight holds values up to .*65504; formats that can: gguf"
    ):
        EXPORTER.write(artifact, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_architecture_and_tensors(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    description = json.loads((artifact.folder / "config.json").read_text())
    (artifact.folder / "config.json").write_text(json.dumps(description | {"model_type": "mamba"}))
    with pytest.raises(UserError, match="'mamba' is not supported; supported: llama, qwen2, qwen3"):
        EXPORTER.write(open_artifact(tmp_path), tmp_path / "out")
    (artifact.folder / "config.json").write_text(json.dumps(description | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match=r"has no model.layers.1"):
        EXPORTER.write(open_artifact(tmp_path), tmp_path / "out")


def test_missing_tokenizer(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    for file in artifact.folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        EXPORTER.write(artifact, tmp_path / "out")


# ------------------------------------------------------------------------------------------------ damaged folders


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("quantize_config.json", lambda old: {**old, "bits": 8}, "disagree about bits"),
        ("config.json", lambda old: {**old, "quantization_config": None}, "no quantization_config"),
        ("config.json", lambda old: [], "holds no object"),
    ],
)
def test_configurations_that_contradict(file: str, change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    artifact, folder = make_export(EXPORTER, tmp_path / "run" / "student-gptq", "llama-tied")
    (folder / file).write_text(json.dumps(change(json.loads((folder / file).read_text()))))
    with pytest.raises(UserError, match=message):
        verify(artifact.folder.parent, folder)


def test_other_checkpoint_formats(tmp_path: Path) -> None:
    artifact, folder = make_export(EXPORTER, tmp_path / "run" / "student-gptq", "llama-tied")

    def set_format(name: str) -> None:
        for file, inside in (("quantize_config.json", None), ("config.json", "quantization_config")):
            content = json.loads((folder / file).read_text())
            (content if inside is None else content[inside])["checkpoint_format"] = name
            (folder / file).write_text(json.dumps(content))

    set_format("gptq_v2")
    # Zero points one too small: every weight of a linear layer differs.
    assert verify(artifact.folder.parent, folder).exact == 0
    set_format("marlin")
    with pytest.raises(UserError, match="checkpoint format 'marlin'"):
        verify(artifact.folder.parent, folder)


def test_truncated_and_scrambled_files(tmp_path: Path) -> None:
    artifact, folder = make_export(EXPORTER, tmp_path / "run" / "student-gptq", "llama-tied")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    for length in (0, 4, 8, 100, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match="missing, truncated or damaged"):
            verify(artifact.folder.parent, folder)
    (header,) = struct.unpack("<Q", data[:8])
    random = np.random.default_rng(0)
    for _ in range(200):
        scrambled = bytearray(data)
        scrambled[int(random.integers(0, 8 + header))] = int(random.integers(0, 256))
        file.write_bytes(scrambled)
        try:
            verify(artifact.folder.parent, folder)
        except UserError:
            continue
    file.write_bytes(data)
    at = position(file, "model.layers.0.mlp.up_proj.g_idx")
    file.write_bytes(data[:at] + struct.pack("<i", 10**6) + data[at + 4 :])
    with pytest.raises(UserError, match="g_idx names groups beyond"):
        verify(artifact.folder.parent, folder)


@needs_gptqmodel
def test_a_folder_that_gptqmodel_cannot_load(tmp_path: Path) -> None:
    _, folder = make_export(EXPORTER, tmp_path / "run" / "student-gptq", "llama-tied")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="gptqmodel cannot load"):
        RUNTIME.open(folder, threads=1)
    with pytest.raises(UserError, match="unknown device"):
        RUNTIME.open(folder, device="npu")
