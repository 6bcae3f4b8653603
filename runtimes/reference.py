"""The judge: torch in float32 on an artifact, or on a plain Hugging Face folder. Slow, and always there.

The weights are those that the artifact's codes and scales decode to, in the model class of transformers, so that what
another engine computes can be told apart from what was stored.

Shapes: B batch, T tokens, V vocabulary.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights
from numpy.typing import ArrayLike, NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qad.artifact import Artifact, open_artifact
from qad.errors import UserError
from qad.model import load_model, load_tokenizer
from qad.runtimes import ARTIFACT, FOLDER, Work, _cores, format_of
from qad.runtimes._session import TokenizerSession

FORMATS = (ARTIFACT, FOLDER)


def available() -> str | None:
    """Return None: torch is a requirement of the package."""
    return None


def build_model(artifact: Artifact) -> PreTrainedModel:
    """Return the student of an artifact: float32, on the CPU, in evaluation mode, head tied if the artifact's is.

    Raises:
        UserError: The artifact lacks a weight that its configuration asks for, or holds one too many.
    """
    config = AutoConfig.from_pretrained(artifact.folder)
    config.tie_word_embeddings = artifact.tied_head
    # Empty parameters, because random ones would be drawn only to be thrown away; buffers are real, for the rotary
    # frequencies are computed when the model is made.
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    weights = {name: artifact.weight(name) for name in (*artifact.grids, *artifact.kept)}
    try:
        outcome = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"the artifact in {artifact.folder} does not fit its config.json: {error}") from error
    model.tie_weights()
    empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if empty or outcome.unexpected_keys:
        raise UserError(
            f"the artifact in {artifact.folder} does not fit its config.json: "
            f"missing {empty[:3]}, without a place {outcome.unexpected_keys[:3]}"
        )
    return model.eval()


class _BatchRows:
    """K sequences as the rows of one batch, the prompt's cache copied to each. Satisfies ``Rows``.

    Torch's attention wants a batch in one tensor, so that the prompt's keys and values are there K times.
    """

    def __init__(self, model: Any, cache: Any, k: int, work: Work) -> None:
        self._model = model
        self._cache = cache
        self._live = list(range(k))
        # What the cache holds: rows are cut out of it once, when the next token is run.
        self._held = list(range(k))
        self._work = work
        if k > 1:
            cache.batch_repeat_interleave(k)
        work.cache_bytes = cache_bytes(cache)

    @torch.inference_mode()
    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append a token to each of some rows, and return the logits after it, [R, V]."""
        assert list(rows) == self._live, (rows, self._live)
        began = time.perf_counter()
        self._cut()
        ids = torch.tensor(tokens, device=self._model.device).reshape(-1, 1)
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        logits_RV = out.logits[:, -1].float().cpu().numpy()
        self._work.decode_seconds += time.perf_counter() - began
        self._work.new_tokens += len(rows)
        self._work.calls += 1
        self._work.cache_bytes = cache_bytes(self._cache)
        return logits_RV

    def _cut(self) -> None:
        if self._held != self._live:
            kept = torch.tensor([self._held.index(row) for row in self._live], device=self._model.device)
            self._cache.batch_select_indices(kept)
            self._held = list(self._live)

    def has_room(self, rows: int) -> bool:
        """Return True: the cache grows as it goes."""
        return True

    def drop(self, row: int) -> None:
        """Free a row's cache, when the next token is run."""
        self._live.remove(row)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of the keys and values in a cache of transformers."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


class TorchSession(TokenizerSession):
    """A transformers model. Satisfies ``qad.runtimes.Session``."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        eos: Any = getattr(model.generation_config, "eos_token_id", None) or model.config.eos_token_id
        super().__init__(tokenizer, eos if isinstance(eos, list) else [eos], model.config.max_position_embeddings)
        self._model: Any = model
        if model.device.type == "cpu":
            config: Any = model.config
            head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            values = 2 * config.num_hidden_layers * config.num_key_value_heads * head
            self._token_bytes = values * model.dtype.itemsize

    @property
    def vocabulary(self) -> int:
        """Number of logits per position."""
        return int(self._model.config.vocab_size)

    @torch.inference_mode()
    def logits(self, tokens_BT: ArrayLike) -> NDArray[np.float32]:
        """Return the logits after each token of each sequence, shape [B, T, V]."""
        tokens = torch.as_tensor(np.asarray(tokens_BT, dtype=np.int64), device=self._model.device)
        return self._model(input_ids=tokens, use_cache=False).logits.float().cpu().numpy()

    def _cache(self, tokens: int) -> None:
        """Return None: transformers makes its cache as it goes."""

    @torch.inference_mode()
    def _next(self, tokens: Sequence[int], cache: Any) -> tuple[NDArray[np.float32], Any]:
        """Return the logits after the last token, shape [V], and the cache that includes them all."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().cpu().numpy(), out.past_key_values

    def _rows(self, prompt_T: Sequence[int], k: int, tokens: int, work: Work) -> tuple[_BatchRows, NDArray[np.float32]]:
        """Return k rows of one batch at the end of a prompt, which is run once, and the logits [V] there."""
        began = time.perf_counter()
        logits_V, cache = self._next(prompt_T, None)
        rows = _BatchRows(self._model, cache, k, work)
        work.prompt_tokens = len(prompt_T)
        work.prompt_seconds = time.perf_counter() - began
        return rows, logits_V

    def close(self) -> None:
        """Free the model. May be called twice."""
        self._model = None


def check_device(device: str) -> None:
    """Check that torch runs on a device here.

    Raises:
        UserError: It is neither ``cpu`` nor ``gpu``, or there is no GPU.
    """
    if device not in ("cpu", "gpu"):
        raise UserError(f"unknown device {device!r}: cpu or gpu")
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU: use cpu")


def open(path: Path, device: str = "cpu", threads: int | None = None) -> TorchSession:  # noqa: A001
    """Open a run, its artifact folder, or a Hugging Face folder.

    Args:
        path: The folder.
        device: ``cpu`` or ``gpu``.
        threads: Threads that torch uses from now on in this process; the free physical cores if None.

    Raises:
        UserError: Nothing usable there, or no GPU.
    """
    check_device(device)
    torch.set_num_threads(threads or _cores.free_cores())
    if format_of(path) == ARTIFACT:
        artifact = open_artifact(path)
        model, tokenizer = build_model(artifact), load_tokenizer(str(artifact.folder))
    else:
        loaded = load_model(str(path))
        model, tokenizer = loaded.model, loaded.tokenizer
    return TorchSession(model.to("cuda" if device == "gpu" else "cpu"), tokenizer)  # type: ignore[arg-type]
