"""ONNX export: bit-exact by the format's text and by ONNX Runtime's own operators, and as a model that runs."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from qad import runtimes
from qad.agreement import compare_runtime
from qad.artifact import Artifact, open_artifact
from qad.errors import UserError
from qad.export import Exporter, _onnx_wide, exporter_for
from qad.export import gptq as gptq_module
from qad.export import onnx as onnx_module
from qad.grid import GRIDS
from qad.plan import KEEP
from qad.runtimes import Runtime
from qad.runtimes import ort as ort_module
from qad.verify import verify
from qad.verify_command import verify_command
from tests.helpers_models import MODELS, make_artifact, make_tokenizer, verify_text

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime_genai")

# The assignments make the type checker hold the modules to their protocols.
EXPORTER: Exporter = onnx_module
RUNTIME: Runtime = ort_module

# All widths divide by 128. Case of helpers_models, grid of its linear layers.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
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
# ONNX Runtime rotates a multiple of 16 dimensions; the twelve of this case are 24.
RUNNABLE = [case for case in MODELS if case != "phi3-longrope"]
Exported = Callable[..., tuple[Artifact, Path]]
NORM = "model.norm.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a maker of artifacts and their folders, each made once and not to be changed."""
    made: dict[str, tuple[Artifact, Path]] = {}

    def make(case: str) -> tuple[Artifact, Path]:
        if case not in made:
            run = tmp_path_factory.mktemp(case)
            artifact = make_artifact(run, case, linear_grid=CASES[case], **WIDE)
            EXPORTER.write(artifact, run / "student-onnx")
            made[case] = artifact, run / "student-onnx"
        return made[case]

    return make


@pytest.fixture
def fresh(tmp_path: Path) -> Exported:
    """Return a maker of folders of one's own."""

    def make(case: str = "llama-tied", **options: Any) -> tuple[Artifact, Path]:
        artifact = make_artifact(tmp_path / "run", case, **options)
        EXPORTER.write(artifact, tmp_path / "run" / "student-onnx")
        return artifact, tmp_path / "run" / "student-onnx"

    return make


def read_model(folder: Path) -> Any:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def save_model(folder: Path, model: Any) -> None:
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def initializer(model: Any, name: str) -> Any:
    (found,) = [entry for entry in model.graph.initializer if entry.name == name]
    return found


def place(model: Any, name: str) -> dict[str, str]:
    return {entry.key: entry.value for entry in initializer(model, name).external_data}


def set_place(model: Any, name: str, key: str, value: str) -> None:
    for entry in initializer(model, name).external_data:
        if entry.key == key:
            entry.value = value


def flip(folder: Path, name: str, byte: int, bits: int) -> None:
    with (folder / "model.onnx.data").open("r+b") as file:
        at = int(place(read_model(folder), name)["offset"]) + byte
        file.seek(at)
        (old,) = file.read(1)
        file.seek(at)
        file.write(bytes([old ^ bits]))


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


@pytest.mark.parametrize("case", RUNNABLE)
def test_onnx_runtime_computes_what_torch_computes(case: str, tmp_path: Path) -> None:
    """Level 1 is float32: KL of 1e-14 to 1e-11. Level 4 rounds inputs to 8 bits: up to 3e-3 on these steep logits."""
    artifact = make_artifact(tmp_path, case)
    onnx_module.write(artifact, tmp_path / "exact", accuracy_level=1)
    exact = compare_runtime(tmp_path, tmp_path / "exact", verify_text(), threads=1)
    assert exact.kl < 1e-9
    assert exact.same_top > 0.999
    assert exact.same_tokens
    assert exact.tokens >= 512
    assert exact.torch_answer == exact.runtime_answer
    onnx_module.write(artifact, tmp_path / "fast")
    fast = compare_runtime(tmp_path, tmp_path / "fast", verify_text(), threads=1)
    assert exact.kl * 100 < fast.kl < 2e-2


def products(folder: Path) -> dict[str, tuple[int, bool]]:
    """Return the accuracy level of each product, and whether it takes its input in two parts, by its name's end."""
    found: dict[str, tuple[int, bool]] = {}
    nodes = read_model(folder).graph.node
    stacked = {name for node in nodes if node.op_type == "Concat" for name in node.output}
    for node in nodes:
        if node.op_type == "MatMulNBits":
            (level,) = [attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"]
            found[node.name.removesuffix("/MatMul").rpartition("/")[2]] = level, node.input[0] in stacked
    return found


@pytest.mark.parametrize("grid", ["q4_0", "q8_0"])
def test_wide_inputs_are_where_they_were_asked_for(grid: str, tmp_path: Path) -> None:
    """In two parts; if all are, products with 4 bits, which the head here has not, have level 1 instead."""
    artifact = make_artifact(tmp_path, "llama-tied", linear_grid=grid)
    sensitive = {"q_proj", "k_proj", "v_proj", "lm_head"}
    for asked in ("none", "sensitive", "all"):
        onnx_module.write(artifact, tmp_path / asked, wide_inputs=asked)
        found = products(tmp_path / asked)
        assert len(found) == 8
        for name, way in found.items():
            kept = asked == "all" or (asked == "sensitive" and name in sensitive)
            exact = asked == "all" and grid == "q4_0" and name != "lm_head"
            assert way == ((1, False) if exact else (4, kept)), (asked, name)
        assert verify(tmp_path, tmp_path / asked).ok
        properties = {entry.key: entry.value for entry in read_model(tmp_path / asked).metadata_props}
        assert (properties["qad.accuracy_level"], properties["qad.wide_inputs"]) == ("4", asked)
    onnx_module.write(artifact, tmp_path / "default")
    assert products(tmp_path / "default") == products(tmp_path / "sensitive")
    said = verify(tmp_path, tmp_path / "all").computing
    one, parts = "accuracy level 1: 14 products", "accuracy level 4, input in two parts"
    assert said == (f"{one}; {parts}: 1 products" if grid == "q4_0" else f"{parts}: 15 products")


@pytest.mark.parametrize("grid", ["q4_0", "q8_0"])
def test_wide_inputs_bring_the_runtime_nearer_to_torch(grid: str, tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-untied", linear_grid=grid)
    kl = {}
    for asked in ("none", "sensitive", "all"):
        onnx_module.write(artifact, tmp_path / asked, wide_inputs=asked)
        kl[asked] = compare_runtime(tmp_path, tmp_path / asked, verify_text(), threads=1).kl
    assert kl["sensitive"] < 0.8 * kl["none"], kl
    # Two parts have 127 times the steps, and the divergence goes with the square.
    assert kl["all"] < 1e-3 * kl["none"], kl


@pytest.mark.parametrize("block", [32, 64, 128])
def test_an_input_in_two_parts_is_multiplied_as_in_float32(block: int) -> None:
    """ONNX Runtime's product of two parts against numpy's in float64: 16 bits, not 8, and zeros stay."""
    import onnxruntime

    helper, rows, columns = onnx.helper, 48, 256
    random = np.random.default_rng(block)
    codes = random.integers(0, 256, (rows, columns // block, block), dtype=np.uint8)
    scales = random.uniform(0.5, 1.5, (rows, columns // block)).astype(np.float32)
    values = random.standard_normal((2, 3, columns)).astype(np.float32)
    values *= np.exp(random.uniform(-3, 3, values.shape)).astype(np.float32)
    values[1, 0] = 0
    values[0, 1, :block] = 0
    tables: dict[str, Any] = {"codes": codes, "scales": scales}
    splitter = _onnx_wide.Splitter(tables)
    both, nodes = splitter.split("x", columns, block)
    assert splitter.split("x", columns, block) == (both, [])
    settings = {"K": columns, "N": rows, "bits": 8, "block_size": block, "accuracy_level": 4}
    for name, output in ((both, "parts"), ("x", "plain")):
        nodes.append(
            helper.make_node("MatMulNBits", [name, "codes", "scales"], [output], domain="com.microsoft", **settings)
        )
    nodes.append(splitter.join("parts", "y"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["B", "T", columns])],
        [helper.make_tensor_value_info(name, 1, None) for name in ("y", "plain")],
        [onnx.numpy_helper.from_array(table, name) for name, table in tables.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: Any = session.run(["y", "plain"], {"x": values})
    found, plain = outputs
    weight = (codes.astype(np.float64) - 128) * scales[:, :, None]
    wanted = values.astype(np.float64) @ weight.reshape(rows, columns).T
    assert found.shape == wanted.shape
    assert not found[1, 0].any()
    error, coarse = (np.sqrt(np.mean((made - wanted) ** 2) / np.mean(wanted**2)) for made in (found, plain))
    assert coarse > 2e-3
    assert error < coarse / 100


def test_windows_are_kept_beyond_their_length(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "mistral-window", sliding_window=48)
    onnx_module.write(artifact, tmp_path / "out", accuracy_level=1)
    agreement = compare_runtime(tmp_path, tmp_path / "out", verify_text(), threads=1)
    assert agreement.kl < 1e-9
    model = read_model(tmp_path / "out")
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "local_window_size":
                attribute.i = 49
    save_model(tmp_path / "out", model)
    assert compare_runtime(tmp_path, tmp_path / "out", verify_text(), threads=1).kl > 1e-6


def test_longrope_changes_its_factors_with_the_length(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "original_max_position_embeddings": 128,
        "short_factor": [1.0 + 0.05 * n for n in range(16)],
        "long_factor": [1.5 + 0.9 * n for n in range(16)],
    }
    artifact = make_artifact(tmp_path, "phi3-longrope", rope_parameters=rope)
    onnx_module.write(artifact, tmp_path / "out", accuracy_level=1)
    rows = np.random.default_rng(0).integers(5, 500, (2, 300))
    with (
        runtimes.get("reference").open(tmp_path, threads=1) as judge,
        RUNTIME.open(tmp_path / "out", threads=1) as session,
    ):
        for length in (100, 128, 129, 300):
            wanted, found = judge.logits(rows[:, :length]), session.logits(rows[:, :length])
            np.testing.assert_allclose(found, wanted, atol=1e-3)
        prompt = rows[0, :120].tolist()
        answers = [[piece.token for piece in engine.stream(prompt, 20)] for engine in (judge, session)]
        assert answers[0] == answers[1]
    with pytest.raises(UserError, match="longrope for cuda"):
        onnx_module.write(artifact, tmp_path / "cuda", target="cuda")


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


# ------------------------------------------------------------------------------------------------ one wrong bit


@pytest.mark.parametrize(
    ("name", "byte", "differing"),
    [
        (f"{DOWN}.codes", 0, 1),
        (f"{DOWN}.codes", 19, 1),
        (f"{DOWN}.scales", 4 * 7 + 2, 32),
        ("model.embed_tokens.weight.codes", 777, 1),
        ("model.layers.0.self_attn.q_proj.bias", 5, 1),
        (NORM, 4, 1),
    ],
)
def test_one_flipped_bit(name: str, byte: int, differing: int, fresh: Exported) -> None:
    artifact, folder = fresh("llama-biases")
    flip(folder, name, byte, 1)
    (mismatch,) = verify(artifact.folder.parent, folder).mismatches
    assert mismatch.name == name.removesuffix(".codes").removesuffix(".scales")
    assert 1 <= mismatch.differing <= differing


def test_verify_says_what_is_wrong(fresh: Exported, capsys: pytest.CaptureFixture[str]) -> None:
    artifact, folder = fresh("llama-untied")
    run = artifact.folder.parent
    assert verify_command(run, [folder], threads=1) == 0
    out = capsys.readouterr().out
    assert "bit-exact: 16 of 16 tensors" in out
    assert "kept in float32: 5 of 5 tensors equal" in out
    assert "same top-1" in out
    flip(folder, NORM, 4, 1)
    flip(folder, f"{DOWN}.codes", 4, 1)
    assert verify_command(run, [folder], runtime=False) == 1
    out = capsys.readouterr().out
    assert "bit-exact: 15 of 16 tensors" in out
    assert "kept in float32: 4 of 5 tensors equal" in out


def test_a_head_that_is_no_longer_tied(fresh: Exported) -> None:
    artifact, folder = fresh("llama-tied")
    model = read_model(folder)
    offset = int(place(model, "lm_head.weight.codes")["offset"])
    set_place(model, "lm_head.weight.codes", "offset", str(offset + 64))
    save_model(folder, model)
    (mismatch,) = verify(artifact.folder.parent, folder).mismatches
    assert mismatch.name == "lm_head.weight"


def test_another_runs_folder(exported: Exported, tmp_path: Path) -> None:
    _, folder = exported("llama-tied")
    make_artifact(tmp_path, "qwen3", **WIDE)
    result = verify(tmp_path, folder)
    assert not result.ok
    assert result.exact == 0
    assert result.file_run_hash != result.run_hash


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


def test_an_interrupted_write_leaves_the_old_folder(fresh: Exported) -> None:
    artifact, folder = fresh()
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


def test_an_earlier_export_is_replaced_and_nothing_else(fresh: Exported, tmp_path: Path) -> None:
    artifact, folder = fresh()
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


# ------------------------------------------------------------------------------------------------ refusals


def test_unknown_options(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    with pytest.raises(UserError, match="unknown target 'npu': cpu or cuda"):
        onnx_module.write(artifact, tmp_path / "out", target="npu")
    with pytest.raises(UserError, match="no accuracy level 5"):
        onnx_module.write(artifact, tmp_path / "out", accuracy_level=5)
    with pytest.raises(UserError, match="no wide inputs 'some': none, sensitive, all"):
        onnx_module.write(artifact, tmp_path / "out", wide_inputs="some")
    elsewhere: list[dict[str, Any]] = [{"accuracy_level": 1}, {"target": "cuda"}]
    for options in elsewhere:
        with pytest.raises(UserError, match="accuracy level 4: nothing else rounds inputs"):
            onnx_module.write(artifact, tmp_path / "out", wide_inputs="all", **options)
    assert not (tmp_path / "out").exists()


def test_unknown_architecture_and_tensors(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    description = json.loads((artifact.folder / "config.json").read_text())

    def change(**changes: Any) -> Artifact:
        (artifact.folder / "config.json").write_text(json.dumps(description | changes))
        return open_artifact(tmp_path)

    with pytest.raises(UserError, match="'mamba' is not supported; supported: llama, qwen2, qwen3"):
        EXPORTER.write(change(model_type="mamba"), tmp_path / "out")
    with pytest.raises(UserError, match=r"has no place for model.layers.1"):
        EXPORTER.write(change(num_hidden_layers=1), tmp_path / "out")
    with pytest.raises(UserError, match=r"lacks model.layers.2"):
        EXPORTER.write(change(num_hidden_layers=3), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_heads_that_onnx_runtime_cannot_rotate(tmp_path: Path) -> None:
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 36}
    artifact = make_artifact(tmp_path, "qwen3", **heads)
    with pytest.raises(UserError, match=r"rotates 36 dimensions of a head.*multiple of 16; formats that can: gguf"):
        EXPORTER.write(artifact, tmp_path / "out")


def test_missing_tokenizer(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path, "llama-tied")
    for file in artifact.folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="holds no tokenizer"):
        EXPORTER.write(artifact, tmp_path / "out")


# ------------------------------------------------------------------------------------------------ damaged folders


def damage(model: Any, kind: str) -> None:
    """Change a model in a way that a decoder must not follow."""
    codes = f"{DOWN}.codes"
    node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    attributes = {attribute.name: attribute for attribute in node.attribute}
    changes: dict[str, Callable[[], Any]] = {
        "outside": lambda: set_place(model, codes, "location", "../student-onnx/model.onnx.data"),
        "absolute": lambda: set_place(model, codes, "location", "/etc/passwd"),
        "device": lambda: set_place(model, codes, "location", "pipe"),
        "link": lambda: set_place(model, codes, "location", "link"),
        "nameless": lambda: set_place(model, codes, "location", ""),
        "nul": lambda: set_place(model, codes, "location", "a\0b"),
        "below nought": lambda: set_place(model, codes, "offset", "-4096"),
        "beyond": lambda: set_place(model, codes, "offset", str(2**63 - 1)),
        "no number": lambda: set_place(model, codes, "offset", "9" * 5000),
        "other digits": lambda: set_place(model, codes, "offset", "٣"),
        "short": lambda: set_place(model, codes, "length", "1"),
        "huge": lambda: initializer(model, codes).dims.__setitem__(0, 2**40),
        "negative": lambda: initializer(model, codes).dims.__setitem__(0, -1),
        "many dimensions": lambda: initializer(model, codes).dims.extend([2] * 100000),
        "type": lambda: setattr(initializer(model, codes), "data_type", 1),
        "unknown type": lambda: setattr(initializer(model, codes), "data_type", 99),
        "inline": lambda: setattr(initializer(model, codes), "data_location", 0),
        "twice": lambda: model.graph.initializer.append(initializer(model, codes)),
        "bits": lambda: setattr(attributes["bits"], "i", 3),
        "block": lambda: setattr(attributes["block_size"], "i", 0),
        "rows": lambda: setattr(attributes["N"], "i", 2**62),
        "columns": lambda: setattr(attributes["K"], "i", -5),
        "inputs": lambda: node.input.append("zero_points"),
        "stranger": lambda: node.input.__setitem__(1, "nowhere"),
        "domain": lambda: setattr(node, "domain", "another"),
        "own operators": lambda: setattr(model.functions.add(), "name", "MatMulNBits"),
    }
    changes[kind]()


KINDS = ["outside", "absolute", "device", "link", "nameless", "nul", "below nought", "beyond", "no number", "short"]
KINDS += ["other digits", "huge", "negative", "many dimensions", "type", "unknown type", "inline", "twice", "bits"]
KINDS += ["block", "rows", "columns", "inputs", "stranger", "domain", "own operators"]


@pytest.mark.parametrize("kind", KINDS)
def test_models_that_lie(kind: str, exported: Exported, tmp_path: Path) -> None:
    artifact, source = exported("llama-tied")
    folder = tmp_path / "student-onnx"
    folder.mkdir()
    os.link(source / "model.onnx.data", folder / "model.onnx.data")
    os.mkfifo(folder / "pipe")
    (folder / "link").symlink_to("/etc/passwd")
    model = read_model(source)
    damage(model, kind)
    save_model(folder, model)
    with pytest.raises(UserError, match="is damaged"):
        verify(artifact.folder.parent, folder)


def test_truncated_and_scrambled_files(fresh: Exported) -> None:
    artifact, folder = fresh()
    run = artifact.folder.parent
    for name, message in (("model.onnx", "damaged"), ("model.onnx.data", "damaged")):
        data = (folder / name).read_bytes()
        for length in (1, 100, len(data) // 2, len(data) - 5):
            (folder / name).write_bytes(data[:length])
            with pytest.raises(UserError, match=message):
                verify(run, folder)
        (folder / name).write_bytes(data)
    data = (folder / "model.onnx").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(200):
        scrambled = bytearray(data)
        for _ in range(int(random.integers(1, 4))):
            scrambled[int(random.integers(0, len(data)))] = int(random.integers(0, 256))
        (folder / "model.onnx").write_bytes(scrambled)
        try:
            verify(run, folder)
        except UserError:
            continue
    (folder / "model.onnx").write_bytes(bytes(17 << 20))
    with pytest.raises(UserError, match="more than 16 MiB"):
        verify(run, folder)
    (folder / "model.onnx").write_bytes(data)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(UserError, match="is not in the folder"):
        verify(run, folder)


# ------------------------------------------------------------------------------------------------ the command line


def qad(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qad.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


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
