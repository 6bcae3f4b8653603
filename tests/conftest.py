"""What several tests share: tiny real models, a tiny real tokenizer, and examples that are the same on every run."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

if TYPE_CHECKING:
    from qad.runtimes.llamacpp import LlamaSession
    from tests.helpers_report import Made

# Derandomized: a failure seen once is seen by everybody. No deadline: shared machines stall.
hypothesis.settings.register_profile("qad", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("qad")

_ARCHITECTURES: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

_TEXT = (
    "A block of weights shares one scale. The student learns on the grid that the device stores.",
    "Three apples and four pears make seven fruits, because 3 + 4 = 7.",
    "Which weights does the device decode? The ones that the trainer saw, bit for bit.",
)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Return a maker of two-layer models with random weights: ``tiny_model("qwen2", tie_word_embeddings=False)``."""

    def make(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
        config_class, model_class = _ARCHITECTURES[architecture]
        sizes: dict[str, Any] = {
            "vocab_size": 320,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
        }
        torch.manual_seed(0)
        return model_class(config_class(**sizes | changes))

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with the three usual special tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return fast


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 512 KiB, to be filled; skip where mounting is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "qad-test", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("a full disk cannot be made here: there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a full disk cannot be made here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="session")
def report_records(tmp_path_factory: pytest.TempPathFactory) -> "Made":
    """Return records of every kind that a report takes, made once by the real commands."""
    from tests.helpers_report import make_records

    return make_records(tmp_path_factory.mktemp("records"))


@pytest.fixture(scope="session")
def random_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with ``model.gguf`` in it: of random weights, quick, and never at a loss for words."""
    from tests.helpers_think import make_random_run

    return make_random_run(tmp_path_factory.mktemp("random"))


@pytest.fixture(scope="module")
def random_llama(random_run: Path) -> "Iterator[LlamaSession]":
    """Open that file in llama.cpp."""
    from qad.runtimes import llamacpp
    from tests.helpers_runtimes import skip_without

    skip_without("llamacpp")
    with llamacpp.open(random_run / "model.gguf", threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def smollm() -> "Iterator[LlamaSession]":
    """Open SmolLM2 in llama.cpp, where it is at hand."""
    from qad.errors import UserError
    from qad.model import resolve_source
    from qad.runtimes import llamacpp
    from tests.helpers_runtimes import skip_without

    skip_without("llamacpp")
    try:
        path = Path(resolve_source("smollm2"))
    except UserError as error:
        pytest.skip(str(error))
    with llamacpp.open(path, threads=1) as opened:
        yield opened
