"""ONNX Runtime on ONNX folders.

onnxruntime-genai would be the other way to run them. It is left aside: it draws tokens by itself, with rules of its
own, and gives the logits of one position. What it wants is in the folder all the same.

The key-value cache of an answer is one buffer per layer that the model's attention writes into, made as large as prompt
and answer; without it each token would copy all before it.

Shapes: B batch, T tokens, V vocabulary.
"""

import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from qad.errors import UserError
from qad.model import load_tokenizer
from qad.runtimes import _cores
from qad.runtimes._session import TokenizerSession

FORMATS = ("onnx",)

_INSTALL = "pip install 'qad[onnx]'"
_CONFIG_FILE = "genai_config.json"
# Tokens of one run: their logits stay near 300 MB for the largest vocabularies.
_BATCH = 512
_DECODER_KEYS = ("head_size", "num_key_value_heads")
_ERRORS_ONLY = 3


def available() -> str | None:
    """Return None if ONNX Runtime can run here, else the reason and the remedy."""
    if importlib.util.find_spec("onnxruntime") is None:
        return f"onnxruntime is not installed: {_INSTALL}"
    try:
        import onnxruntime  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"onnxruntime cannot be loaded ({error}): reinstall it with {_INSTALL}"
    return None


@dataclass
class _Cache:
    """Keys and values of one sequence, in place: the buffers are both what the model reads and what it writes.

    Attributes:
        buffers: Name of each input -> [1, heads, room, head size].
        tokens: How many tokens they hold.
    """

    buffers: dict[str, Any]
    tokens: int = 0


class OrtSession(TokenizerSession):
    """A decoder with key-value cache in ONNX Runtime. Satisfies ``qad.runtimes.Session``."""

    def __init__(self, engine: Any, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], device: str) -> None:
        model = settings["model"]
        eos = model.get("eos_token_id")
        super().__init__(tokenizer, eos if isinstance(eos, list) else [eos], int(model["context_length"]))
        self._engine: Any = engine
        self._device = device
        decoder = model["decoder"]
        self._heads, self._head_size = int(decoder["num_key_value_heads"]), int(decoder["head_size"])
        self._inputs = {entry.name: entry.type for entry in engine.get_inputs()}
        self._past = [name for name in self._inputs if name.startswith("past_key_values.")]
        (logits,) = [entry for entry in engine.get_outputs() if entry.name == "logits"]
        self._vocabulary = int(logits.shape[-1])

    @property
    def vocabulary(self) -> int:
        """Number of logits per position."""
        return self._vocabulary

    def _cache(self, tokens: int) -> _Cache:
        """Return an empty key-value cache that takes that many tokens."""
        from onnxruntime import OrtValue

        shape = (1, self._heads, tokens, self._head_size)
        return _Cache(
            {
                # Zeros, and not what the memory held: what is masked is multiplied by nought, and must be a number.
                name: OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype=self._number(name)), self._device, 0)
                for name in self._past
            }
        )

    def _cache_bytes(self, cache: _Cache) -> int:
        """Return the bytes that a cache takes."""
        return sum(
            math.prod(buffer.shape()) * np.dtype(self._number(name)).itemsize for name, buffer in cache.buffers.items()
        )

    def _number(self, name: str) -> type[np.floating[Any]]:
        return np.float16 if self._inputs[name] == "tensor(float16)" else np.float32

    def _run(self, tokens_T: NDArray[np.int64], cache: _Cache) -> NDArray[np.float32]:
        """Run tokens after those of a cache, which then holds them too; return the logits of each, [T, V]."""
        if int(tokens_T.min()) < 0 or int(tokens_T.max()) >= self._vocabulary:
            raise ValueError(f"tokens must lie in 0..{self._vocabulary - 1}")
        count, total = len(tokens_T), cache.tokens + len(tokens_T)
        positions = np.arange(cache.tokens, total, dtype=np.int64)
        fed = {
            "input_ids": tokens_T.reshape(1, count),
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": positions.reshape(1, count),
        }
        binding = self._engine.io_binding()
        for name, value in fed.items():
            if name in self._inputs:
                binding.bind_cpu_input(name, value)
        binding.bind_output("logits", "cpu")
        for name, buffer in cache.buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values.", "present."), buffer)
        self._engine.run_with_iobinding(binding)
        cache.tokens = total
        # Outputs come in the order in which they were bound.
        return binding.get_outputs()[0].numpy()[0].astype(np.float32)

    def _next(self, tokens: Sequence[int], cache: _Cache) -> tuple[NDArray[np.float32], _Cache]:
        """Return the logits after the last token, shape [V], and the cache that includes them all."""
        array = np.asarray(tokens, dtype=np.int64)
        assert array.size, "no tokens"
        logits = np.empty(0, dtype=np.float32)
        for start in range(0, len(array), _BATCH):
            logits = self._run(array[start : start + _BATCH], cache)[-1]
        return logits, cache

    def logits(self, tokens_BT: ArrayLike) -> NDArray[np.float32]:
        """Return the logits after each token of each sequence, shape [B, T, V]."""
        tokens = np.asarray(tokens_BT, dtype=np.int64)
        assert tokens.ndim == 2, tokens.shape
        assert tokens.size, "no tokens"
        batch, length = tokens.shape
        if length > self._context:
            raise UserError(f"{length} tokens do not fit the model's context of {self._context}: ask for fewer")
        out = np.empty((batch, length, self._vocabulary), dtype=np.float32)
        for row in range(batch):
            cache = self._cache(length)
            for start in range(0, length, _BATCH):
                end = min(start + _BATCH, length)
                out[row, start:end] = self._run(tokens[row, start:end], cache)
        return out

    def close(self) -> None:
        """Free the model. May be called twice."""
        self._engine = None


def _settings(path: Path) -> dict[str, Any]:
    """Return a folder's ``genai_config.json``.

    Raises:
        UserError: Missing, damaged, or not of a decoder.
    """
    file = path / _CONFIG_FILE
    if not file.is_file():
        raise UserError(f"{file} is missing: it says how the model's cache is laid out; export the folder again")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        model = found["model"]
        for owner, key in ((model, "context_length"), *((model["decoder"], key) for key in _DECODER_KEYS)):
            if not isinstance(owner[key], int) or owner[key] < 1:
                raise ValueError(f"{key} is {owner[key]!r}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); export the folder again") from error
    return found


def open(path: Path, device: str = "cpu", threads: int | None = None) -> OrtSession:  # noqa: A001
    """Open an ONNX folder.

    Args:
        path: The folder.
        device: ``cpu``, or ``gpu`` where ONNX Runtime was built for CUDA.
        threads: Threads of the CPU; the free physical cores if None.

    Raises:
        UserError: ONNX Runtime is not installed, or the folder is missing, damaged or of another kind of model.
    """
    if device not in ("cpu", "gpu"):
        raise UserError(f"unknown device {device!r}: cpu or gpu")
    if reason := available():
        raise UserError(reason)
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        raise UserError("this onnxruntime was built without CUDA: install onnxruntime-gpu in its place, or use cpu")
    settings = _settings(path)
    tokenizer = load_tokenizer(str(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or _cores.free_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    try:
        engine = onnxruntime.InferenceSession(str(path / "model.onnx"), options, providers=[provider])
        return OrtSession(engine, tokenizer, settings, "cuda" if device == "gpu" else "cpu")
    except Exception as error:  # its own exceptions derive from nothing closer
        raise UserError(f"ONNX Runtime cannot load {path}: {error}; export it again") from error
