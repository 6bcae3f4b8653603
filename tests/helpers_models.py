"""Tiny random artifacts with a tokenizer of their own: every architecture, rotary scaling and tokenizer family.

The weights are large enough for attention and rotary embedding to matter: a wrong base or a wrong row order changes
the logits beyond any rounding.

Shapes: N output features, K input features, G blocks along K.
"""

import functools
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from qad.architectures import ARCHITECTURES, SPLITTERS
from qad.artifact import Artifact, save_artifact, tensor_sha256
from qad.grid import get_grid
from qad.plan import KEEP, is_tied, make_plan
from qad.sentencepieces import SPACE, byte_token
from qad.tensor import QuantizedTensor, dequantize, quantize, round_scales
from tests.helpers_grids import random_tensor

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %}{{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<start_of_turn>{{ message.role }}\n{{ message.content }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

# Text that a splitter or a merge can get wrong: digits, contractions, white space, code, scripts, emoji, chat markers.
VARIED_TEXTS = (
    "The ledger says 12345 baskets, 7 of them at 3.14 euros each; that's 21.98 in all.",
    "I'll say it's DON'T, we'Ve and they'RE... isn't it?!",
    "def f(x):\n    if x > 10:\n\treturn {'a': [1, 2, 33, 444]}\n\n\n# end   \n",
    "  two spaces before,   three inside, and some after   ",
    "Ça va, Zoë? Übergröße; naïve façade — «guillemets» … “quotes”",
    "Привет, мир! Γειά σου κόσμε. שלום עולם. नमस्ते दुनिया",
    "漢字とかなとカタカナ。我有12个苹果，吃了3个。",
    "½ cup, x² + y³, ٣٤٥, Ⅷ, 👍🏽 👩‍🚀 🇪🇺",
    "<|im_start|>user\nHello<|im_end|>\n<think>\nhm\n</think>",
    "\r\nwindows\r\nlines\r\n\r\n",
    "",
    "a",
)


@dataclass(frozen=True)
class TokenizerFamily:
    """How the tiny tokenizer of a family differs."""

    splitter: str
    special: tuple[str, ...]
    bos: str | None
    eos: str
    pad: str
    template: str
    adds_bos: bool = False
    nfc: bool = False
    plain: tuple[str, ...] = ()
    # Of sentencepiece kind: whether text gets a leading space. None: byte-level.
    prefix: bool | None = None
    strips: tuple[str, ...] = ()


_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PIECES = ("<unk>", "<s>", "</s>")
_HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
TOKENIZERS: dict[str, TokenizerFamily] = {
    "smollm": TokenizerFamily("smollm", _CHATML, "<|im_start|>", "<|im_end|>", "<|im_end|>", CHAT_TEMPLATE),
    "qwen": TokenizerFamily(
        "qwen2",
        _CHATML,
        None,
        "<|im_end|>",
        "<|endoftext|>",
        CHAT_TEMPLATE,
        nfc=True,
        plain=("<think>", "</think>", "<|fim_prefix|>"),
    ),
    "llama3": TokenizerFamily(
        "llama-bpe", _HEADERS, "<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", LLAMA3_TEMPLATE, adds_bos=True
    ),
    "gpt2": TokenizerFamily("gpt-2", _CHATML, None, "<|im_end|>", "<|endoftext|>", CHAT_TEMPLATE),
    "mistral": TokenizerFamily(
        "default", _PIECES, "<s>", "</s>", "</s>", MISTRAL_TEMPLATE, adds_bos=True, prefix=True, plain=("<tool>",)
    ),
    "phi3": TokenizerFamily(
        "default",
        (*_PIECES, "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<s>",
        "<|end|>",
        "<|endoftext|>",
        PHI3_TEMPLATE,
        prefix=True,
        strips=("</s>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "gemma": TokenizerFamily(
        "default",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"),
        "<bos>",
        "<eos>",
        "<pad>",
        GEMMA_TEMPLATE,
        adds_bos=True,
        prefix=False,
        plain=("\n\n", "\n\n\n", "<b>", "\u2581\u2581\u2581"),
    ),
}


def verify_text() -> str:
    """Return the text that ``qad verify`` uses."""
    return resources.files("qad.data").joinpath("verify.txt").read_text()


def make_pieces(kind: TokenizerFamily) -> Tokenizer:
    """Return a tokenizer as those converted from sentencepiece: bytes, spaces marked, every possible merge listed."""
    spaces = normalizers.Replace(" ", SPACE)
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])  # type: ignore[assignment]
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never")  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(vocab_size=420, min_frequency=2, show_progress=False)
    trained.train_from_iterator([verify_text(), *VARIED_TEXTS], trainer)
    learned = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    texts = [*kind.special, *(byte_token(value) for value in range(256)), *(text for text, _ in learned)]
    # Runs of spaces and of signs, as real vocabularies have them: there several merges make the same token.
    texts += [SPACE * length for length in range(2, 9)] + ["=" * length for length in (2, 3, 4, 8)]
    vocabulary = {text: index for index, text in enumerate(dict.fromkeys(texts))}
    merges = [
        (text[:cut], text[cut:])
        for text in vocabulary
        for cut in range(len(text) - 1, 0, -1)
        if text not in kind.special and text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    decoding = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if kind.prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])  # type: ignore[assignment]
        decoding.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces  # type: ignore[assignment]
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # type: ignore[assignment]
    tokenizer.decoder = decoders.Sequence(decoding)  # type: ignore[assignment]
    tokenizer.add_special_tokens(
        [AddedToken(text, normalized=False, rstrip=text in kind.strips) for text in kind.special]
    )
    return tokenizer


def make_byte_pairs(kind: TokenizerFamily) -> Tokenizer:
    """Return a byte-level tokenizer."""
    splitter = SPLITTERS[kind.splitter]
    tokenizer = Tokenizer(models.BPE(ignore_merges=splitter.ignore_merges))
    tokenizer.pre_tokenizer = splitter.build()  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    if kind.nfc:
        tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        min_frequency=1,
        special_tokens=list(kind.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([verify_text(), *VARIED_TEXTS], trainer)
    return tokenizer


@functools.cache
def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of about 600 tokens, trained on a page of text."""
    kind = TOKENIZERS[family]
    tokenizer = make_byte_pairs(kind) if kind.prefix is None else make_pieces(kind)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in kind.plain])
    if kind.adds_bos:
        assert kind.bos is not None
        first = (kind.bos, tokenizer.token_to_id(kind.bos))
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=f"{kind.bos} $A", pair=f"{kind.bos} $A $B", special_tokens=[first]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=kind.eos,
        pad_token=kind.pad,
        clean_up_tokenization_spaces=False,
        **({"bos_token": kind.bos} if kind.bos else {}),
        **({"unk_token": "<unk>"} if "<unk>" in kind.special else {}),
    )
    fast.chat_template = kind.template
    return fast


@dataclass(frozen=True)
class TinyModel:
    """A case: architecture, tokenizer family, changes to the configuration, bits of its linear layers."""

    model_type: str
    tokenizer: str
    config: dict[str, Any] = field(default_factory=dict)
    bits: int = 4


_LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 128}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0 + 0.05 * n for n in range(12)],
    "long_factor": [1.5 + 0.9 * n for n in range(12)],
}
_GEMMA = {
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 24,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}

MODELS: dict[str, TinyModel] = {
    "llama-tied": TinyModel("llama", "smollm", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}),
    "llama-untied": TinyModel("llama", "llama3", {"tie_word_embeddings": False}, bits=8),
    "llama-biases": TinyModel("llama", "gpt2", {"attention_bias": True, "mlp_bias": True, "head_dim": 64}),
    "llama-scaled": TinyModel("llama", "llama3", {"rope_parameters": _LLAMA3_SCALING}),
    "llama-linear": TinyModel(
        "llama", "smollm", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    ),
    "qwen2": TinyModel(
        "qwen2",
        "qwen",
        {
            "hidden_size": 896,
            "num_attention_heads": 14,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "vocab_size": 704,
        },
    ),
    "qwen3": TinyModel("qwen3", "qwen", {"head_dim": 64, "tie_word_embeddings": False}),
    "qwen3-yarn": TinyModel("qwen3", "qwen", {"head_dim": 64, "rope_parameters": _YARN}),
    "mistral": TinyModel("mistral", "mistral", {"sliding_window": None, "head_dim": 64, "tie_word_embeddings": False}),
    "mistral-window": TinyModel("mistral", "smollm", {"sliding_window": 300}),
    "phi3": TinyModel(
        "phi3", "phi3", {"sliding_window": 300, "tie_word_embeddings": False, "original_max_position_embeddings": 512}
    ),
    "phi3-longrope": TinyModel("phi3", "gpt2", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 128}),
    "gemma3": TinyModel("gemma3_text", "gemma", _GEMMA),
    "gemma3-linear": TinyModel(
        "gemma3_text",
        "smollm",
        _GEMMA
        | {
            "layer_types": ["full_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


def make_model(case: str, **changes: Any) -> Any:
    """Return a case's model with random weights in float32; ``changes`` to its configuration."""
    tiny = MODELS[case]
    tokenizer = make_tokenizer(tiny.tokenizer)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(tiny.model_type, **(sizes | tiny.config | changes)))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                offset = ARCHITECTURES[tiny.model_type].offset(name)
                # Gemma's embedding is scaled by the root of its width and its layers' outputs are normalized: at one
                # they would be lost beside it, and what attention looks at with them.
                size = 1.0 if not offset else 12.0 if "post_" in name else 2.0 if "self_attn" in name else 1.0
                parameter.copy_(size - offset + 0.1 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
    return model.eval()


def wild(shape: tuple[int, int], grid_name: str, generator: torch.Generator) -> QuantizedTensor:
    """Return a tensor of random codes over the whole range under scales of every magnitude, the extremes included."""
    grid = get_grid(grid_name)
    if not grid.is_plain:
        return random_tensor(*shape, grid, seed=int(torch.randint(1 << 30, (), generator=generator)))
    codes = torch.randint(grid.code_min, grid.code_max + 1, shape, generator=generator).to(torch.int8)
    exponents = torch.rand((shape[0], shape[1] // grid.block), generator=generator) * 30 - 14
    signs = torch.randint(0, 2, exponents.shape, generator=generator) * 2 - 1
    scales = round_scales(2.0**exponents * signs, grid)
    scales[0, 0], scales[-1, -1] = grid.scale_floor, grid.scale_ceiling
    if grid.signed_scale:
        scales[-1, 0] = -grid.scale_ceiling
    return QuantizedTensor(codes, scales.to(torch.float16), grid)


def make_artifact(
    run: Path,
    case: str,
    *,
    extreme: bool = False,
    linear_grid: str | None = None,
    grids: dict[str, str] | None = None,
    **changes: Any,
) -> Artifact:
    """Save a case's artifact under ``run``.

    Args:
        run: The run folder.
        case: Which of ``MODELS``.
        extreme: Codes and scales that no sane model has, in linear layers only if ``linear_grid`` is given too.
        linear_grid: Grid of the linear layers, in place of the plan's.
        grids: Grids of single tensors, in place of either.
        changes: To the model's configuration.
    """
    tiny = MODELS[case]
    model = make_model(case, **changes)
    generator = torch.Generator().manual_seed(1)
    quantized: dict[str, QuantizedTensor] = {}
    kept: dict[str, torch.Tensor] = {}
    parameters = dict(model.named_parameters())
    for name, planned in make_plan(model, tiny.bits).items():
        weight = parameters[name].detach()
        is_linear = ".layers." in name and planned != KEEP
        grid = (grids or {}).get(name) or (linear_grid if linear_grid and is_linear else planned)
        if grid == KEEP:
            kept[name] = weight
        elif extreme and (is_linear or linear_grid is None):
            quantized[name] = wild((weight.shape[0], weight.shape[1]), grid, generator)
        else:
            quantized[name] = quantize(weight, get_grid(grid))
    return save_artifact(
        run,
        config=model.config,
        tokenizer=make_tokenizer(tiny.tokenizer),
        quantized=quantized,
        kept=kept,
        tied_head=is_tied(model),
        forward_sha256={name: tensor_sha256(dequantize(tensor)) for name, tensor in quantized.items()},
        recipe={"name": case, "bits": tiny.bits},
    )
