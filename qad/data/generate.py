"""Text sampled from a teacher: batches of many different prompts through the live model.

transformers' own ``generate`` is not used, because three of its habits cost more than the model itself when a small
one is asked for many tokens on a CPU: it copies the whole key-value cache at every token, sorts the whole vocabulary for
top-p, and goes on computing sequences that have ended. Tokens per second on one busy core with 64 sequences of SmolLM2:
this 205, ``generate`` 130, and llama.cpp 80 to 150 (64 contexts, one thread, float32 or the file's own types).

Shapes: B sequences, T tokens, V vocabulary, K most probable tokens.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from qad.architectures import head_dim, key_value_heads
from qad.model import LoadedModel

# Tokens beyond the most probable 200 rarely enter a nucleus at all, and looking for it in so few is many times faster.
TOP_K = 200
# Key-value memory of a batch: more sequences at once are no faster once the matrix products are large.
_CACHE_BYTES = 2 << 30
_PIECE = 1024  # tokens of all prompts together that are read at once
# A batch is made smaller when this share of its sequences has ended.
_ENDED_SHARE = 0.15


@dataclass(frozen=True)
class Samples:
    """What a teacher said.

    Attributes:
        texts: One continuation for each prompt, without the prompt; None where the wanted tokens were reached
            before the prompt was begun.
        tokens: Tokens drawn.
        note: A sentence for the log: how many and how fast.
    """

    texts: list[str | None]
    tokens: int
    note: str


class _Window(DynamicLayer):
    """A layer's keys and values in buffers of their full length, written in place. Its sequences can be thinned out."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.filled = 0
        self.buffers: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, T, width] and return all there are, as views."""
        if not self.buffers:
            sequences, heads, _, width = key_states.shape
            self.buffers = [key_states.new_empty(sequences, heads, self.room, width) for _ in range(2)]
            self.is_initialized = True
        end = self.filled + key_states.shape[-2]
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.filled : end] = new
        self.filled = end
        keys, values = (buffer[:, :, :end] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Return how many tokens are held."""
        return self.filled

    def keep(self, rows: list[int]) -> None:
        """Keep these sequences, in ascending order. Done in place: a row moves only towards the front."""
        for buffer in self.buffers:
            for target, row in enumerate(rows):
                if target != row:
                    buffer[target, :, : self.filled] = buffer[row, :, : self.filled]
        self.buffers = [buffer[: len(rows)] for buffer in self.buffers]


def draw(logits_BV: Tensor, chances_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return a token for each row: temperature, then top-p among the ``TOP_K`` most probable.

    Args:
        logits_BV: Logits.
        chances_B: A number in [0, 1) for each row, which decides the draw.
        temperature: Divides the logits.
        top_p: Draw from the fewest tokens whose probabilities reach this sum; one token at least.
    """
    best_BK, index_BK = logits_BV.float().topk(min(TOP_K, logits_BV.shape[-1]))
    weights_BK = (best_BK / temperature).softmax(-1)
    # A token stays if the likelier ones do not yet reach top_p: the first always does.
    weights_BK = weights_BK.masked_fill(weights_BK.cumsum(-1) - weights_BK >= top_p, 0.0)
    sums_BK = weights_BK.cumsum(-1)
    targets_B1 = chances_B.to(sums_BK).unsqueeze(-1) * sums_BK[:, -1:]
    choice_B1 = torch.searchsorted(sums_BK, targets_B1, right=True)
    last_B1 = (weights_BK > 0).sum(-1, keepdim=True) - 1
    return index_BK.gather(-1, torch.minimum(choice_B1, last_B1)).squeeze(-1)


def _continue_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    chances_BT: Tensor,
    *,
    stop: Tensor,
    temperature: float,
    top_p: float,
    left: float,
    on_tokens: Callable[[int], None],
) -> list[list[int]]:
    """Continue one batch until every sequence has ended, has as many tokens as there are chances, or none is left.

    Args:
        model: The teacher.
        prompts: Token ids, padded on the left here.
        chances_BT: See ``draw``.
        stop: Ids that end a sequence.
        temperature, top_p: See ``draw``.
        left: Stop after so many tokens of all sequences together.
        on_tokens: Called with the tokens drawn at each step.
    """
    device = model.device
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask_BT = torch.zeros(len(prompts), longest + chances_BT.shape[1], dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = True
    ids_BT, mask_BT = ids_BT.to(device), mask_BT.to(device)
    positions_BT = (mask_BT[:, :longest].cumsum(-1) - 1).clamp(min=0)
    layers = [_Window(mask_BT.shape[1]) for _ in range(model.config.num_hidden_layers)]
    cache = Cache(layers=list(layers))
    answers: list[list[int]] = [[] for _ in prompts]
    live = list(range(len(prompts)))  # the prompt of each row that is still computed
    ended: set[int] = set()
    # All of a long prompt at once would fill more memory than caches hold with what lies between two operations.
    piece = max(1, _PIECE // len(prompts))
    for start in range(0, longest - piece, piece):
        model(
            input_ids=ids_BT[:, :piece],
            attention_mask=mask_BT[:, : start + piece],
            position_ids=positions_BT[:, :piece],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        ids_BT, positions_BT = ids_BT[:, piece:], positions_BT[:, piece:]
    for step in range(chances_BT.shape[1]):
        logits_BV = model(
            input_ids=ids_BT,
            attention_mask=mask_BT[:, : longest + step],
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        drawn_B = draw(logits_BV, chances_BT[live, step], temperature, top_p)
        stops = torch.isin(drawn_B, stop).tolist()
        count = 0
        for row, (token, stops_here) in enumerate(zip(drawn_B.tolist(), stops, strict=True)):
            if live[row] in ended:
                continue
            if stops_here:
                ended.add(live[row])
            else:
                answers[live[row]].append(token)
                count += 1
        on_tokens(count)
        left -= count
        rows = [row for row, number in enumerate(live) if number not in ended]
        if not rows or left <= 0:
            break
        ids_BT, positions_BT = drawn_B.unsqueeze(-1), positions_BT[:, -1:] + 1
        if len(rows) <= (1 - _ENDED_SHARE) * len(live):
            for layer in layers:
                layer.keep(rows)
            ids_BT, positions_BT, mask_BT = ids_BT[rows], positions_BT[rows], mask_BT[rows]
            live = [live[row] for row in rows]
    return answers


def _batch_size(model: PreTrainedModel, length: int, most: int, wanted: int | None) -> int:
    """Return how many sequences of a length to run at once."""
    config = model.config.to_dict()
    token_bytes = 2 * config["num_hidden_layers"] * key_value_heads(config) * head_dim(config) * model.dtype.itemsize
    fitting = _CACHE_BYTES // (token_bytes * length)
    # A batch that takes the wanted tokens with its first prompts would cut every answer short.
    useful = most if wanted is None else wanted // (2 * length)
    return max(1, min(most, fitting, max(4, useful)))


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
    on_progress: Callable[[int], None] | None = None,
) -> Samples:
    """Let a teacher continue prompts, the same way for the same seed on one machine.

    Args:
        teacher: The model.
        prompts: Ready texts: with the chat template applied where that is wanted. An empty one starts a new document.
        new_tokens: At most so many for each prompt.
        temperature: Of the softmax.
        top_p: Draw from the fewest tokens whose probabilities reach this sum, among the 200 most probable.
        seed: Of the random draws; the global random state is not touched.
        wanted_tokens: Stop when so many tokens, prompts included, are reached; what is begun is cut there. None
            continues every prompt to its end.
        batch_size: At most so many sequences at once; fewer where their keys and values would take over 2 GiB.
        on_progress: Called with the tokens so far, counted as ``wanted_tokens`` are.
    """
    model, tokenizer = teacher.model, teacher.tokenizer
    first = token_id(tokenizer, tokenizer.bos_token or tokenizer.eos_token)
    ids = [tokenizer.encode(prompt, add_special_tokens=False) or [first] for prompt in prompts]
    batch_size = _batch_size(model, max(map(len, ids), default=0) + new_tokens, batch_size, wanted_tokens)
    stop = torch.tensor(sorted(_stop_tokens(teacher)), device=model.device)
    total = float("inf") if wanted_tokens is None else wanted_tokens
    answers: list[list[int]] = []
    count = 0

    def report(tokens: int) -> None:
        nonlocal count
        count += tokens
        if on_progress is not None:
            on_progress(count)

    begin = time.monotonic()
    with torch.inference_mode():
        while len(answers) < len(ids) and count < total:
            members = ids[len(answers) : len(answers) + batch_size]
            report(sum(map(len, members)))
            # Drawn for the whole batch beforehand: what a prompt gets does not depend on who ends when.
            generator = torch.Generator().manual_seed(seed * 1_000_003 + len(answers))
            answers += _continue_batch(
                model,
                members,
                torch.rand(len(members), new_tokens, generator=generator),
                stop=stop,
                temperature=temperature,
                top_p=top_p,
                left=total - count,
                on_tokens=report,
            )
    seconds = time.monotonic() - begin
    texts: list[str | None] = [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]
    texts += [None] * (len(prompts) - len(texts))
    tokens = sum(map(len, answers))
    speed = tokens / max(seconds, 1e-9)
    note = (
        f"sampled {tokens} tokens from the teacher in {seconds:.0f} s ({speed:.0f} tokens/s on {model.device}, "
        f"{batch_size} sequences at once)"
    )
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
