"""ONNX export: bit-exact by the format's text and by ONNX Runtime's own operators, and what comes along."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from qad.agreement import compare_runtime
from qad.errors import UserError
from qad.export import Exporter, exporter_for
from qad.export import gptq as gptq_module
from qad.export import onnx as onnx_module
from qad.grid import GRIDS
from qad.plan import KEEP
from qad.runtimes import Runtime
from qad.runtimes import ort as ort_module
from qad.verify import verify
from tests.helpers_commands import qad
from tests.helpers_exports import WIDE, Exported, exports_made_once, make_export
from tests.helpers_models import MODELS, make_artifact, make_tokenizer, verify_text
from tests.helpers_onnx import DOWN, NORM, initializer, place, read_model, save_model

onnx: Any = pytest.importorskip("onnx")

# The assignments make the type checker hold the modules to their protocols.
EXPORTER: Exporter = onnx_module
RUNTIME: Runtime = ort_module

# Case of helpers_models, grid of its linear layers.
CASES = {
    "llama-tied": "q4_0",
    "llama-untied": "q8_0",
    "llama-biases": "int4_g64",
    "qwen2": "int4_g128",
    "qwen3": "int8_g64",
    "qwen3-yarn": "int8_g128",
    "phi3": "q4_0",
    "gemma3": "q4_0",
}
every_case = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a maker of artifacts and their folders, each made once and not to be changed."""
    return exports_made_once(
        EXPORTER, "student-onnx", tmp_path_factory, lambda case: {"linear_grid": CASES[case], **WIDE}
    )


# ------------------------------------------------------------------------------------------------ what is exact


@every_case
def test_every_tensor_is_bit_exact_whatever_the_scales(case: str, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, case, extreme=True, linear_grid=CASES[case], **WIDE)
    assert EXPORTER.write(artifact, tmp_path / "student-onnx") == {}
    result = verify(tmp_path, tmp_path / "student-onnx")
    assert result.ok, result.mismatches
    assert result.quantized == result.exact == len(artifact.grids)
    assert result.kept == result.kept_exact == len(artifact.kept)
    assert not result.half
    assert result.file_run_hash == artifact.run_hash


@every_case
def test_onnx_runtime_decodes_the_trained_weights(case: str, exported: Exported) -> None:
    """Its GatherBlockQuantized looks every row of every quantized tensor up."""
    from onnxruntime import InferenceSession

    artifact, folder = exported(case)
    model = read_model(folder)
    for name, grid_name in artifact.grids.items():
        grid = GRIDS[grid_name]
        rows, columns = artifact.shape(name)
        tensors = [initializer(model, f"{name}.{part}") for part in ("codes", "scales")]
        arrays = [onnx.numpy_helper.to_array(tensor, base_dir=str(folder)) for tensor in tensors]
        helper = onnx.helper
        node = helper.make_node(
            "GatherBlockQuantized",
            ["codes", "rows", "scales"],
            ["out"],
            domain="com.microsoft",
            bits=grid.bits,
            block_size=grid.block,
            gather_axis=0,
            quantize_axis=1,
        )
        graph = helper.make_graph(
            [node],
            "lookup",
            [helper.make_tensor_value_info("rows", onnx.TensorProto.INT64, [rows])],
            [helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [rows, columns])],
            [
                onnx.numpy_helper.from_array(array.reshape(rows, -1), part)
                for array, part in zip(arrays, ("codes", "scales"), strict=True)
            ],
        )
        domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        lookup = helper.make_model(graph, opset_imports=domains, ir_version=10)
        found: Any = InferenceSession(lookup.SerializeToString()).run(None, {"rows": np.arange(rows)})[0]
        wanted = artifact.weight(name).numpy()
        assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32)), name


def test_the_builder_packs_a_gptq_folder_into_the_same_bytes(tmp_path: Path) -> None:
    """onnxruntime-genai reads GPTQ with code of its own: a second implementation of the layout."""
    artifact = make_artifact(tmp_path, "llama-tied")
    EXPORTER.write(artifact, tmp_path / "ours")
    gptq_module.write(artifact, tmp_path / "gptq")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", tmp_path / "gptq", "-p", "int4"]
    command += ["-o", tmp_path / "theirs", "-e", "cpu", "-c", tmp_path / "cache", "--extra_options", "fuse_qkv=false"]
    command += ["nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather", "hf_token=false"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    ours, theirs = read_model(tmp_path / "ours"), read_model(tmp_path / "theirs")
    compared = 0
    for name in artifact.grids:
        if ".layers." not in name:
            continue
        basis = name.removesuffix(".weight").replace("self_attn", "attn") + ".MatMulNBits"
        for part, part_theirs in (("codes", "qweight"), ("scales", "scales")):
            arrays = [
                onnx.numpy_helper.to_array(initializer(model, key), base_dir=str(folder))
                for model, key, folder in (
                    (ours, f"{name}.{part}", tmp_path / "ours"),
                    (theirs, f"{basis}.{part_theirs}", tmp_path / "theirs"),
                )
            ]
            assert arrays[0].tobytes() == arrays[1].tobytes(), name
            compared += 1
    assert compared == 28


# ------------------------------------------------------------------------------------------------ grids and heads


def test_grids_may_differ_from_tensor_to_tensor(tmp_path: Path) -> None:
    grids = {
        "model.embed_tokens.weight": "q4_0",
        "lm_head.weight": "int8_g64",
        "model.layers.0.self_attn.q_proj.weight": "q8_0",
        "model.layers.0.mlp.down_proj.weight": "int4_g128",
        "model.layers.1.self_attn.v_proj.weight": KEEP,
        "model.layers.1.mlp.up_proj.weight": "int8_g128",
    }
    artifact = make_artifact(tmp_path, "llama-untied", grids=grids, **WIDE)
    onnx_module.write(artifact, tmp_path / "out", accuracy_level=1)
    result = verify(tmp_path, tmp_path / "out")
    assert result.ok, result.mismatches
    assert (result.exact, result.kept_exact) == (15, 6)
    assert compare_runtime(tmp_path, tmp_path / "out", verify_text(), threads=1).kl < 1e-9


@pytest.mark.parametrize("case", ["llama-tied", "llama-untied"])
def test_embedding_and_head_that_were_kept(case: str, tmp_path: Path) -> None:
    names = ("model.embed_tokens.weight", "lm_head.weight")
    artifact = make_artifact(tmp_path, case, grids=dict.fromkeys(names, KEEP))
    onnx_module.write(artifact, tmp_path / "out", accuracy_level=1)
    assert verify(tmp_path, tmp_path / "out").ok
    assert compare_runtime(tmp_path, tmp_path / "out", verify_text(), threads=1).kl < 1e-9


def test_a_tied_head_reads_the_embeddings_bytes(exported: Exported) -> None:
    artifact, folder = exported("llama-tied")
    model = read_model(folder)
    codes = [place(model, f"{name}.weight.codes") for name in ("model.embed_tokens", "lm_head")]
    assert codes[0] == codes[1]
    tables = artifact.config["max_position_embeddings"] * 2 * 32 * 4
    stored = sum(
        rows * columns * GRIDS[grid].bits // 8 + rows * columns // GRIDS[grid].block * 4
        for name, grid in artifact.grids.items()
        for rows, columns in [artifact.shape(name)]
    )
    kept = sum(4 * artifact.shape(name)[0] for name in artifact.kept)
    size = (folder / "model.onnx.data").stat().st_size
    # No more than a page of padding for each tensor.
    assert 0 <= size - stored - kept - tables < 4096 * (2 * len(artifact.grids) + len(artifact.kept) + 2)
    untied = read_model(exported("llama-untied")[1])
    assert place(untied, "model.embed_tokens.weight.codes") != place(untied, "lm_head.weight.codes")


def test_every_tensor_is_aligned(exported: Exported) -> None:
    for case in ("llama-biases", "phi3", "gemma3"):
        _, folder = exported(case)
        model = read_model(folder)
        for entry in model.graph.initializer:
            if entry.data_location == onnx.TensorProto.EXTERNAL:
                assert int(place(model, entry.name)["offset"]) % 64 == 0


# ------------------------------------------------------------------------------------------------ another target


def test_a_graph_for_cuda(tmp_path: Path) -> None:
    """It cannot run here. What it stores is exact all the same: fp16 scales, and float32 behind a Cast."""
    artifact = make_artifact(tmp_path, "llama-biases", extreme=True)
    onnx_module.write(artifact, tmp_path / "out", target="cuda")
    result = verify(tmp_path, tmp_path / "out")
    assert result.ok, result.mismatches
    assert result.kept_exact == len(artifact.kept) > 0
    model = read_model(tmp_path / "out")
    types = {entry.name: entry.data_type for entry in model.graph.initializer}
    assert types[f"{DOWN}.scales"] == onnx.TensorProto.FLOAT16
    assert types[NORM] == types["model.layers.0.mlp.up_proj.bias"] == onnx.TensorProto.FLOAT
    casts = {node.input[0] for node in model.graph.node if node.op_type == "Cast"}
    assert set(artifact.kept) <= casts
    (options,) = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"][
        "session_options"
    ]["provider_options"]
    assert list(options) == ["cuda"]


# ------------------------------------------------------------------------------------------------ what comes along


@every_case
def test_tokenizer_and_settings_come_along(case: str, exported: Exported) -> None:
    artifact, folder = exported(case)
    wanted = make_tokenizer(MODELS[case].tokenizer)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(verify_text())["input_ids"] == wanted(verify_text())["input_ids"]
    assert tokenizer.chat_template == wanted.chat_template
    settings: Any = GenerationConfig.from_pretrained(folder)
    assert settings.eos_token_id == wanted.eos_token_id
    genai = json.loads((folder / "genai_config.json").read_text())["model"]
    assert genai["eos_token_id"] == wanted.eos_token_id
    assert genai["context_length"] == artifact.config["max_position_embeddings"]
    assert not (folder / "artifact.json").exists()
    assert not (folder / "weights.safetensors").exists()
    assert exporter_for(folder) is EXPORTER


@pytest.mark.parametrize("case", ["llama-tied", "qwen3", "gemma3"])
def test_onnxruntime_genai_generates_the_same(case: str, exported: Exported) -> None:
    genai: Any = importlib.import_module("onnxruntime_genai")
    _, folder = exported(case)
    with RUNTIME.open(folder, threads=1) as session:
        prompt = session.chat_prompt("How many apples? 12!")
        wanted = [piece.token for piece in session.stream(prompt, 16) if piece.token is not None]
    model = genai.Model(str(folder))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(prompt) + len(wanted), do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(prompt)
    made = []
    while not generator.is_done() and len(made) < len(wanted):
        generator.generate_next_token()
        made.append(int(generator.get_next_tokens()[0]))
    assert made == wanted


# ------------------------------------------------------------------------------------------------ files


def test_progress_reaches_the_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    EXPORTER.write(make_artifact(tmp_path, "qwen2"), tmp_path / "out", lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] <= (tmp_path / "out" / "model.onnx.data").stat().st_size


def test_an_interrupted_write_leaves_the_old_folder(tmp_path: Path) -> None:
    artifact, folder = make_export(onnx_module, tmp_path / "run" / "student-onnx", "llama-tied")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        EXPORTER.write(artifact, folder, interrupt)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(".")] == []


def test_full_disk_keeps_the_previous_folder(small_disk: Path, tmp_path: Path) -> None:
    target = small_disk / "student-onnx"
    small = make_artifact(
        tmp_path / "small",
        "llama-tied",
        vocab_size=600,
        num_hidden_layers=1,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    EXPORTER.write(small, target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(UserError, match="disk is full"):
        EXPORTER.write(make_artifact(tmp_path / "large", "llama-untied"), target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    assert list(small_disk.iterdir()) == [target]


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    artifact, folder = make_export(onnx_module, tmp_path / "run" / "student-onnx", "llama-tied")
    (folder / "old.onnx.data").write_bytes(b"")
    EXPORTER.write(artifact, folder)
    assert not (folder / "old.onnx.data").exists()
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    model = read_model(folder)
    del model.metadata_props[:]
    del model.graph.initializer[:]
    del model.graph.node[:]
    save_model(foreign, model)
    for target in (tmp_path / "thesis", foreign, artifact.folder.parent, artifact.folder, tmp_path):
        before = sorted(target.rglob("*"))
        with pytest.raises(UserError, match="no ONNX export of qad: name another folder with -o"):
            EXPORTER.write(artifact, target)
        assert sorted(target.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ the command line


def test_export_and_run_by_command(tmp_path: Path) -> None:
    make_artifact(tmp_path, "llama-untied")
    folder = tmp_path / "student-onnx"
    refused = qad("export", tmp_path, "--format", "gguf", "--accuracy-level", "1")
    assert refused.returncode == 2
    assert "options of --format onnx" in refused.stderr
    done = qad("export", tmp_path, "--format", "onnx", "--accuracy-level", "1")
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout
    assert "Reading layer" not in done.stdout + done.stderr
    levels = {
        attribute.i
        for node in read_model(folder).graph.node
        for attribute in node.attribute
        if attribute.name == "accuracy_level"
    }
    assert levels == {1}
    asked = qad("run", folder, "How many apples?", "--new-tokens", "5", "--threads", "1")
    assert asked.returncode == 0, asked.stderr
    assert asked.stdout.strip()
    assert "tokens/s" in asked.stderr


def test_the_builder_leaves_no_modules_behind(exported: Exported) -> None:
    exported("llama-tied")
    strangers = {"builders", "builder_config", "quantization", "loaders"}
    assert not {name.split(".")[0] for name in sys.modules} & strangers
    assert not [place for place in sys.path if "onnxruntime_genai" in place]


def test_nothing_is_computed_in_float64(exported: Exported) -> None:
    """The decoder's weights are float32 whatever it reads, so that bits can be compared."""
    _, folder = exported("qwen3")
    weights = EXPORTER.read(folder)
    assert {weights[name].dtype for name in weights} == {np.dtype(np.float32)}
    assert torch.from_numpy(weights[NORM]).dtype == torch.float32
