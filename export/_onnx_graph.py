"""The decoder graph of an ONNX folder: from onnxruntime-genai's model builder, its tensors handed in from outside.

The builder knows how an architecture is put together of ONNX Runtime's fused operators (GroupQueryAttention with a
key-value cache, SkipSimplifiedLayerNormalization). It is given a model whose parameters take no memory, and what it
makes is kept as a graph, never saved: its placeholders are then replaced by the artifact's own codes, scales and kept
tensors. So nothing is rounded on the way, each tensor may have a grid of its own, and memory holds no weights. Feeding
it a GPTQ folder instead, which it also reads, would pass embedding, head, norms and biases through fp16.

What else is replaced: rotary tables by those that transformers computes, because the builder knows some kinds of
scaling only, and those by formulas of its own; windows of attention by those of each layer; the scale of an embedding,
which the builder rounds; a norm's weight with the 1 already added by the weight itself and an addition, because float32
cannot take the 1 away again.

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
from typing import Any, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from qad.architectures import attention_window, layer_types, rope_parameters
from qad.errors import UserError

INSTALL = "pip install 'qad[onnx]'"
_SCALE = "qad.embedding_scale"
_POSITIONS = 9  # which input of GroupQueryAttention
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


def _plain(config: Any, hf_class: str) -> Any:
    """Return a configuration that the builder can read: without rotary scaling, for its own tables are replaced anyway.

    Where transformers has rotary settings per type of layer, or a context before scaling, the builder wants them under
    the names of earlier releases, and takes them for a sign of other tables than those that are put in.
    """
    plain = copy.deepcopy(config)
    found = config.rope_parameters
    found = found.get("full_attention", found)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": found["rope_theta"]}
    if "partial_rotary_factor" in found:
        plain.rope_parameters["partial_rotary_factor"] = found["partial_rotary_factor"]
    plain.rope_local_base_freq = found["rope_theta"]
    plain.original_max_position_embeddings = config.max_position_embeddings
    plain.architectures = [hf_class]
    return plain


def _rotary(model: Any, name: str, positions: torch.Tensor) -> NDArray[np.float32]:
    """Return one of the builder's rotary tables as transformers computes it, shape [positions, rotary width / 2].

    Source of the names: ``make_rotary_embedding_multi_cache`` of the builder's Gemma3Model.
    """
    kind = {"global": "full_attention", "local": "sliding_attention"}.get(name.rpartition("_")[2])
    kinds = () if kind is None else (kind,)
    cosine, sine = model.model.rotary_emb(torch.zeros(()), positions.unsqueeze(0), *kinds)
    table = cosine if name.startswith("cos") else sine
    return np.ascontiguousarray(table[0, :, : table.shape[-1] // 2].numpy())


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
    plain = _plain(config, hf_class)
    made: list[Any] = []
    with _builder() as (builder, base), tempfile.TemporaryDirectory() as place:
        originals = base.Model.load_weights, base.Model.save_model
        base.Model.load_weights = lambda _self, _path: model
        base.Model.save_model = lambda self, _folder: made.append(self)
        options = {
            "hf_token": False,
            # One product a parameter: grids may differ, and each is found under its own name.
            "fuse_qkv": False,
            # Caches of one length for all layers, as any runtime keeps them; windows are masked.
            "windowed_kv_cache": False,
            "hf_details": {"extra_kwargs": {}, "hf_name": str(folder), "hf_config": plain},
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
    graph = _without_weights(made[0], model, genai_config)
    settings = config.to_dict()
    _set_windows(graph.proto, settings)
    if rope_parameters(settings)["rope_type"] == "longrope":
        if target != "cpu":
            raise UserError(f"a graph with longrope for {target} is not known to be right: export with --target cpu")
        _add_long_positions(graph, model, settings)
    return graph


def _set_windows(proto: Any, config: dict[str, Any]) -> None:
    """Let each layer attend within the window that its type has; the builder gives some models one for all layers."""
    from onnx import helper

    types, window = layer_types(config), attention_window(config)
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention":
            layer = int(node.name.split("layers.")[1].split("/")[0])
            kept = [attribute for attribute in node.attribute if attribute.name != "local_window_size"]
            kept.append(
                helper.make_attribute(
                    "local_window_size", -1 if window is None or types[layer] == "full_attention" else window
                )
            )
            texts = [attribute.SerializeToString() for attribute in kept]
            del node.attribute[:]
            for text in texts:
                node.attribute.add().ParseFromString(text)


def _add_long_positions(graph: Graph, model: Any, config: dict[str, Any]) -> None:
    """Let tokens of a sequence longer than the original context be rotated by the long factors of longrope.

    The long table stands below the short one, and positions are counted from there once the sequence is too long, as
    transformers changes its frequencies. Without a branch, because one would copy its table for each token.
    """
    from onnx import helper

    short = rope_parameters(config).get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    length = config["max_position_embeddings"]
    if not isinstance(short, int) or short >= length:
        return
    for name in ("cos_cache", "sin_cache"):
        parts = [_rotary(model, name, torch.arange(count)) for count in (short, length)]
        graph.tables[name] = np.concatenate(parts)
    mask = "/model/attn_mask_reformat/attn_mask_subgraph"
    constants = {"zero": 0, "one": 1, "short": short}
    graph.tables.update({f"qad.{name}": np.array(value, dtype=np.int64) for name, value in constants.items()})
    graph.tables["qad.last"] = np.array([1], dtype=np.int64)
    # Each line: operator, inputs, output. A sequence's first new position is what it holds less what is new, and that
    # is below nought only for the padding of a prompt.
    steps = (
        ("Shape", ("input_ids",), "shape"),
        ("Gather", ("qad.shape", "qad.one"), "new"),
        ("Range", ("qad.zero", "qad.new", "qad.one"), "steps"),
        ("Unsqueeze", (f"{mask}/Sub/output_0", "qad.last"), "end"),
        ("Add", ("qad.end", "qad.one"), "held"),
        ("Sub", ("qad.held", "qad.new"), "before"),
        ("Max", ("qad.before", "qad.zero"), "first"),
        ("Add", ("qad.first", "qad.steps"), "position"),
        ("Greater", (f"{mask}/Gather/output_0", "qad.short"), "is_long"),
        ("Where", ("qad.is_long", "qad.short", "qad.zero"), "start"),
        ("Add", ("qad.position", "qad.start"), "row"),
    )
    nodes = [
        helper.make_node(op_type, inputs, [f"qad.{output}"], f"/qad/{output}") for op_type, inputs, output in steps
    ]
    proto = graph.proto.graph
    first = next(index for index, node in enumerate(proto.node) if node.op_type == "GroupQueryAttention")
    for node in proto.node:
        if node.op_type == "GroupQueryAttention":
            node.input[_POSITIONS] = "qad.row"
    texts = [node.SerializeToString() for node in (*proto.node[:first], *nodes, *proto.node[first:])]
    del proto.node[:]
    for text in texts:
        proto.node.add().ParseFromString(text)


def _without_weights(made: Any, model: Any, genai_config: str) -> Graph:
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
    proto = onnx_ir.to_proto(made.model)
    read = {name for node in proto.graph.node for name in node.input}
    tables = {name: table for name, table in tables.items() if name in read}
    for name, theirs in tables.items():
        if name.startswith(("cos_cache", "sin_cache")):
            table = _rotary(model, name, torch.arange(len(theirs)))
            assert table.shape == theirs.shape, (name, table.shape, theirs.shape)
            tables[name] = table.astype(theirs.dtype)
    scale = getattr(model.model.embed_tokens, "embed_scale", None)
    for node in proto.graph.node:
        if node.name == "/model/embed_tokens/Mul":
            # The builder rounds it to two decimals.
            node.input[1] = _SCALE
            tables[_SCALE] = np.array(float(cast(torch.Tensor, scale)), dtype=np.float16 if half else np.float32)
    return Graph(
        proto=proto,
        half=frozenset(half),
        norm_offset=float(made.layernorm_attrs["add_offset"]),
        tables=tables,
        genai_config=genai_config,
    )
