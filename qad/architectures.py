"""What an exporter must know about a model's architecture and its tokenizer's splitter, as two tables.

Everything that differs between supported models is an entry here; no other file branches on a model's name. To add an
architecture, add an entry to ``ARCHITECTURES``; to add a tokenizer family, one to ``SPLITTERS``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, Tokenizer, pre_tokenizers

from qad.errors import UserError

_LAYER_MODULES = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face architecture.

    Attributes:
        model_type: As ``config.json`` calls it.
        hf_class: Name of its language-model class.
        gguf: Its name in GGUF metadata.
        permutes_qk: Whether GGUF stores the rows of q and k (weights and biases) in pairs of rotated halves.
        biases: Modules of a layer that may carry a bias.
        qk_norms: Whether a layer normalizes q and k per head.
        rope_types: Rotary scalings that llama.cpp computes for it.
    """

    model_type: str
    hf_class: str
    gguf: str
    permutes_qk: bool
    biases: tuple[str, ...]
    qk_norms: bool
    rope_types: tuple[str, ...]

    def parameter_names(self, layers: int) -> Iterator[str]:
        """Yield every parameter name that a model of this architecture may have, optional ones included."""
        yield "model.embed_tokens.weight"
        modules = (*_LAYER_MODULES, *(("self_attn.q_norm", "self_attn.k_norm") if self.qk_norms else ()))
        for layer in range(layers):
            for module in modules:
                yield f"model.layers.{layer}.{module}.weight"
                if module in self.biases:
                    yield f"model.layers.{layer}.{module}.bias"
        yield "model.norm.weight"
        yield "lm_head.weight"

    def permuted_heads(self, name: str, config: Mapping[str, Any]) -> int:
        """Return how many heads a parameter's rows are permuted within, 0 if they keep their order."""
        if not self.permutes_qk:
            return 0
        if ".self_attn.q_proj." in name:
            return config["num_attention_heads"]
        return key_value_heads(config) if ".self_attn.k_proj." in name else 0


ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(
            model_type="llama",
            hf_class="LlamaForCausalLM",
            gguf="llama",
            permutes_qk=True,
            biases=(*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            qk_norms=False,
            rope_types=("default", "linear", "yarn", "llama3"),
        ),
        Architecture(
            model_type="qwen2",
            hf_class="Qwen2ForCausalLM",
            gguf="qwen2",
            permutes_qk=False,
            biases=_QKV,
            qk_norms=False,
            rope_types=("default", "linear", "yarn"),
        ),
        Architecture(
            model_type="qwen3",
            hf_class="Qwen3ForCausalLM",
            gguf="qwen3",
            permutes_qk=False,
            biases=(),
            qk_norms=True,
            rope_types=("default", "linear", "yarn"),
        ),
    )
}


def get_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a model's ``config.json``, checked for features that runtimes would drop silently.

    Raises:
        UserError: Unknown architecture, or a setting that no exported file can express.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise UserError(f"architecture {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(
            f"a {model_type} model with activation {activation!r} cannot be exported: runtimes compute silu"
        )
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise UserError(
            "the model uses sliding-window attention, which runtimes ignore for this architecture: "
            "set use_sliding_window to false in its config.json"
        )
    rope_type = rope_parameters(config)["rope_type"]
    if rope_type not in architecture.rope_types:
        raise UserError(
            f"rotary scaling {rope_type!r} of a {model_type} model cannot be exported; "
            f"supported: {', '.join(architecture.rope_types)}"
        )
    return architecture


def architecture_of_gguf(name: str) -> Architecture:
    """Return the architecture that GGUF metadata calls ``name``.

    Raises:
        UserError: None of ours.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.gguf == name:
            return architecture
    known = ", ".join(architecture.gguf for architecture in ARCHITECTURES.values())
    raise UserError(f"GGUF architecture {name!r} is not supported; supported: {known}")


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the width of one attention head: the configured one, else the hidden size shared out evenly."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Return the number of key and value heads."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings with ``rope_type`` and ``rope_theta`` filled in.

    Reads ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling`` (before).
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.get("rope_type") or found.pop("type", None) or "default"
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return found


@dataclass(frozen=True)
class Splitter:
    """How a family of byte-level BPE tokenizers cuts text into words before it merges bytes.

    Attributes:
        name: What llama.cpp calls it (``tokenizer.ggml.pre``).
        patterns: Regular expressions applied one after another, each isolating its matches.
        ignore_merges: Whether a word that is itself a token is taken whole, whatever the merges say.
    """

    name: str
    patterns: tuple[str, ...]
    ignore_merges: bool = False

    def build(self) -> pre_tokenizers.PreTokenizer:
        """Return the splitter as the tokenizers library runs it."""
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # type: ignore[arg-type]


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The pattern of cl100k and its heirs; they differ in how many digits stay together.
_CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLITTERS: dict[str, Splitter] = {
    splitter.name: splitter
    for splitter in (
        Splitter("gpt-2", (_GPT2,)),
        Splitter("smollm", (r"\p{N}", _GPT2)),
        Splitter("qwen2", (_CL100K % r"\p{N}",)),
        Splitter("llama-bpe", (_CL100K % r"\p{N}{1,3}",), ignore_merges=True),
        Splitter("smaug-bpe", (_CL100K % r"\p{N}{1,3}",)),
    )
}

# Contractions in both cases, runs of digits, punctuation before line ends, spaces of all kinds, scripts and emoji:
# enough for any two entries of the table to cut it differently.
_PROBE = (
    "I'LL say it's 7, 42, 365 or 12345 (not 3.14)...\n\n\tIf x=10:\n    y -= 2;  \r\n"
    "Ça va? Ünïcode 漢字かな ½ ٣٤ 👩‍🚀!!\n \n   don't 'RE-do a1b22c333d4444   "
)


def detect_splitter(tokenizer: Tokenizer) -> Splitter:
    """Return the splitter that cuts text as a tokenizer does.

    llama.cpp's converter recognizes a tokenizer by a hash of the token ids of a fixed text, which knows only published
    vocabularies. Comparing the cuts themselves says the same of those, and also of a vocabulary nobody has published.

    Raises:
        UserError: Not a byte-level BPE tokenizer, or one whose splitter is not in the table.
    """
    splits = tokenizer.pre_tokenizer
    if type(tokenizer.model).__name__ != "BPE" or splits is None or tokenizer.model.byte_fallback:
        raise UserError("only byte-level BPE tokenizers (as of SmolLM2, Qwen, Llama 3) can be exported to GGUF")
    pieces = splits.pre_tokenize_str(_PROBE)
    same_cuts = [splitter for splitter in SPLITTERS.values() if splitter.build().pre_tokenize_str(_PROBE) == pieces]
    for splitter in same_cuts:
        if splitter.ignore_merges == bool(tokenizer.model.ignore_merges):
            return splitter
    raise UserError(
        "the tokenizer cuts text into words in a way that llama.cpp may not know, so its tokens would be wrong; "
        f"known splitters: {', '.join(SPLITTERS)}"
    )
