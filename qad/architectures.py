"""What an exporter must know about a model's architecture and its tokenizer's splitter, as two tables.

Everything that differs between supported models is an entry here; no other file branches on a model's name. To add an
architecture, add an entry to ``ARCHITECTURES``; to add a tokenizer family, one to ``SPLITTERS``.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, pre_tokenizers

from qad.errors import UserError

_FULL, _SLIDING = "full_attention", "sliding_attention"

_ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
_GATED = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_NORMS = ("input_layernorm", "post_attention_layernorm")
_QKV = _ATTENTION[0]
_LAST_NORM = "model.norm"
# Keys of yarn that change the result and that nothing in a GGUF file says.
_UNKNOWN_TO_GGUF = ("mscale", "mscale_all_dim", "truncate")


@dataclass(frozen=True)
class Fixed:
    """A setting that must have certain values, because nothing else is computed.

    Attributes:
        key: In ``config.json``.
        allowed: Its values, which may follow from the rest of the configuration.
        reason: What happens to others, as the end of a sentence.
    """

    key: str
    allowed: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    reason: str


@dataclass(frozen=True)
class Architecture:
    """One Hugging Face architecture.

    Attributes:
        model_type: As ``config.json`` calls it.
        hf_class: Name of its language-model class.
        gguf: Its name in GGUF metadata.
        stages: Linear modules of a layer in the order of the data, those that share an input together.
        norms: Modules of a layer that normalize.
        rope_types: Rotary scalings that are known to be computed alike everywhere.
        activation: Key of the feed-forward's activation in ``config.json``, and its value.
        permutes_qk: Whether GGUF stores the rows of q and k (weights and biases) in pairs of rotated halves.
        biases: Modules of a layer that may carry a bias.
        norm_offset: What the model adds to a norm's weight before it multiplies. GGUF stores the sum, which is what is
            computed with; ONNX the weight, and adds.
        windows: Which layers attend within ``sliding_window`` only: ``none``, ``all``, or ``typed``, those that
            ``layer_types`` calls so.
        gguf_windows: Whether llama.cpp computes such windows. Where it does not, a GGUF file is for contexts no longer
            than a window, within which both are the same.
        gguf_partial_rope: Whether llama.cpp rotates only a part of each head where the configuration says so.
        gptqmodel_splits: Whether GPTQModel's own loader wants projections apart that checkpoints have fused. Other
            loaders (transformers, vLLM) take them as they are.
        fixed: Settings that must have certain values.
        gguf_fixed: Those that must for GGUF.
    """

    model_type: str
    hf_class: str
    gguf: str
    stages: tuple[tuple[str, ...], ...] = (*_ATTENTION, *_GATED)
    norms: tuple[str, ...] = _NORMS
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    activation: tuple[str, str] = ("hidden_act", "silu")
    permutes_qk: bool = False
    biases: tuple[str, ...] = ()
    norm_offset: float = 0.0
    windows: str = "none"
    gguf_windows: bool = False
    gguf_partial_rope: bool = False
    gptqmodel_splits: bool = False
    fixed: tuple[Fixed, ...] = ()
    gguf_fixed: tuple[Fixed, ...] = ()

    def parameter_names(self, layers: int) -> Iterator[str]:
        """Yield every parameter name that a model of this architecture may have, optional ones included."""
        yield "model.embed_tokens.weight"
        for layer in range(layers):
            for module in (*self.norms, *(name for stage in self.stages for name in stage)):
                yield f"model.layers.{layer}.{module}.weight"
                if module in self.biases:
                    yield f"model.layers.{layer}.{module}.bias"
        yield f"{_LAST_NORM}.weight"
        yield "lm_head.weight"

    def gguf_names(self, layers: int) -> dict[str, str]:
        """Return Hugging Face name -> GGUF name of every parameter that a model may have."""
        index = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
        table = gguf.get_tensor_name_map(index[self.gguf], layers)
        names = {}
        for name in self.parameter_names(layers):
            found = table.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found is not None, name
            names[name] = found
        return names

    def permuted_heads(self, name: str, config: Mapping[str, Any]) -> int:
        """Return how many heads a parameter's rows are permuted within, 0 if they keep their order."""
        if not self.permutes_qk:
            return 0
        if ".self_attn.q_proj." in name:
            return config["num_attention_heads"]
        return key_value_heads(config) if ".self_attn.k_proj." in name else 0

    def offset(self, name: str) -> float:
        """Return what containers that store effective weights add to a parameter: ``norm_offset`` for a norm, else 0.

        Added and taken away in float32, as the model does. Many w lead to one fl(w + 1); an artifact keeps the one that
        fl(w + 1) - 1 gives, see ``artifact.save_artifact``.
        """
        module = name.removesuffix(".weight")
        is_norm = module == _LAST_NORM or any(module.endswith(f".{norm}") for norm in self.norms)
        return self.norm_offset if is_norm else 0.0


def _unset(_: Mapping[str, Any]) -> tuple[Any, ...]:
    return (None,)


def _off(_: Mapping[str, Any]) -> tuple[Any, ...]:
    return None, False


def _even_head_dim(config: Mapping[str, Any]) -> tuple[Any, ...]:
    return None, config["hidden_size"] // config["num_attention_heads"]


def _gemma_scale(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what llama.cpp scales queries by: a head's width, in the model of 62 layers that of hidden / heads."""
    width = config["hidden_size"] // config["num_attention_heads"]
    return (width if config["num_hidden_layers"] == 62 else head_dim(config),)


ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        Architecture(
            model_type="llama",
            hf_class="LlamaForCausalLM",
            gguf="llama",
            permutes_qk=True,
            biases=(*_QKV, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            rope_types=("default", "linear", "yarn", "llama3"),
        ),
        Architecture(
            model_type="qwen2",
            hf_class="Qwen2ForCausalLM",
            gguf="qwen2",
            biases=_QKV,
            windows="typed",
        ),
        Architecture(
            model_type="qwen3",
            hf_class="Qwen3ForCausalLM",
            gguf="qwen3",
            norms=(*_NORMS, "self_attn.q_norm", "self_attn.k_norm"),
            windows="typed",
        ),
        Architecture(
            model_type="mistral",
            hf_class="MistralForCausalLM",
            gguf="llama",
            permutes_qk=True,
            windows="all",
        ),
        Architecture(
            model_type="phi3",
            hf_class="Phi3ForCausalLM",
            gguf="phi3",
            stages=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
            rope_types=("default", "longrope"),
            windows="all",
            gguf_partial_rope=True,
            gptqmodel_splits=True,
            gguf_fixed=(Fixed("head_dim", _even_head_dim, "llama.cpp shares the hidden size out evenly"),),
        ),
        # The scale of its embedding, sqrt(hidden size), is the runtimes' part: files hold the plain rows.
        Architecture(
            model_type="gemma3_text",
            hf_class="Gemma3ForCausalLM",
            gguf="gemma3",
            norms=(
                *_NORMS,
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
                "self_attn.q_norm",
                "self_attn.k_norm",
            ),
            rope_types=("default", "linear"),
            activation=("hidden_activation", "gelu_pytorch_tanh"),
            norm_offset=1.0,
            windows="typed",
            gguf_windows=True,
            fixed=(
                Fixed("final_logit_softcapping", _unset, "training compares models before their logits are capped"),
                Fixed("attn_logit_softcapping", _unset, "transformers ignores it and other runtimes do not"),
                Fixed("use_bidirectional_attention", _off, "only models that write from left to right are trained"),
            ),
            gguf_fixed=(Fixed("query_pre_attn_scalar", _gemma_scale, "llama.cpp takes no other from a GGUF file"),),
        ),
    )
}


def get_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a model's ``config.json``, checked for features that would be dropped silently.

    Raises:
        UserError: Unknown architecture, or a setting that no exported file can express.
    """
    model_type = str(config.get("model_type"))
    if model_type not in ARCHITECTURES:
        raise UserError(f"architecture {model_type!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    layers = config.get("num_hidden_layers")
    if not isinstance(layers, int) or layers < 1:
        raise UserError(f"the model's config.json counts {layers!r} layers (num_hidden_layers): use a whole model")
    key, wanted = architecture.activation
    activation = config.get(key, wanted)
    if activation != wanted:
        raise UserError(
            f"a {model_type} model with activation {activation!r} cannot be exported: runtimes compute {wanted}"
        )
    types = set(config.get("layer_types") or ())
    if unknown := sorted(types - {_FULL, _SLIDING}):
        raise UserError(f"the model has layers of the type {unknown[0]!r}, which no exported file can express")
    for kind in sorted(types) or [_FULL]:
        rope_type = rope_parameters(config, kind)["rope_type"]
        if rope_type not in architecture.rope_types or (kind == _SLIDING and rope_type != "default"):
            raise UserError(
                f"rotary scaling {rope_type!r} of a {model_type} model's {kind} layers cannot be exported; "
                f"supported: {', '.join(architecture.rope_types if kind == _FULL else ('default',))}"
            )
    _check_fixed(config, architecture.fixed)
    return architecture


def check_gguf_can(config: Mapping[str, Any]) -> None:
    """Check that llama.cpp computes everything that a configuration, already checked, asks for.

    Raises:
        UserError: It does not; the message says what.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    _check_fixed(config, architecture.gguf_fixed)
    rope = rope_parameters(config)
    if unknown := sorted(key for key in _UNKNOWN_TO_GGUF if rope.get(key) not in (None, True)):
        raise UserError(f"the model's rotary scaling sets {unknown[0]}, which GGUF has no key for")
    if rotary_dim(config) != head_dim(config) and not architecture.gguf_partial_rope:
        raise UserError(
            f"the model rotates {rotary_dim(config)} of {head_dim(config)} dimensions of a head, and llama.cpp all of "
            f"them for {architecture.gguf}: it cannot be exported to GGUF"
        )


def _check_fixed(config: Mapping[str, Any], settings: tuple[Fixed, ...]) -> None:
    for setting in settings:
        found, allowed = config.get(setting.key), setting.allowed(config)
        if found not in allowed:
            raise UserError(f"the model has {setting.key} {found!r}, not {allowed[-1]!r}: {setting.reason}")


def architecture_of_gguf(name: str) -> Architecture:
    """Return the architecture that GGUF metadata calls ``name``; the first where several go by one name.

    Raises:
        UserError: None of ours.
    """
    for architecture in ARCHITECTURES.values():
        if architecture.gguf == name:
            return architecture
    known = ", ".join(dict.fromkeys(architecture.gguf for architecture in ARCHITECTURES.values()))
    raise UserError(f"GGUF architecture {name!r} is not supported; supported: {known}")


def head_dim(config: Mapping[str, Any]) -> int:
    """Return the width of one attention head: the configured one, else the hidden size shared out evenly."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def rotary_dim(config: Mapping[str, Any]) -> int:
    """Return how many dimensions of a head are rotated."""
    return int(head_dim(config) * (rope_parameters(config).get("partial_rotary_factor") or 1.0))


def key_value_heads(config: Mapping[str, Any]) -> int:
    """Return the number of key and value heads."""
    return config.get("num_key_value_heads") or config["num_attention_heads"]


def layer_types(config: Mapping[str, Any]) -> list[str]:
    """Return ``full_attention`` or ``sliding_attention`` for each layer: what it really does."""
    architecture, layers = ARCHITECTURES[config["model_type"]], config["num_hidden_layers"]
    if architecture.windows == "typed" and config.get("layer_types") and config.get("sliding_window"):
        return list(config["layer_types"])
    windowed = architecture.windows == "all" and config.get("sliding_window")
    return [_SLIDING if windowed else _FULL] * layers


def attention_window(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens, itself included, a token of a windowed layer sees; None without such a layer."""
    return config["sliding_window"] if _SLIDING in layer_types(config) else None


def gguf_context(config: Mapping[str, Any]) -> int:
    """Return the longest context for which llama.cpp computes what the model computes."""
    window = None if ARCHITECTURES[config["model_type"]].gguf_windows else attention_window(config)
    return min(config["max_position_embeddings"], window or config["max_position_embeddings"])


def rope_parameters(config: Mapping[str, Any], layer_type: str = _FULL) -> dict[str, Any]:
    """Return the rotary settings of a type of layers with ``rope_type`` and ``rope_theta`` filled in.

    Reads ``rope_parameters`` (transformers 5) and ``rope_theta`` with ``rope_scaling`` (before).
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if _FULL in found or _SLIDING in found:
        found = dict(found.get(layer_type) or {})
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
# Words may begin in capitals and go on in small letters, but not the other way round: Mistral's tekken, and o200k.
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+%s|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*%s|"
    r"%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASED % ("", "", r"\p{N}")
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_O200K = _CASED % (_CONTRACTION, _CONTRACTION, r"\p{N}{1,3}")

# What llama.cpp knows by name but computes otherwise: of letters it tells only ASCII ones by their case, and marks that
# combine with letters (in Hindi, Thai, or decomposed accents) it takes for signs.
_APPROXIMATED = (Splitter("tekken", (_TEKKEN,), ignore_merges=True), Splitter("gpt-4o", (_O200K,)))

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
        raise UserError(
            "only byte-level BPE tokenizers (as of SmolLM2, Qwen, Llama 3) and sentencepiece ones with bytes (as of "
            "Llama 2, Mistral, Phi-3, Gemma) can be exported to GGUF"
        )
    pieces = splits.pre_tokenize_str(_PROBE)
    same_cuts = [splitter for splitter in SPLITTERS.values() if splitter.build().pre_tokenize_str(_PROBE) == pieces]
    for splitter in same_cuts:
        if splitter.ignore_merges == bool(tokenizer.model.ignore_merges):
            return splitter
    for splitter in _APPROXIMATED:
        if splitter.build().pre_tokenize_str(_PROBE) == pieces:
            raise UserError(
                f"the tokenizer cuts text as {splitter.name} does, and llama.cpp does so for ASCII letters only: words "
                "with capitals or combining marks of other scripts would become other tokens; formats that bring "
                "their own tokenizer are not concerned"
            )
    raise UserError(
        "the tokenizer cuts text into words in a way that llama.cpp may not know, so its tokens would be wrong; "
        f"known splitters: {', '.join(SPLITTERS)}"
    )
