"""Every architecture of the table in every format that there is: trained, exported, proved and run.

The models are tiny and random, with weights large enough for what a file says of them to matter; the second half breaks
each such statement once, and sees that.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qad import export, runtimes
from qad.agreement import IMPOSSIBLE_KL, compare_runtime
from qad.architectures import ARCHITECTURES
from qad.artifact import open_artifact, save_artifact
from qad.distill import distill
from qad.errors import UserError
from qad.model import load_model
from qad.recipe import Recipe
from qad.verify import verify
from tests.helpers_models import MODELS, make_artifact, make_tokenizer, verify_text
from tests.helpers_runs import save_model, save_text, tiny
from tests.helpers_runtimes import skip_without

# What runtimes make of exact weights: 8-bit activations, fp16.
LARGEST_KL = {"gptq": 1e-3}
# Why a format cannot carry an architecture; what is not here must work.
REFUSED: dict[tuple[str, str], str] = {}

Trained = Callable[[str], Path]


def case_of(model_type: str) -> str:
    return next(case for case, tiny in MODELS.items() if tiny.model_type == model_type)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Return a maker of runs of two steps on the 4-bit grid, each made once."""

    @functools.cache
    def make(model_type: str) -> Path:
        folder, case = tmp_path_factory.mktemp(model_type), case_of(model_type)
        changes: dict[str, Any] = {"head_dim": 32, "query_pre_attn_scalar": 32}
        changes = {key: value for key, value in changes.items() if key in MODELS[case].config}
        teacher = save_model(folder / "teacher", case, MODELS[case].tokenizer, **changes)
        recipe = Recipe(
            teacher=teacher,
            data=(save_text(folder / "text.jsonl"),),
            steps=2,
            batch_size=2,
            micro_batch=2,
            seq_len=64,
            calibration_tokens=256,
            held_out_tokens=128,
            eval_every=0,
            save_every=0,
        )
        distill(recipe, folder / "run", resume=False, console=Console(quiet=True))
        return folder / "run"

    return make


@pytest.mark.parametrize("name", export.names())
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_trained_exported_proved_and_run(model_type: str, name: str, trained: Trained, tmp_path: Path) -> None:
    run, exporter = trained(model_type), export.get(name)
    artifact = open_artifact(run)
    assert artifact.grids["model.layers.1.self_attn.o_proj.weight"] == "q4_0"
    file = tmp_path / f"student{exporter.SUFFIX}"
    if (model_type, name) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[model_type, name]):
            exporter.write(artifact, file)
        assert not list(tmp_path.iterdir())
        return
    exporter.write(artifact, file)
    proof = verify(run, file)
    assert proof.ok, proof.mismatches
    assert proof.exact > 0
    assert proof.file_run_hash == artifact.run_hash
    if reasons := [
        r for n in runtimes.names() if name in runtimes.get(n).FORMATS and (r := runtimes.get(n).available())
    ]:
        pytest.skip("; ".join(reasons))
    agreement = compare_runtime(run, file, verify_text(), threads=1)
    assert agreement.kl < LARGEST_KL.get(name, 1e-2)
    assert agreement.same_tokens


def _without(name: str) -> Callable[[Any], Any]:
    """Return a change of an architecture's entry: a feature switched off."""
    return lambda entry: dataclasses.replace(entry, **{name: type(getattr(entry, name))()})


def _rope(kind: str | None = None, **changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a change of a configuration's rotary settings, or of those of one type of layers."""

    def change(config: dict[str, Any]) -> dict[str, Any]:
        rope = config["rope_parameters"]
        new = rope | changes if kind is None else rope | {kind: rope[kind] | changes}
        return config | {"rope_parameters": new}

    return change


def _set(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: config | changes


@pytest.mark.parametrize(
    ("case", "config", "entry"),
    [
        pytest.param("mistral", _rope(rope_theta=1e6), None, id="mistral rope base"),
        pytest.param("mistral", None, _without("permutes_qk"), id="mistral row order"),
        pytest.param("phi3-longrope", _rope(long_factor=[1.0] * 12), None, id="phi3 long factors"),
        pytest.param("phi3-longrope", _rope(attention_factor=3.0), None, id="phi3 attention factor"),
        pytest.param(
            "phi3-longrope",
            _rope(partial_rotary_factor=0.5, long_factor=[1.0] * 8, short_factor=[1.0] * 8),
            None,
            id="phi3 rotated part",
        ),
        pytest.param("gemma3", _set(sliding_window=300), None, id="gemma3 window"),
        pytest.param("gemma3", _set(layer_types=["full_attention"] * 2), None, id="gemma3 layer types"),
        pytest.param("gemma3", _rope("full_attention", rope_theta=1e4), None, id="gemma3 rope base"),
        pytest.param("gemma3", _rope("sliding_attention", rope_theta=1e6), None, id="gemma3 local rope base"),
        pytest.param("gemma3-linear", _rope("full_attention", factor=1.0), None, id="gemma3 rope factor"),
        pytest.param("gemma3", None, _without("norm_offset"), id="gemma3 norm offset"),
    ],
)
def test_a_wrong_statement_shows(
    case: str, config: Any, entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The models are sensitive enough for the test above to see what a file says wrongly."""
    skip_without("llamacpp")
    artifact = make_artifact(tmp_path, case)
    model_type = artifact.config["model_type"]
    with monkeypatch.context() as patch:
        if entry:
            patch.setitem(ARCHITECTURES, model_type, entry(ARCHITECTURES[model_type]))
        broken = dataclasses.replace(artifact, config=config(artifact.config) if config else artifact.config)
        export.get("gguf").write(broken, tmp_path / "broken.gguf")
    text = verify_text()[:900]
    assert compare_runtime(tmp_path, tmp_path / "broken.gguf", text, threads=1).kl > IMPOSSIBLE_KL


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("llama-tied", {"hidden_act": "gelu"}, "activation 'gelu' cannot be exported: runtimes compute silu"),
        ("gemma3", {"hidden_activation": "silu"}, "activation 'silu' cannot be exported"),
        ("llama-tied", {"num_hidden_layers": 0}, "counts 0 layers"),
        ("llama-tied", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0, not None: training compares"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma3", {"attention_bias": True}, r"no exported file has a place for .*q_proj\.bias"),
        ("qwen3", {"attention_bias": True}, r"no exported file has a place for .*q_proj\.bias"),
    ],
)
def test_what_no_format_can_express_is_refused_before_training(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path, case, MODELS[case].tokenizer)
    if "attention_bias" in changes:
        save_model(tmp_path, case, MODELS[case].tokenizer, **changes)
    else:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gemma3", {"query_pre_attn_scalar": 48}, "no export to GGUF: .*query_pre_attn_scalar 48, not 32"),
        ("phi3", {"head_dim": 64}, "no export to GGUF: .*head_dim 64, not 32"),
        ("mistral-window", {}, "contexts of 300 tokens, which is one window"),
    ],
)
def test_limits_of_gguf_are_told_before_training(
    case: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_model(tmp_path, case, MODELS[case].tokenizer, **changes)
    notes = load_model(str(tmp_path)).notes
    assert any(re.search(message, note) for note in notes), notes


def test_a_folder_of_several_files_is_one_model(tmp_path: Path) -> None:
    model = tiny("gemma3")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    make_tokenizer("gemma").save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-0*-of-0*.safetensors"))) > 2
    loaded = dict(load_model(str(tmp_path)).model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded[name], parameter), name
    min(tmp_path.glob("model-0*-of-0*.safetensors")).unlink()
    with pytest.raises(UserError, match=r"cannot be read as a model folder|tensors are missing"):
        load_model(str(tmp_path))


def test_norms_stored_as_sums_lose_nothing(tmp_path: Path) -> None:
    """What an artifact keeps of w computes the bits of w, and comes back from fl(w + 1)."""
    values = torch.randn(64, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-8, 8, 0.25)
    model = tiny("gemma3", hidden_size=64)
    name = "model.layers.0.input_layernorm.weight"
    kept = {name: values}
    artifact = save_artifact(
        tmp_path,
        config=model.config,
        tokenizer=make_tokenizer("gemma"),
        quantized={},
        kept=kept,
        tied_head=True,
        forward_sha256={},
        recipe={},
    )
    stored = artifact.weight(name)
    assert not torch.equal(stored, values)
    assert torch.equal(stored + 1, values + 1)
    assert torch.equal((stored + 1) - 1, stored)
