"""Named plans against llama.cpp's own quantizer: the same type for every tensor where our table has it."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from bench.quality import quantize_by_llamacpp
from qad.artifact import save_artifact
from qad.errors import UserError
from qad.export import gguf
from qad.grid import GRIDS
from qad.plan import FALLBACKS, KEEP, is_tied, plan_of_grid
from qad.plans import NAMED, named_rules
from tests.helpers_models import MODELS, make_model, make_tokenizer

# What qad stores where llama.cpp takes a type that is not in the table.
OURS_FOR = {"Q4_K": "q4_k", "Q5_K": "q5_k", "Q6_K": "q6_k", "Q8_0": "q8_0"}
LAYERS = 18  # so that an eighth is two layers, and rounding it down or up would differ


def sizes(tied: bool, width: int = 256) -> dict[str, object]:
    return {
        "num_hidden_layers": LAYERS,
        "hidden_size": width,
        "intermediate_size": width,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": tied,
    }


@pytest.fixture(
    scope="module",
    params=[("llama-tied", True), ("llama-tied", False), ("phi3", False)],
    ids=["tied", "untied", "fused"],
)
def unquantized(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Return a model, and the GGUF file of it without a quantized tensor."""
    folder = tmp_path_factory.mktemp("exact")
    case, tied = request.param
    model = make_model(case, **sizes(tied))
    artifact = save_artifact(
        folder,
        config=model.config,
        tokenizer=make_tokenizer(MODELS[case].tokenizer),
        quantized={},
        kept=dict(model.named_parameters()),
        tied_head=is_tied(model),
        forward_sha256={},
        recipe={"name": "exact"},
    )
    gguf.write(artifact, folder / "exact.gguf")
    return model, folder / "exact.gguf"


@pytest.mark.parametrize("name", NAMED)
def test_the_mixture_is_llamacpps(unquantized: tuple[Any, Path], tmp_path: Path, name: str) -> None:
    pytest.importorskip("llama_cpp")
    model, exact = unquantized
    quantize_by_llamacpp(exact, tmp_path / "theirs.gguf", name, 1)
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "theirs.gguf").tensors}
    plan, notes = plan_of_grid(model, "q4_0", named_rules(name, LAYERS, is_tied(model)))
    assert notes == []
    theirs = {
        ours: OURS_FOR[types[name_in_file]]
        for name_in_file, ours in hf_names(LAYERS, fused=model.config.model_type == "phi3").items()
        if types.get(name_in_file, "F32") != "F32"
    }
    assert {tensor: grid for tensor, grid in plan.items() if grid != KEEP} == theirs


def hf_names(layers: int, fused: bool) -> dict[str, str]:
    """Return GGUF name -> Hugging Face name, written down by hand."""
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    if fused:
        parts |= {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}
    names = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight"}
    for layer in range(layers):
        names |= {f"blk.{layer}.{a}.weight": f"model.layers.{layer}.{b}.weight" for a, b in parts.items()}
    return names


@pytest.mark.parametrize(("grid", "fallback"), FALLBACKS.items())
def test_rows_that_no_super_block_divides_fall_back(grid: str, fallback: str) -> None:
    """To a grid of blocks of 32 with at least as many bits, and it is said."""
    model = make_model("llama-tied", hidden_size=192, intermediate_size=256)
    plan, notes = plan_of_grid(model, grid)
    assert plan["model.layers.0.mlp.down_proj.weight"] == grid
    assert plan["model.layers.1.mlp.up_proj.weight"] == fallback
    assert notes == [
        f"12 tensors have rows of 192 values, which blocks of {grid} do not divide: {fallback} in its place"
    ]
    assert GRIDS[fallback].block == 32
    assert GRIDS[fallback].bits >= GRIDS[grid].bits
    assert GRIDS[fallback].bits_per_weight >= GRIDS[grid].bits_per_weight


def test_a_width_without_any_fallback_is_an_error() -> None:
    model = make_model("llama-tied", intermediate_size=80)
    with pytest.raises(UserError, match=r"down_proj\.weight: rows of 80 values .*\(q4_k\)"):
        plan_of_grid(model, "q4_k")


def test_an_unknown_plan_lists_the_known() -> None:
    with pytest.raises(UserError, match=r"unknown plan 'q4_k_l'; known: q4_k_m, q4_k_s, q5_k_m, q5_k_s, q6_k"):
        named_rules("q4_k_l", 2, True)
