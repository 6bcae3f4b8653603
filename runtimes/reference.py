"""The judge: torch in float32 on an artifact, or on a plain Hugging Face folder. Slow, and always there.

The weights are those that the artifact's codes and scales decode to, in the model class of transformers, so that what
another engine computes can be told apart from what was stored.

Shapes: B batch, T tokens, V vocabulary.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from accelerate import init_empty_weights
from jinja2 import TemplateError
from numpy.typing import ArrayLike, NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from qad.artifact import Artifact, open_artifact
from qad.errors import UserError
from qad.model import load_model, load_tokenizer
from qad.runtimes import ARTIFACT, FOLDER, GREEDY, Ending, Piece, Sampling, _cores, choose, format_of

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


class TorchSession:
    """A transformers model. Satisfies ``qad.runtimes.Session``."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model: Any = model
        self._tokenizer: Any = tokenizer
        eos: Any = getattr(model.generation_config, "eos_token_id", None) or model.config.eos_token_id
        known: list[Any] = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
        self._ends = {int(token) for token in known if token is not None}

    @property
    def vocabulary(self) -> int:
        """Number of logits per position."""
        return int(self._model.config.vocab_size)

    def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens: special tokens in it are recognized, none is added around it."""
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)

    def chat_prompt(self, text: str) -> list[int]:
        """Return the tokens of one user message under the chat template; plain tokens if there is none.

        Raises:
            UserError: The template cannot be rendered.
        """
        if not self._tokenizer.chat_template:
            return list(self._tokenizer(text)["input_ids"])
        messages = [{"role": "user", "content": text}]
        try:
            rendered = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path} cannot be rendered: {error}"
            ) from error
        return self.tokenize(rendered)

    @torch.inference_mode()
    def logits(self, tokens_BT: ArrayLike) -> NDArray[np.float32]:
        """Return the logits after each token of each sequence, shape [B, T, V]."""
        tokens = torch.as_tensor(np.asarray(tokens_BT, dtype=np.int64), device=self._model.device)
        return self._model(input_ids=tokens, use_cache=False).logits.float().cpu().numpy()

    @torch.inference_mode()
    def _next(self, tokens: Sequence[int], cache: Any) -> tuple[NDArray[np.float32], Any]:
        """Return the logits after the last token, shape [V], and the cache that includes them all."""
        ids = torch.tensor([list(tokens)], device=self._model.device)
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float().cpu().numpy(), out.past_key_values

    def stream(self, prompt_T: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[Piece]:
        """Yield an answer piece by piece; the last piece holds the ending.

        Raises:
            UserError: Prompt and answer do not fit the model's context.
        """
        limit = self._model.config.max_position_embeddings
        if len(prompt_T) + new_tokens > limit:
            raise UserError(f"{len(prompt_T) + new_tokens} tokens do not fit the model's context of {limit}")
        generator = np.random.default_rng(sampling.seed)
        began = time.perf_counter()
        logits, cache = self._next(prompt_T, None)
        read = time.perf_counter()
        made: list[int] = []
        shown = ""
        reason = "length"
        while len(made) < new_tokens:
            token = choose(logits, sampling, generator)
            if token in self._ends:
                reason = "stop"
                break
            made.append(token)
            text = self._tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            # A replacement character at the end may be the first bytes of a longer character: it waits.
            whole = text.rstrip("\ufffd")
            yield Piece(whole[len(shown) :], token)
            shown = whole
            if len(made) < new_tokens:
                logits, cache = self._next([token], cache)
        rest = self._tokenizer.decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)[len(shown) :]
        yield Piece(rest, None, Ending(reason, len(prompt_T), len(made), read - began, time.perf_counter() - read))

    def close(self) -> None:
        """Free the model. May be called twice."""
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open(path: Path, device: str = "cpu", threads: int | None = None) -> TorchSession:  # noqa: A001
    """Open a run, its artifact folder, or a Hugging Face folder.

    Args:
        path: The folder.
        device: ``cpu`` or ``gpu``.
        threads: Threads that torch uses from now on in this process; the free physical cores if None.

    Raises:
        UserError: Nothing usable there, or no GPU.
    """
    if device not in ("cpu", "gpu"):
        raise UserError(f"unknown device {device!r}: cpu or gpu")
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU: use cpu")
    torch.set_num_threads(threads or _cores.free_cores())
    if format_of(path) == ARTIFACT:
        artifact = open_artifact(path)
        model, tokenizer = build_model(artifact), load_tokenizer(str(artifact.folder))
    else:
        loaded = load_model(str(path))
        model, tokenizer = loaded.model, loaded.tokenizer
    return TorchSession(model.to("cuda" if device == "gpu" else "cpu"), tokenizer)  # type: ignore[arg-type]
