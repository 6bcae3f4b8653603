"""The metadata of a GGUF file: the model's numbers and its tokenizer, as llama.cpp reads them.

A key that is absent is rarely an error to llama.cpp: it falls back to a default, and the model is silently wrong. So
every key that has a default is written, even where the default would be right.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, LlamaFileType, RopeScalingType, TokenType, size_label
from numpy.typing import NDArray
from tokenizers import Tokenizer

import qad
from qad.architectures import (
    ARCHITECTURES,
    attention_window,
    detect_splitter,
    gguf_context,
    head_dim,
    key_value_heads,
    layer_types,
    rope_parameters,
    rotary_dim,
)
from qad.artifact import Artifact
from qad.errors import UserError
from qad.export._tokenizer import SavedTokenizer, read_tokenizer
from qad.sentencepieces import SPACE, byte_token, is_sentencepieces, read_pieces

RUN_HASH = "qad.run_hash"
RECIPE = "qad.recipe"
VERSION = "qad.version"
ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")

_FILE_TYPES = {
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q5_0": LlamaFileType.MOSTLY_Q5_0,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q8_0_fp16": LlamaFileType.MOSTLY_Q8_0,
    # Small: the mixes of llama.cpp that give no tensor more than the name says.
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_S,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
}


def _without_orders(name: str) -> str:
    """Return a model's name so that llama.cpp reads no orders in it, see ``add_name``."""
    for order in ("phi-3", "phi3", "modern-bert"):
        name = re.sub(re.escape(order), lambda found: f"{found[0][0]} {found[0][1:]}", name, flags=re.IGNORECASE)
    return name


def add_name(writer: GGUFWriter, artifact: Artifact, strips: bool) -> None:
    """Add the model's name, from which llama.cpp takes whether special tokens swallow white space.

    A file whose name contains ``phi-3`` has white space removed after nearly all of them, and no other file has
    (``llama_vocab::impl::load``); what the tokenizer does is not asked for.

    Args:
        writer: The writer.
        artifact: What is exported.
        strips: Whether the tokenizer does so, see ``add_tokenizer``.
    """
    origins = (artifact.config.get("_name_or_path"), artifact.recipe.get("student"), artifact.recipe.get("teacher"))
    origin = next((str(name) for name in origins if name), artifact.folder.absolute().parent.name)
    name = _without_orders(Path(origin).name.removesuffix(".gguf"))
    writer.add_name(f"{name} (phi-3 tokens)" if strips else name)


def add_general(writer: GGUFWriter, artifact: Artifact, parameters: int, main_grid: str | None) -> None:
    """Add sizes and where the file came from.

    Args:
        writer: The writer.
        artifact: What is exported.
        parameters: Number of weights.
        main_grid: Grid of most weights, None if none is quantized.
    """
    writer.add_type("model")
    writer.add_size_label(size_label(parameters, parameters, 0, 0))
    writer.add_quantization_version(2)
    writer.add_file_type(_FILE_TYPES[main_grid] if main_grid else LlamaFileType.ALL_F32)
    writer.add_string(RUN_HASH, artifact.run_hash)
    writer.add_string(RECIPE, json.dumps(artifact.recipe, sort_keys=True))
    writer.add_string(VERSION, qad.__version__)


def add_model(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Add the numbers of the model: sizes, heads, norms, windows, rotary embedding."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(gguf_context(config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(key_value_heads(config))
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    window = attention_window(config)
    if window and ARCHITECTURES[config["model_type"]].gguf_windows:
        kinds = layer_types(config)
        writer.add_sliding_window(window)
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in kinds])
        writer.add_rope_freq_base_swa(float(rope_parameters(config, "sliding_attention")["rope_theta"]))
    _add_rope(writer, config)


_SCALINGS = {"linear": RopeScalingType.LINEAR, "yarn": RopeScalingType.YARN, "longrope": RopeScalingType.LONGROPE}


def _add_rope(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Add the numbers of the rotary embedding of full attention."""
    rope = rope_parameters(config)
    writer.add_rope_dimension_count(rotary_dim(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    scaling = _SCALINGS.get(rope["rope_type"])
    if scaling is None:
        return
    writer.add_rope_scaling_type(scaling)
    original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
    if scaling is RopeScalingType.LONGROPE:
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(_longrope_attention(config, rope, original))
        return
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if scaling is RopeScalingType.YARN:
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32.0))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1.0))


def _longrope_attention(config: dict[str, Any], rope: dict[str, Any], original: int) -> float:
    """Return what cosines and sines are multiplied by (LongRoPE, arXiv 2402.13753, as transformers computes it)."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    factor = rope.get("factor") or config["max_position_embeddings"] / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rope_factors(config: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Return the tensors of numbers that llama.cpp divides rotary frequencies by: none, Llama 3's or LongRoPE's."""
    rope = rope_parameters(config)
    if rope["rope_type"] == "llama3":
        return {ROPE_FACTORS[0]: _llama3_rope_factors(config)}
    if rope["rope_type"] == "longrope":
        lists = rope["long_factor"], rope["short_factor"]
        return {name: np.array(values, dtype=np.float32) for name, values in zip(ROPE_FACTORS[1:], lists, strict=True)}
    return {}


def _llama3_rope_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """Return what llama.cpp divides each rotary frequency by under Llama 3's scaling.

    Wavelengths shorter than the original context over ``high_freq_factor`` stay, those longer than it over
    ``low_freq_factor`` are stretched by ``factor``, those between are blended (Llama 3.1's reference code).

    Returns:
        float32 of shape [head_dim / 2].
    """
    rope = rope_parameters(config)
    width = head_dim(config)
    frequencies = float(rope["rope_theta"]) ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / (kept + (1.0 - kept) / factor)).astype(np.float32)


def _looks_like_control(text: str) -> bool:
    """Return whether a token is a chat marker by its form; some tokenizers (Qwen) do not flag all of theirs."""
    return (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<\uff5c") and text.endswith("\uff5c>"))


def _tokens(saved: SavedTokenizer, size: int) -> tuple[list[str], list[int]]:
    """Return the text and the type of each of the model's tokens; rows beyond the tokenizer are unused ones."""
    vocabulary = saved.vocabulary()
    if outside := {index: text for text, index in vocabulary.items() if index >= size}:
        raise UserError(
            f"the tokenizer has token {min(outside)} ({outside[min(outside)]!r}) but the model's embedding only {size} "
            "rows: the tokenizer belongs to another model"
        )
    texts, types = [""] * size, [int(TokenType.NORMAL)] * size
    for text, index in vocabulary.items():
        texts[index] = text
    for index in set(range(size)).difference(vocabulary.values()):
        texts[index], types[index] = f"[PAD{index}]", int(TokenType.UNUSED)
    for index, token in saved.tokenizer.added_tokens_decoder.items():
        control = token.special or _looks_like_control(texts[index])
        types[index] = int(TokenType.CONTROL if control else TokenType.USER_DEFINED)
    return texts, types


def _first(token_id: int | list[int] | None) -> int | None:
    return token_id[0] if isinstance(token_id, list) else token_id


def _strips(tokenizer: Any, texts: list[str], types: list[int]) -> bool:
    """Return whether special tokens swallow the white space after them: none, or those that do in Phi-3.

    Raises:
        UserError: Others do, or they do something else to the text beside them.
    """
    added = tokenizer.added_tokens_decoder
    special = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    rstrip = {token.content for token in added.values() if token.rstrip}
    strange = sorted(token.content for token in added.values() if token.lstrip or token.single_word)
    keeping = {"<unk>", "<s>", "<|endoftext|>"}
    phi = {texts[index] for index in added if types[index] in special} - keeping
    if not strange and (not rstrip or (rstrip == phi and keeping | {"</s>"} <= set(texts))):
        return bool(rstrip)
    raise UserError(
        f"the tokenizer's token {(strange or sorted(rstrip))[0]!r} takes in white space or wants to stand alone, which "
        "llama.cpp does for no model but Phi-3: its tokens would be wrong"
    )


def _add_sentencepieces(writer: GGUFWriter, backend: Tokenizer, texts: list[str], types: list[int]) -> None:
    """Add what is said of a sentencepiece-like tokenizer: scores, and whether text gets a leading space."""
    pieces = read_pieces(backend, texts)
    for value in range(256):
        types[texts.index(byte_token(value))] = int(TokenType.BYTE)
    for index, text in enumerate(texts):
        if types[index] == TokenType.USER_DEFINED and not text.strip(SPACE):
            # A run of spaces. What is user-defined is shown as it is written, which is not as a space.
            types[index] = int(TokenType.NORMAL)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([pieces.scores.get(text, 0.0) for text in texts])
    writer.add_add_space_prefix(pieces.space_prefix)


def _add_byte_pairs(writer: GGUFWriter, saved: SavedTokenizer) -> None:
    """Add what is said of a byte-level tokenizer: merges and splitter."""
    splitter = detect_splitter(saved.tokenizer.backend_tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter.name)
    writer.add_token_merges(saved.merges())
    writer.add_add_space_prefix(False)


def add_tokenizer(writer: GGUFWriter, folder: Path, config: dict[str, Any]) -> bool:
    """Add vocabulary, merges or scores, splitter, special tokens and chat template.

    Returns:
        Whether special tokens swallow the white space after them, which only the model's name can say.

    Raises:
        UserError: No tokenizer, one that llama.cpp cannot run, or one that does not belong to the model.
    """
    saved = read_tokenizer(folder)
    tokenizer = saved.tokenizer
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) is a program of transformers and has no "
            "tokenizer.json, from which llama.cpp's would be made: use --format gptq or onnx, which keep its files"
        )
    backend = tokenizer.backend_tokenizer
    texts, types = _tokens(saved, config["vocab_size"])
    strips = _strips(tokenizer, texts, types)
    if is_sentencepieces(backend):
        if tokenizer.unk_token_id is not None and types[tokenizer.unk_token_id] == TokenType.CONTROL:
            types[tokenizer.unk_token_id] = int(TokenType.UNKNOWN)
        _add_sentencepieces(writer, backend, texts, types)
    else:
        _add_byte_pairs(writer, saved)
    writer.add_token_list(texts)
    writer.add_token_types(types)
    eos = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else _first(config.get("eos_token_id"))
    # Without the key llama.cpp takes token 11 for the first; a model without one never sees it, for none is added.
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else _first(config.get("bos_token_id"))
    bos = eos if bos is None else bos
    for add, token_id in (
        (writer.add_bos_token_id, bos),
        (writer.add_eos_token_id, eos),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token_id is not None:
            add(int(token_id))
    # What the tokenizer does, rather than what its settings say: both forms of settings exist.
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(len(encoded) > 1 and encoded[0] == bos)
    writer.add_add_eos_token(len(encoded) > 1 and encoded[-1] == eos)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        writer.add_chat_template(template)
    return strips


def main_grid(artifact: Artifact) -> str | None:
    """Return the grid of most quantized weights, the embedding aside; None if nothing is quantized."""
    counts: dict[str, int] = {}
    for name, grid in artifact.grids.items():
        counts[grid] = counts.get(grid, 0) + (0 if "embed_tokens" in name else math.prod(artifact.shape(name)))
    return max(counts, key=lambda grid: counts[grid]) if counts else None
