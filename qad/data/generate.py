"""Text sampled from a teacher: with llama.cpp where the teacher is a GGUF file, with transformers otherwise."""

import importlib.util
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qad.model import LoadedModel, is_gguf

# Tokens beyond the most probable 200 rarely enter a nucleus at all, and looking for it in so few is many times faster.
TOP_K = 200


@dataclass(frozen=True)
class Samples:
    """What a teacher said.

    Attributes:
        texts: One continuation for each prompt, without the prompt; None where the wanted tokens were reached
            before the prompt was begun.
        tokens: Tokens drawn.
        note: A sentence for the log: which engine ran and how fast.
    """

    texts: list[str | None]
    tokens: int
    note: str


class _Nucleus(LogitsProcessor):
    """Temperature and top-p among the most probable tokens; transformers' own sorts the vocabulary at every step."""

    def __init__(self, temperature: float, top_p: float) -> None:
        self.temperature, self.top_p = temperature, top_p

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> Any:
        """Return logits [B, V] with all but the nucleus at minus infinity."""
        best_BK, index_BK = scores.topk(min(TOP_K, scores.shape[-1]))
        chances_BK = (best_BK / self.temperature).softmax(-1)
        # A token stays if the likelier ones do not yet reach top_p: the first always does.
        outside_BK = chances_BK.cumsum(-1) - chances_BK >= self.top_p
        best_BK = (best_BK / self.temperature).masked_fill(outside_BK, -torch.inf)
        kept = torch.full_like(scores, -torch.inf).scatter_(-1, index_BK, best_BK)
        return kept


class _Counter:
    """Tokens drawn so far, counted from any thread and reported to one callback."""

    def __init__(self, on_progress: Callable[[int], None] | None) -> None:
        self.tokens = 0
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def add(self, tokens: int) -> None:
        with self._lock:
            self.tokens += tokens
            if self._on_progress is not None:
                self._on_progress(self.tokens)


def _sample_torch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop: set[int],
    pad: int,
    temperature: float,
    top_p: float,
    seed: int,
    new_tokens: int,
    wanted_tokens: int | None,
    batch_size: int,
    on_tokens: Callable[[int], None],
) -> dict[int, list[int]]:
    """Continue prompts with ``generate``, batch after batch, the longest prompts together."""
    options = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=new_tokens,
        eos_token_id=sorted(stop), pad_token_id=pad, use_cache=True,
    )  # fmt: skip
    done: dict[int, list[int]] = {}
    count = 0
    device = model.device
    # The caller's random state is left as it was; generate() draws from the global one.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            if wanted_tokens is not None and count >= wanted_tokens:
                break
            members = prompts[start : start + batch_size]
            longest = max(len(prompt) for prompt in members)
            ids_BT = torch.full((len(members), longest), pad)
            mask_BT = torch.zeros_like(ids_BT)
            for row, prompt in enumerate(members):
                ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask_BT[row, longest - len(prompt) :] = 1
            answers_BT = model.generate(  # type: ignore[operator]
                ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                generation_config=options,
                logits_processor=LogitsProcessorList([_Nucleus(temperature, top_p)]),
            )[:, longest:].tolist()
            for row, answer in enumerate(answers_BT):
                end = next((i for i, token in enumerate(answer) if token in stop), len(answer))
                done[start + row] = answer[:end]
                count += len(members[row]) + end
                on_tokens(end)
    return done


def sample_from_teacher(
    teacher: LoadedModel,
    prompts: Sequence[str],
    *,
    new_tokens: int = 256,
    temperature: float = 0.9,
    top_p: float = 0.95,
    seed: int = 0,
    wanted_tokens: int | None = None,
    batch_size: int = 64,
    engine: str | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Samples:
    """Let a teacher continue prompts, the same way for the same seed on one machine.

    Args:
        teacher: The model. Its ``source`` decides the engine: llama.cpp for a GGUF file, else transformers.
        prompts: Ready texts: with the chat template applied where that is wanted. An empty one starts a new document.
        new_tokens: At most so many for each prompt.
        temperature: Of the softmax.
        top_p: Draw from the smallest set of tokens with this probability, among the 200 most probable.
        seed: Of the random draws.
        wanted_tokens: Stop when so many tokens, prompts included, are reached; what is begun is cut there. None
            continues every prompt to its end.
        batch_size: Sequences at once (for llama.cpp, in each worker).
        engine: ``llama.cpp`` or ``transformers``; None chooses.
        on_progress: Called with the number of tokens drawn so far, from any thread.

    Raises:
        UserError: llama.cpp cannot open the file, or runs out of memory.
    """
    tokenizer = teacher.tokenizer
    first = token_id(tokenizer, tokenizer.bos_token or tokenizer.eos_token)
    ids = [tokenizer.encode(prompt, add_special_tokens=False) or [first] for prompt in prompts]
    if engine is None:
        usable = is_gguf(teacher.source) and importlib.util.find_spec("llama_cpp") is not None
        engine = "llama.cpp" if usable else "transformers"
    # llama.cpp is run with a worker for each thread; transformers shares its threads out itself.
    workers = torch.get_num_threads() if engine == "llama.cpp" else 1
    if wanted_tokens is not None:
        # A batch that takes the wanted tokens with its first prompts would cut every answer short.
        length = new_tokens + sum(map(len, ids)) // len(ids)
        batch_size = max(4, min(batch_size, wanted_tokens // (2 * workers * length)))
    counter = _Counter(on_progress)
    begin = time.monotonic()
    if engine == "llama.cpp":
        from qad.data.llama_sampling import Sampling, sample_gguf

        drawn, how = sample_gguf(
            Path(teacher.source),
            ids,
            Sampling(temperature, top_p, TOP_K, seed),
            new_tokens=new_tokens,
            wanted_tokens=wanted_tokens,
            batch_size=batch_size,
            workers=workers,
            on_tokens=counter.add,
        )
    else:
        how = f"transformers on {teacher.model.device}, {batch_size} sequences at once"
        drawn = _sample_torch(
            teacher.model,
            ids,
            stop=_stop_tokens(teacher),
            pad=token_id(tokenizer, tokenizer.pad_token),
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            new_tokens=new_tokens,
            wanted_tokens=wanted_tokens,
            batch_size=batch_size,
            on_tokens=counter.add,
        )
    seconds = time.monotonic() - begin
    texts = [
        str(tokenizer.decode(drawn[number], skip_special_tokens=True)) if number in drawn else None
        for number in range(len(prompts))
    ]
    tokens = sum(len(answer) for answer in drawn.values())
    note = f"sampled {tokens} tokens from the teacher in {seconds:.0f} s ({tokens / max(seconds, 1e-9):.0f} tokens/s; {how})"
    return Samples(texts, tokens, note)


def token_id(tokenizer: PreTrainedTokenizerBase, token: Any) -> int:
    """Return the id of a special token."""
    found = tokenizer.convert_tokens_to_ids(str(token))
    assert isinstance(found, int), token
    return found


def _stop_tokens(teacher: LoadedModel) -> set[int]:
    """Return every token that ends a text: the tokenizer's, and those the model's own settings add."""
    found = {token_id(teacher.tokenizer, teacher.tokenizer.eos_token)}
    configured: Any = getattr(teacher.model.generation_config, "eos_token_id", None)
    if configured is not None:
        found.update(configured if isinstance(configured, list) else [configured])
    return found
