"""A GGUF file as a Hugging Face model: configuration, tokenizer and dequantized float weights.

transformers can load GGUF files itself. This module does it again for the architectures of qad, because that
loader parses the file three times (25 s for SmolLM2 against 3 s here), leaves a quantization_config that forbids
saving, and knows fewer pre-tokenizers: without the digit splitting of ``smollm`` it tokenizes every number differently
from llama.cpp.

Source: ggml's ``gguf.md`` for the keys.
"""

import mmap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from qad.architectures import ARCHITECTURES, SPLITTERS, Architecture, architecture_of_gguf
from qad.errors import UserError
from qad.gguf_check import GGUFHeader, GGUFTensor
from qad.sentencepieces import SPACE

_ROPE_FACTORS = "rope_freqs.weight"
_LONG_FACTORS = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
# Every how manyth layer of gemma3 sees everything, where a file does not say.
_GEMMA_PATTERN = 6

# Names under which files carry a splitter that the table knows under another.
_ALIASES = {"llama3": "llama-bpe", "deepseek-r1-qwen": "qwen2", "gpt2": "gpt-2"}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4


def _short(value: float) -> float:
    """Return the shortest decimal that is the same float32, as which GGUF stores it (1e-05, not 9.99999974e-06)."""
    return float(str(np.float32(value)))


def read_config(header: GGUFHeader) -> PretrainedConfig:
    """Return the Hugging Face configuration that a GGUF header describes, without any quantization_config.

    Raises:
        UserError: A key is missing, rotary embeddings are scaled in a way that the key values do not tell, or the
            numbers describe no model.
    """
    try:
        return _config(header)
    except UserError:
        raise
    except Exception as error:  # whatever numbers that contradict each other make transformers raise
        reason = " ".join(str(error).split())
        raise UserError(f"the GGUF file's numbers describe no model ({reason}): convert it again") from error


def _config(header: GGUFHeader) -> PretrainedConfig:
    """Do what ``read_config`` says, where the numbers fit each other."""
    architecture = architecture_of_gguf(header.metadata["general.architecture"])

    def value(key: str, default: Any = None) -> Any:
        found = header.metadata.get(f"{architecture.gguf}.{key}", default)
        if found is None:
            raise UserError(f"the GGUF file lacks {architecture.gguf}.{key}: convert it again with a current converter")
        return found

    if "token_embd.weight" not in header.tensors:
        raise UserError("the GGUF file holds no token embedding: use that of a whole language model")
    hidden, heads = value("embedding_length"), value("attention.head_count")
    options: dict[str, Any] = {
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden,
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": value("attention.key_length", hidden // heads),
        "rms_norm_eps": _short(value("attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": value("context_length"),
        "rope_parameters": _read_rope(header, architecture.gguf),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "dtype": "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        options[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
    if "self_attn.o_proj" in architecture.biases:
        options["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        options["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    options |= {setting.key: setting.allowed(options)[-1] for setting in architecture.gguf_fixed}
    if architecture.windows != "none":
        options |= _read_windows(header, architecture, options)
    options["architectures"] = [architecture.hf_class]
    return AutoConfig.for_model(architecture.model_type, **options)


def _read_windows(header: GGUFHeader, architecture: Architecture, options: dict[str, Any]) -> dict[str, Any]:
    """Return which layers have a window, as llama.cpp takes it."""
    prefix, layers = f"{architecture.gguf}.attention", options["num_hidden_layers"]
    window = header.metadata.get(f"{prefix}.sliding_window") or None
    if architecture.windows == "all" or not architecture.gguf_windows:
        return {"sliding_window": window if architecture.windows == "all" else None}
    slides = [window is not None and (layer + 1) % _GEMMA_PATTERN != 0 for layer in range(layers)]
    if window is not None:
        slides = list(header.metadata.get(f"{prefix}.sliding_window_pattern", slides))
    base = header.metadata.get(f"{architecture.gguf}.rope.freq_base_swa", 10000.0)
    return {
        # Without a window no layer slides, but transformers wants one all the same.
        "sliding_window": window or options["max_position_embeddings"],
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in slides],
        "rope_parameters": {
            "full_attention": options["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": _short(base)},
        },
    }


def _read_rope(header: GGUFHeader, architecture: str) -> dict[str, Any]:
    """Return the rotary settings that the key values tell.

    Raises:
        UserError: A scaling of another kind.
    """
    found = {key.rpartition("rope.")[2]: value for key, value in header.metadata.items() if ".rope." in key}
    # llama.cpp takes 10000 where the base is missing.
    rope: dict[str, Any] = {"rope_theta": _short(found.get("freq_base", 10000.0))}
    kind = found.get("scaling.type") or "none"
    # Factors of longrope are tensors, which come later.
    rope["rope_type"] = "default" if kind in ("none", "longrope") else kind
    if kind in ("linear", "yarn"):
        rope["factor"] = _short(found["scaling.factor"])
    elif kind not in ("none", "longrope"):
        raise _unknown_rope(kind)
    width = header.metadata.get(f"{architecture}.attention.key_length") or (
        header.metadata[f"{architecture}.embedding_length"] // header.metadata[f"{architecture}.attention.head_count"]
    )
    if found.get("dimension_count", width) != width:
        rope["partial_rotary_factor"] = found["dimension_count"] / width
    if kind == "yarn":
        context = header.metadata[f"{architecture}.context_length"]
        rope["original_max_position_embeddings"] = found.get("scaling.original_context_length", context)
        for name in ("beta_fast", "beta_slow"):
            if f"scaling.yarn_{name}" in found:
                rope[name] = _short(found[f"scaling.yarn_{name}"])
    return rope


def _unknown_rope(kind: str) -> UserError:
    return UserError(
        f"the GGUF file scales its rotary embeddings in a way that is not read from GGUF ({kind}): load the model from "
        "its Hugging Face folder or id instead"
    )


def _apply_rope_factors(config: PretrainedConfig, factors: Tensor) -> None:
    """Write Llama 3's frequency factors, which GGUF stores as a tensor, back as the rule that made them.

    With t turns of a frequency in the original context, a frequency is kept for t > 4, divided by the full factor for
    t < 1, and blended between; so each blended factor tells the original context.

    Raises:
        UserError: The factors follow another rule.
    """
    theta = config.rope_parameters["rope_theta"]
    low, high = 1.0, 4.0
    factors = factors.double()
    factor = float(factors.max())
    frequencies = theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)
    kept = (1 / factors - 1 / factor) / (1 - 1 / factor)
    blended = (kept > 0) & (kept < 1)
    if factors.shape != frequencies.shape or not bool(blended.any()):
        raise _unknown_rope("frequency factors without a rule")
    originals = (low + kept * (high - low)) * 2 * torch.pi / frequencies
    original = round(float(originals[blended].median()))
    turns = original * frequencies / (2 * torch.pi)
    share = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(1 / (share + (1 - share) / factor), factors, rtol=1e-3):
        raise _unknown_rope("frequency factors of another rule")
    config.rope_parameters = {
        "rope_theta": theta,
        "rope_type": "llama3",
        "factor": _short(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _apply_long_factors(config: PretrainedConfig, factors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write LongRoPE's factors, which GGUF stores as tensors, back into the configuration."""
    scaling = f"{metadata['general.architecture']}.rope.scaling"
    original = metadata.get(f"{scaling}.original_context_length", config.max_position_embeddings)
    config.rope_parameters = config.rope_parameters | {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "attention_factor": _short(metadata.get(f"{scaling}.attn_factor", 1.0)),
        **{key: [_short(value) for value in values.tolist()] for key, values in factors.items()},
    }
    config.original_max_position_embeddings = original


def _read_tensor(data: mmap.mmap, tensor: GGUFTensor) -> Tensor:
    raw = np.frombuffer(data, dtype=np.uint8, count=tensor.size, offset=tensor.start)
    if tensor.type == GGMLQuantizationType.F32:
        return torch.from_numpy(raw.view(np.float32).reshape(tensor.shape).copy())
    try:
        values = dequantize(raw.reshape(*tensor.shape[:-1], -1), tensor.type)
    except NotImplementedError as error:
        raise UserError(
            f"tensor {tensor.name!r} is stored as {tensor.type.name}, which cannot be decoded here: give the model as "
            "F16, Q8_0 or another common type"
        ) from error
    return torch.from_numpy(values.astype(np.float32, copy=False).reshape(tensor.shape))


def read_weights(path: Path, header: GGUFHeader, config: PretrainedConfig) -> dict[str, Tensor]:
    """Return the float32 weights under Hugging Face names, llama's row permutation of q and k undone.

    Sets ``config.rope_parameters`` where the file holds rotary frequency factors.

    Raises:
        UserError: A tensor type or a tensor that is not understood.
    """
    state: dict[str, Tensor] = {}
    architecture, numbers = ARCHITECTURES[config.model_type], config.to_dict()
    hf_names = {stored: name for name, stored in architecture.gguf_names(config.num_hidden_layers).items()}
    unknown: list[str] = []
    long_factors: dict[str, Tensor] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for name, tensor in header.tensors.items():
            if name == _ROPE_FACTORS:
                _apply_rope_factors(config, _read_tensor(data, tensor))
                continue
            if name in _LONG_FACTORS:
                long_factors[_LONG_FACTORS[name]] = _read_tensor(data, tensor)
                continue
            target = hf_names.get(name)
            if target is None:
                unknown.append(name)
                continue
            weight = _read_tensor(data, tensor)
            if heads := architecture.permuted_heads(target, numbers):
                pairs = weight.view(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
                weight = pairs.swapaxes(1, 2).reshape(weight.shape).contiguous()
            state[target] = weight - architecture.offset(target)
    if long_factors:
        _apply_long_factors(config, long_factors, header.metadata)
    if unknown:
        raise UserError(f"{path} holds tensors that a {config.model_type} model has no place for: {unknown[:3]}")
    return state


def _byte_pair_tokenizer(metadata: dict[str, Any], path: Path) -> Tokenizer:
    kind = str(metadata.get("tokenizer.ggml.pre", "missing"))
    splitter = SPLITTERS.get(_ALIASES.get(kind, kind))
    if splitter is None:
        raise UserError(
            f"{path} has the pre-tokenizer {kind!r}; known are {', '.join(sorted({*SPLITTERS, *_ALIASES}))}. Load "
            "the model from its Hugging Face folder or id instead"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", [])]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=splitter.ignore_merges,
        )
    )
    if splitter.name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter.build()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _add_special(tokenizer, metadata, add_bos=False)
    return tokenizer


def _add_special(tokenizer: Tokenizer, metadata: dict[str, Any], *, add_bos: bool) -> None:
    """Add control and user-defined tokens, and the first token where one is put before text (``add_bos``: unasked)."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    # In files of this name, and in no others, special tokens swallow the white space after them.
    strips = any(name in str(metadata.get("general.name")).lower() for name in ("phi-3", "phi3"))
    keeping = {"<unk>", "<s>", "<|endoftext|>"}
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED, rstrip=strips and token not in keeping)
        for token, kind in zip(tokens, types, strict=False)
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]
    tokenizer.add_tokens(added)
    if metadata.get("tokenizer.ggml.add_bos_token", add_bos):
        bos = metadata["tokenizer.ggml.bos_token_id"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A $B", special_tokens=[(tokens[bos], bos)]
        )


def _sentencepiece_tokenizer(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """Return a tokenizer that merges by a list what llama.cpp merges by scores, see ``sentencepieces``."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UserError(f"{path} has a sentencepiece tokenizer without a score for each token: convert it again")
    types = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    apart = {
        token
        for token, kind in zip(tokens, types, strict=False)
        if kind != _NORMAL and not (kind == _USER_DEFINED and SPACE in token)
    }
    merges = [
        (-scores[index], -cut, (token[:cut], token[cut:]))
        for token, index in vocabulary.items()
        if token not in apart
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary and not {token[:cut], token[cut:]} & apart
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[pair for _, _, pair in sorted(merges)],
            unk_token=tokens[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", SPACE)
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(decoding)
    _add_special(tokenizer, metadata, add_bos=True)
    return tokenizer


def read_tokenizer(path: Path, header: GGUFHeader) -> PreTrainedTokenizerBase:
    """Return the tokenizer that a GGUF file carries, chat template and special tokens included.

    Raises:
        UserError: The file has no tokenizer, or one whose splitting is unknown.
    """
    metadata = header.metadata
    model = metadata.get("tokenizer.ggml.model")
    if model is None or not metadata.get("tokenizer.ggml.tokens"):
        raise UserError(f"{path} carries no tokenizer: use a GGUF file of a whole language model")
    builders = {"gpt2": _byte_pair_tokenizer, "llama": _sentencepiece_tokenizer}
    if model not in builders:
        raise UserError(
            f"{path} has a tokenizer of type {model!r}; byte pairs (gpt2) and sentencepiece (llama) are read"
        )
    tokens = metadata["tokenizer.ggml.tokens"]
    for key in ("bos", "eos", "unknown", "padding"):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id", 0)
        if not isinstance(index, int) or not 0 <= index < len(tokens):
            raise UserError(
                f"{path} names {index!r} as its {key} token but has {len(tokens)} tokens: copy or download it again"
            )
    special = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    special.setdefault("pad_token", special.get("eos_token", tokens[0]))
    try:
        backend = builders[model](metadata, path)
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more special
        raise UserError(
            f"the tokenizer in {path} is damaged ({str(error)[:200]}): copy or download the file again"
        ) from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=metadata.get(f"{metadata['general.architecture']}.context_length"),
        clean_up_tokenization_spaces=False,
        **special,
    )
