"""Sample many different prompts at once from a GGUF file with llama.cpp.

One worker a core, each with a context of its own and a single thread: their batches are independent, so no barrier is
ever waited for. (Two threads on one context are as fast on an idle machine and thirty times slower on a busy one, where
a thread that waits spins away the time of the one it waits for.) A worker keeps ``batch_size`` sequences alive and puts
the next prompt in as soon as one ends, so that its batch stays full until the wanted tokens are there.

A small quantized file is first decoded to float32 in a temporary folder, which takes two seconds. With many sequences
at once llama.cpp is limited by arithmetic, and its float32 product is its fastest on a CPU (tokens per second and core
for SmolLM2 with 64 sequences: float32 229, Q8_0 187, float16 190, Q4_1 about 100); it is also exactly the teacher's.
"""

import ctypes
import math
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from qad.errors import UserError
from qad.gguf_check import read_header

_FLOAT32_FILE = 0  # llama.h: LLAMA_FTYPE_ALL_F32
_FLOAT32_LIMIT = 4 << 30  # bytes of a float32 copy that is still worth its disk and memory
_MAX_SEQUENCES = 64

# llama.cpp keeps the pointer, so the callback must outlive every call.
_silence = llama_cpp.llama_log_callback(lambda level, text, data: None)


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens."""

    temperature: float
    top_p: float
    top_k: int
    seed: int


@dataclass
class _Sequence:
    """A prompt in progress on one of a worker's slots."""

    number: int
    slot: int
    chain: Any
    position: int
    tokens: list[int] = field(default_factory=list)


class _Worker:
    """One context of one thread, with up to ``batch_size`` sequences."""

    def __init__(self, model: Any, batch_size: int, length: int, sampling: Sampling) -> None:
        options = llama_cpp.llama_context_default_params()
        options.n_seq_max = batch_size
        options.n_ctx = batch_size * length
        options.n_batch = options.n_ubatch = max(length, batch_size)
        options.n_threads = options.n_threads_batch = 1
        # On a CPU the fused attention takes each sequence's single query alone: 1.5 times slower at 100 tokens.
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(model, options)
        if not context:
            raise UserError("llama.cpp cannot make a context for sampling: use a smaller batch or fewer new tokens")
        self.context: Any = context
        self.memory: Any = llama_cpp.llama_get_memory(context)
        self.vocabulary: Any = llama_cpp.llama_model_get_vocab(model)
        self.batch = llama_cpp.llama_batch_init(max(length, batch_size), 0, 1)
        self.batch_size = batch_size
        self.sampling = sampling

    def close(self) -> None:
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)

    def _chain(self, number: int) -> Any:
        chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        # A seed of its own for each prompt: what one prompt draws does not depend on its neighbours in the batch.
        seed = int(np.random.SeedSequence([self.sampling.seed, number]).generate_state(1)[0])
        for sampler in (
            llama_cpp.llama_sampler_init_top_k(self.sampling.top_k),
            llama_cpp.llama_sampler_init_temp(self.sampling.temperature),
            llama_cpp.llama_sampler_init_top_p(self.sampling.top_p, 1),
            llama_cpp.llama_sampler_init_dist(seed),
        ):
            llama_cpp.llama_sampler_chain_add(chain, sampler)
        return chain

    def _decode(self, tokens: Sequence[int], positions: Sequence[int], slots: Sequence[int], *, every: bool) -> None:
        for i, (token, position, slot) in enumerate(zip(tokens, positions, slots, strict=True)):
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = slot
            self.batch.logits[i] = every or i == len(tokens) - 1
        self.batch.n_tokens = len(tokens)
        status = llama_cpp.llama_decode(self.context, self.batch)
        if status:
            raise UserError(f"llama.cpp failed while sampling (status {status}): use a smaller batch")

    def run(
        self,
        prompts: Sequence[tuple[int, Sequence[int]]],
        new_tokens: int,
        wanted: float,
        on_tokens: Callable[[int], None],
        stopped: threading.Event,
    ) -> dict[int, list[int]]:
        """Return prompt number -> new tokens, stopping once ``wanted`` tokens, prompts included, are reached."""
        done: dict[int, list[int]] = {}
        live: list[_Sequence] = []
        free = list(range(self.batch_size))
        waiting = iter(prompts)
        count = 0

        def take(sequence: _Sequence, index: int) -> bool:
            """Draw a sequence's next token; return whether it goes on."""
            token = llama_cpp.llama_sampler_sample(sequence.chain, self.context, index)
            ended = llama_cpp.llama_vocab_is_eog(self.vocabulary, token)
            if not ended:
                sequence.tokens.append(token)
            if not ended and len(sequence.tokens) < new_tokens:
                return True
            finish(sequence)
            return False

        def finish(sequence: _Sequence) -> None:
            done[sequence.number] = sequence.tokens
            llama_cpp.llama_sampler_free(sequence.chain)
            llama_cpp.llama_memory_seq_rm(self.memory, sequence.slot, -1, -1)
            free.append(sequence.slot)

        while not stopped.is_set():
            while free and count < wanted and (following := next(waiting, None)) is not None:
                number, prompt = following
                slot = free.pop()
                self._decode(prompt, range(len(prompt)), [slot] * len(prompt), every=False)
                sequence = _Sequence(number, slot, self._chain(number), len(prompt))
                count += len(prompt) + 1
                if take(sequence, -1):
                    live.append(sequence)
            # llama.cpp computes neighbouring slots in ascending order together, and any others one after another.
            live.sort(key=lambda sequence: sequence.slot)
            if not live or count >= wanted:
                break
            self._decode([s.tokens[-1] for s in live], [s.position for s in live], [s.slot for s in live], every=True)
            for sequence in live:
                sequence.position += 1
            count += len(live)
            on_tokens(len(live))
            live = [sequence for index, sequence in enumerate(live) if take(sequence, index)]
        for sequence in live:
            finish(sequence)
        return done


def _float32_copy(path: Path, folder: str) -> Path:
    """Return a float32 copy of a GGUF file, or the file itself where that is large or float32 already."""
    tensors = read_header(path).tensors.values()
    bytes_needed = 4 * sum(math.prod(tensor.shape) for tensor in tensors)
    if all(tensor.type.name == "F32" for tensor in tensors) or bytes_needed > _FLOAT32_LIMIT:
        return path
    if shutil.disk_usage(folder).free < 2 * bytes_needed:
        return path
    target = Path(folder) / "teacher-f32.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = _FLOAT32_FILE
    options.allow_requantize = True
    status = llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.pointer(options))
    return target if status == 0 and target.is_file() else path


def sample_gguf(
    path: Path,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    new_tokens: int,
    wanted_tokens: int | None,
    batch_size: int,
    workers: int,
    on_tokens: Callable[[int], None],
) -> tuple[dict[int, list[int]], str]:
    """Continue prompts with llama.cpp.

    Args:
        path: The GGUF file.
        prompts: Token ids, none of them empty.
        sampling: How to draw.
        new_tokens: At most so many for each prompt.
        wanted_tokens: Stop when so many tokens, prompts included, are reached; None runs every prompt to its end.
        batch_size: Sequences alive in each worker.
        workers: Workers, one thread each.
        on_tokens: Called with the number of tokens drawn since the last call, from any thread.

    Returns:
        Prompt number -> new tokens, for each prompt that was begun; and a description of what ran.

    Raises:
        UserError: llama.cpp cannot open the file, or runs out of memory.
    """
    llama_cpp.llama_log_set(_silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    batch_size = min(batch_size, _MAX_SEQUENCES)
    length = max(len(prompt) for prompt in prompts) + new_tokens
    stopped = threading.Event()
    with tempfile.TemporaryDirectory(prefix="qad-") as folder:
        file = _float32_copy(path, folder)
        model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        if not model:
            raise UserError(f"llama.cpp cannot load {path}: check it with `qad doctor {path}`")
        team: list[_Worker] = []
        try:
            team.extend(_Worker(model, batch_size, length, sampling) for _ in range(workers))
            share = float("inf") if wanted_tokens is None else wanted_tokens / workers
            with ThreadPoolExecutor(workers) as pool:
                numbered = list(enumerate(prompts))
                futures = [
                    pool.submit(worker.run, numbered[i::workers], new_tokens, share, on_tokens, stopped)
                    for i, worker in enumerate(team)
                ]
                try:
                    drawn = {number: tokens for future in futures for number, tokens in future.result().items()}
                except BaseException:
                    stopped.set()  # an interrupt, or one worker's failure: let the others end too
                    raise
        finally:
            for worker in team:
                worker.close()
            llama_cpp.llama_model_free(model)
    copy = " on the weights decoded to float32" if file != path else ""
    return drawn, f"llama.cpp{copy}, {workers} x {batch_size} sequences at once"
