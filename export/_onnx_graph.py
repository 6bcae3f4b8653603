"""The decoder graph of an ONNX folder: from onnxruntime-genai's model builder, its tensors handed in from outside.

The builder knows how an architecture is put together of ONNX Runtime's fused operators (GroupQueryAttention with a
key-value cache, SkipSimplifiedLayerNormalization). It is given a model whose parameters take no memory, and what it
makes is kept as a graph, never saved: its placeholders are then replaced by the artifact's own codes, scales and kept
tensors. So nothing is rounded on the way, each tensor may have a grid of its own, and memory holds no weights. Feeding
it a GPTQ folder instead, which it also reads, would pass embedding, head, norms and biases through fp16.

What else is replaced: rotary tables by those that transformers computes, because the builder knows some kinds of scaling
only, and those by formulas of its own; a norm's weight with the 1 already added by the weight itself and an addition, because
float32 cannot take the 1 away again.

Shapes: N output features, K input features, G groups along K.
"""

import contextlib
import copy
import functools
import importlib
import io
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qad.errors import UserError

INSTALL = "pip install 'qad[onnx]'"
_PACKAGE = "onnxruntime_genai.models"
# The builder's modules import each other by these bare names, from a folder that it puts on the path.
_BARE = ("builder_config", "builders", "loaders", "quantization")

# Node of the builder -> parameter of transformers, less its ".weight" or ".bias".
_NODES = (
    (re.compile(r"/model/layers\.(\d+)/attn/([qkvo])_proj/(?:MatMul|Add)"), r"model.layers.\1.self_attn.\2_proj"),
    (re.compile(r"/model/layers\.(\d+)/mlp/(gate|up|down)_proj/(?:MatMul|Add)"), r"model.layers.\1.mlp.\2_proj"),
    (re.compile(r"/lm_head/MatMul"), "lm_head"),
    (re.compile(r"/model/embed_tokens/Gather"), "model.embed_tokens"),
)
_NORMS = (
    (re.compile(r"model\.layers\.\d+\.final_norm_layernorm\.weight"), "model.norm.weight"),
    (re.compile(r"model\.layers\.(\d+)\.(\w+_layernorm)\.weight"), r"model.layers.\1.\2.weight"),
    (re.compile(r"model\.layers\.(\d+)\.attn\.([qk]_norm)\.layernorm\.weight"), r"model.layers.\1.self_attn.\2.weight"),
)


@dataclass(frozen=True)
class Graph:
    """A decoder without its weights.

    Attributes:
        proto: The ModelProto. Its nodes name initializers that it does not hold.
        half: Names of the placeholders of parameters that it takes as fp16.
        norm_offset: What is added to the weight of a norm before it multiplies.
        tables: Initializers that are no parameters, such as rotary tables.
        genai_config: The ``genai_config.json`` that belongs to it.
    """

    proto: Any
    half: frozenset[str]
    norm_offset: float
    tables: dict[str, NDArray[Any]]
    genai_config: str


def parameter_of(node: str) -> str | None:
    """Return the parameter that a node of the builder multiplies with, adds or looks up, less its last part."""
    for pattern, name in _NODES:
        if match := pattern.fullmatch(node):
            return match.expand(name)
    return None


def norm_of(initializer: str) -> str | None:
    """Return the norm's parameter that the builder calls ``initializer``."""
    for pattern, name in _NORMS:
        if match := pattern.fullmatch(initializer):
            return match.expand(name)
    return None


@contextlib.contextmanager
def _builder() -> Iterator[tuple[ModuleType, ModuleType]]:
    """Yield the builder and its base module, quiet, and leave path and modules as they were.

    Raises:
        UserError: It is not installed, or cannot be imported.
    """
    path, said = list(sys.path), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            try:
                loaded = _import_builder()
            except Exception as error:  # whatever a library of another version lacks
                raise UserError(
                    f"the model builder of onnxruntime-genai cannot be imported ({error}): install it with {INSTALL}"
                ) from error
            sys.modules.update(loaded)
            yield loaded[f"{_PACKAGE}.builder"], loaded["builders.base"]
    finally:
        sys.path[:] = path
        for name in [name for name in sys.modules if name.split(".")[0] in _BARE]:
            del sys.modules[name]


@functools.cache
def _import_builder() -> dict[str, ModuleType]:
    """Return the builder's modules, those with bare names included."""
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in _BARE}
    for name in before:
        del sys.modules[name]
    try:
        importlib.import_module(f"{_PACKAGE}.builder")
        wanted = (*_BARE, _PACKAGE.split(".")[0])
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] in wanted}
    finally:
        sys.modules.update(before)


def _weightless(config: Any) -> PreTrainedModel:
    """Return a model whose parameters are views of a single one: their shapes are right and they take no memory.

    Not on the meta device: the builder leaves out a bias that holds only zeros, and looks.
    """
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            ones = torch.ones(()).expand(parameter.shape)
            setattr(module, name, torch.nn.Parameter(ones, requires_grad=False))
    return model.eval()


def _without_scaling(config: Any) -> Any:
    """Return a configuration whose rotary scaling is hidden from the builder: its own tables are replaced anyway."""
    plain = copy.deepcopy(config)
    kept = {"rope_theta", "partial_rotary_factor"}
    plain.rope_parameters = {"rope_type": "default"} | {
        key: value for key, value in config.rope_parameters.items() if key in kept
    }
    return plain


def _rotary_tables(model: Any, length: int) -> dict[str, NDArray[np.float32]]:
    """Return cosine and sine of every position and frequency, shape [length, rotary width / 2]."""
    positions = torch.arange(length).unsqueeze(0)
    cosine, sine = model.model.rotary_emb(torch.zeros(()), positions)
    half = cosine.shape[-1] // 2
    return {
        name: np.ascontiguousarray(table[0, :, :half].numpy())
        for name, table in (("cos_cache", cosine), ("sin_cache", sine))
    }


def build_graph(folder: Path, hf_class: str, target: str) -> Graph:
    """Return the decoder of a model folder.

    Args:
        folder: Holds ``config.json``, ``generation_config.json`` and the tokenizer.
        hf_class: The model class, by which the builder knows the architecture.
        target: ``cpu`` (float32) or ``cuda`` (fp16).

    Raises:
        UserError: The builder is not installed, or cannot make this model.
    """
    config = AutoConfig.from_pretrained(folder)
    model = _weightless(config)
    config = _without_scaling(config)
    config.architectures = [hf_class]
    made: list[Any] = []
    with _builder() as (builder, base), tempfile.TemporaryDirectory() as place:
        originals = base.Model.load_weights, base.Model.save_model
        base.Model.load_weights = lambda _self, _path: model
        base.Model.save_model = lambda self, _folder: made.append(self)
        options = {
            "hf_token": False,
            # One product a parameter: grids may differ, and each is found under its own name.
            "fuse_qkv": False,
            "hf_details": {"extra_kwargs": {}, "hf_name": str(folder), "hf_config": config},
        }
        try:
            # int4 stands for any width: whatever it makes of weights is replaced.
            builder.create_model("", str(folder), f"{place}/out", "int4", target, f"{place}/cache", **options)
        except Exception as error:  # whatever an unknown architecture or setting makes it raise
            raise UserError(
                f"the model builder of onnxruntime-genai cannot make a {hf_class} with this configuration "
                f"({type(error).__name__}: {error}): export to another format"
            ) from error
        finally:
            base.Model.load_weights, base.Model.save_model = originals
        genai_config = Path(place, "out", "genai_config.json").read_text(encoding="utf-8")
    return _without_weights(made[0], model, genai_config)


def _without_weights(made: Any, model: PreTrainedModel, genai_config: str) -> Graph:
    """Return what the builder made as a protocol buffer that holds no parameters."""
    import onnx_ir

    graph = made.model.graph
    graph.sort()
    half: set[str] = set()
    tables: dict[str, NDArray[Any]] = {}
    for name, value in list(graph.initializers.items()):
        if not name.endswith((".weight", ".bias")):
            tables[name] = value.const_value.numpy()
        elif value.dtype == onnx_ir.DataType.FLOAT16:
            half.add(name)
        value.const_value = None
    graph.initializers.clear()
    exact = _rotary_tables(model, made.rope_attrs["cache_length"])
    for name, table in exact.items():
        if name in tables:
            if table.shape != tables[name].shape:
                raise UserError(f"the builder's {name} has shape {tables[name].shape} and the model's {table.shape}")
            tables[name] = table.astype(tables[name].dtype)
    return Graph(
        proto=onnx_ir.to_proto(made.model),
        half=frozenset(half),
        norm_offset=float(made.layernorm_attrs["add_offset"]),
        tables=tables,
        genai_config=genai_config,
    )
