"""ONNX export, run: what ONNX Runtime computes, of inputs in two parts too, against torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qad import runtimes
from qad.agreement import compare_runtime
from qad.errors import UserError
from qad.export import _onnx_wide
from qad.export import onnx as onnx_module
from qad.runtimes import ort as ort_module
from qad.verify import verify
from tests.helpers_models import MODELS, make_artifact, verify_text
from tests.helpers_onnx import read_model, save_model

onnx: Any = pytest.importorskip("onnx")


# ONNX Runtime rotates a multiple of 16 dimensions; the twelve of this case are 24.
RUNNABLE = [case for case in MODELS if case != "phi3-longrope"]


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
        ort_module.open(tmp_path / "out", threads=1) as session,
    ):
        for length in (100, 128, 129, 300):
            wanted, found = judge.logits(rows[:, :length]), session.logits(rows[:, :length])
            np.testing.assert_allclose(found, wanted, atol=1e-3)
        prompt = rows[0, :120].tolist()
        answers = [[piece.token for piece in engine.stream(prompt, 20)] for engine in (judge, session)]
        assert answers[0] == answers[1]
    with pytest.raises(UserError, match="longrope for cuda"):
        onnx_module.write(artifact, tmp_path / "cuda", target="cuda")
