"""llama.cpp on GGUF files, through the low-level functions of llama-cpp-python.

The library's ``Llama`` class is left aside: it keeps one sequence, copies logits per token and decides on its own
about contexts and templates. Trajectories are sequences of one context: the prompt is run once, its cells belong to
all of them, and a step is one call with a token of each that is still going.

Shapes: B batch, T tokens, V vocabulary, K trajectories, R rows of logits.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qad.closing import Closing
from qad.errors import UserError
from qad.gguf_check import check_gguf
from qad.runtimes import GREEDY, Ending, OnToken, Piece, Sampling, Step, Trajectory, Work, _cores, choose
from qad.runtimes._llama_api import available, library
from qad.runtimes._llama_context import BATCH, LlamaContext, Options
from qad.runtimes._llama_model import LlamaModel, LlamaText
from qad.runtimes._memory import free_bytes
from qad.runtimes._trajectories import Request, check_request, never, sample_rows

__all__ = ["FORMATS", "LlamaSession", "available", "open"]

FORMATS = ("gguf",)


class _SharedRows:
    """K sequences of a context that share the cells of a prompt. Satisfies ``qad.runtimes._trajectories.Rows``."""

    def __init__(self, context: LlamaContext, prompt: int, k: int, work: Work) -> None:
        self._context = context
        self._prompt = prompt
        self._made = dict.fromkeys(range(k), 0)
        self._ended: list[int] = []
        self._used = prompt
        self._work = work
        for row in range(1, k):
            context.share(row)

    def advance(self, rows: Sequence[int], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Append a token to each of some rows, and return the logits after it, [R, V], valid until the next call."""
        began = time.perf_counter()
        logits_RV = self._context.step(rows, tokens, [self._prompt + self._made[row] for row in rows])
        self._work.decode_seconds += time.perf_counter() - began
        self._work.calls += 1
        self._work.new_tokens += len(rows)
        self._used += len(rows)
        for row in rows:
            self._made[row] += 1
        return logits_RV

    def has_room(self, rows: int) -> bool:
        """Return whether that many rows can take one more token each."""
        if self._used + rows > self._context.cells:
            self._free()
        return self._used + rows <= self._context.cells

    def drop(self, row: int) -> None:
        """Leave a row's cells to the others, who take them as soon as there are no untouched ones.

        Not at once: llama.cpp would fill the holes first, the others' cells would no longer lie in the order of their
        tokens, and attention, which adds them up as they lie, would round otherwise: other rows would notice.
        """
        self._ended.append(row)

    def _free(self) -> None:
        for row in self._ended:
            # The prompt's cells stay with sequence 0, for a prompt that begins with the same.
            self._context.cut(row, -1 if row else self._prompt)
            self._used -= self._made.pop(row)
        self._ended.clear()

    def close(self) -> None:
        """Free every row."""
        self._context.tail = sum(self._made.values())
        self._ended = list(self._made)
        self._free()


class LlamaSession(Closing):
    """A GGUF model in llama.cpp. Satisfies ``qad.runtimes.Session``."""

    def __init__(self, path: Path, options: Options, gpu_layers: int) -> None:
        self._path = path
        self._uses = 0
        self._work = Work()
        self._model = LlamaModel(path, gpu_layers)
        self._context = LlamaContext(self._model, options)

    @property
    def vocabulary(self) -> int:
        """Number of logits per position."""
        return self._model.vocabulary

    @property
    def context(self) -> int:
        """Tokens that a prompt and an answer may have together; of a context of fixed size, if nothing runs beside."""
        trained = self._model.trained_context
        return min(trained, self._context.most_cells(trained))

    @property
    def work(self) -> Work:
        """What the latest call of ``sample`` cost; while one runs, what it has cost so far."""
        return self._work

    def metadata(self, key: str) -> str | None:
        """Return a text or number of the file's metadata as text, None if it is absent."""
        return self._model.metadata(key)

    def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens: special tokens in it are recognized, none is added around it."""
        return self._model.tokenize(text)

    def first_token(self) -> int | None:
        """Return the token that the model expects before a text, None if it expects none."""
        return self._model.first_token()

    def boundary_token(self) -> int | None:
        """Return the token that begins a text or, if there is none, ends one."""
        known = (self._model.metadata(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos"))
        return next((int(token) for token in known if token is not None), None)

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        return self._model.detokenize(tokens)

    def chat_prompt(self, text: str) -> list[int]:
        """Return the tokens of one user message under the file's chat template; plain tokens if it has none.

        Raises:
            UserError: The template cannot be rendered.
        """
        return self._model.chat_prompt(text)

    def state_bytes(self) -> int:
        """Return the bytes that llama.cpp would write to save its state: the cells in use, and a little beside them."""
        return self._context.state_bytes()

    def _prepare(self, prompt: int, new_tokens: int = 0) -> None:
        """Make an empty context for a prompt and what follows it.

        Raises:
            UserError: More than the model was trained for or the session's context holds, or no memory.
        """
        tokens = prompt + new_tokens
        limit = min(self._model.trained_context, self._context.most_cells(tokens))
        if tokens > limit:
            raise UserError(f"{tokens} tokens do not fit the model's context of {limit}: ask for fewer")
        self._context.clear()
        self._context.prepare(prompt, new_tokens, 1)
        self._uses += 1

    def _check(self, tokens: NDArray[np.int32]) -> None:
        assert tokens.size, "no tokens"
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocabulary:
            raise ValueError(f"tokens must lie in 0..{self.vocabulary - 1}")

    def forget(self) -> None:
        """Let go of the prompt in the cache: the next call computes all of its own, as in a session just opened."""
        self._uses += 1
        self._context.clear()

    def logits(self, tokens_BT: ArrayLike) -> NDArray[np.float32]:
        """Return the logits after each token of each sequence, shape [B, T, V]."""
        tokens = np.asarray(tokens_BT, dtype=np.int32)
        assert tokens.ndim == 2, tokens.shape
        self._check(tokens)
        batch, length = tokens.shape
        out = np.empty((batch, length, self.vocabulary), dtype=np.float32)
        for row in range(batch):
            self._prepare(length)
            for start in range(0, length, BATCH):
                end = min(start + BATCH, length)
                out[row, start:end] = self._context.run(tokens[row, start:end], start, every=True)
        return out

    def stream(self, prompt_T: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[Piece]:
        """Yield an answer piece by piece; the last piece holds the ending.

        Raises:
            UserError: Prompt and answer do not fit the model's context.
        """
        prompt = np.asarray(prompt_T, dtype=np.int32)
        self._check(prompt)
        generator = np.random.default_rng(sampling.seed)
        text = LlamaText(self._model)
        self._prepare(len(prompt), new_tokens)
        use = self._uses
        began = time.perf_counter()
        logits, _ = self._context.read(prompt)
        read = time.perf_counter()
        made = 0
        reason = "length"
        while made < new_tokens:
            token = choose(logits, sampling, generator)
            if self._model.ends(token):
                reason = "stop"
                break
            made += 1
            yield Piece(text.add(token), token)
            if self._uses != use:
                raise RuntimeError("the session was used for something else before this stream ended")
            if made < new_tokens:
                logits = self._context.run([token], len(prompt) + made - 1, every=False)[0]
        ending = Ending(reason, len(prompt), made, read - began, time.perf_counter() - read)
        yield Piece(text.end(), None, ending)

    def sample(
        self,
        prompt_T: Sequence[int],
        k: int,
        sampling: Sampling = GREEDY,
        *,
        new_tokens: int,
        on_token: OnToken | None = None,
        stop: Sequence[str] = (),
        ignore_end: bool = False,
    ) -> list[Trajectory]:
        """Return k continuations of one prompt; see ``qad.runtimes.Session.sample``.

        The prompt is run once, in pieces of ``BATCH`` tokens, and stays in the cache: what the next call's prompt
        begins with is not run again. When the context is full, those that have ended leave their cells to the others;
        when that is not enough, those that are still going end with ``context``.

        How far a trajectory is the same whatever K is and whatever was dropped beside it: its random stream and its
        choice depend on its own logits alone, and on a CPU llama.cpp gave these the same bits for every K and after
        every drop, as long as the context had room for all that was asked for (one that is made for the call has). So
        it did with caches of each type, and with two threads as with one.
        Two things change bits: a context of a fixed size in which ended trajectories had to make room; and a prompt of
        which a part was in the cache, because llama.cpp computes a few tokens and many in different kernels.
        Activations are rounded to 8 bits, so that such a bit may grow to a KL divergence near 1e-3, and a sampled
        answer may then go another way. A call that is repeated finds its whole prompt in the cache, and repeats every
        bit.

        Raises:
            UserError: No room for the prompt and a token of each trajectory, no memory, or k above the limit.
            RuntimeError: The callback used the session.
        """
        words = check_request(k, new_tokens, stop)
        began = time.perf_counter()
        prompt = np.asarray(prompt_T, dtype=np.int32)
        self._check(prompt)
        room = self._room(len(prompt), k)
        self._uses += 1
        use = self._uses
        self._work = work = Work()
        self._context.prepare(len(prompt), min(new_tokens, room), k, self._context.spare(prompt, k))
        work.cache_bytes = self._context.cache_bytes
        logits_V, work.reused_tokens = self._context.read(prompt)
        work.prompt_tokens = len(prompt) - work.reused_tokens
        work.prompt_seconds = time.perf_counter() - began

        def watched(step: Step) -> Iterable[int] | None:
            assert on_token is not None
            dropped = on_token(step)
            if self._uses != use:
                raise RuntimeError("the session was used for something else before its trajectories ended")
            return dropped

        request = Request(
            k=k,
            sampling=sampling,
            new_tokens=new_tokens,
            on_token=None if on_token is None else watched,
            stop=words,
            prompt_tokens=len(prompt),
            room=room,
            ends=never if ignore_end else self._model.ends,
            text=lambda: LlamaText(self._model),
            began=began,
        )
        rows = _SharedRows(self._context, len(prompt), k, work)
        try:
            return sample_rows(request, rows, logits_V)
        finally:
            # What a use in between left in the context is not ours to cut.
            if self._uses == use:
                rows.close()

    def _room(self, prompt: int, k: int) -> int:
        """Return how many tokens a trajectory can have after a prompt.

        Raises:
            UserError: None, or too many trajectories.
        """
        most = self._context.most_sequences()
        if k > most:
            raise UserError(
                f"{k} trajectories are above this session's limit of {most}: ask for {most} at a time "
                f"(qad think --wave {most})"
            )
        cells = self._context.most_cells(prompt + k)
        limit = self._model.trained_context
        if prompt + 1 > limit:
            raise UserError(f"a prompt of {prompt} tokens leaves no room in the model's context of {limit}: shorten it")
        if prompt + k > cells:
            fits = f"{cells - prompt} trajectories fit" if cells > prompt else f"a prompt of {cells - k} tokens fits"
            raise UserError(
                f"a prompt of {prompt} tokens and {k} trajectories do not fit a context of {cells}: "
                f"{fits}, or open the model with a context of {prompt + k} or more"
            )
        return limit - prompt

    def close(self) -> None:
        """Free the model and its context. May be called twice."""
        self._context.close()
        self._model.close()


def open(  # noqa: A001
    path: Path,
    device: str = "cpu",
    threads: int | None = None,
    *,
    context: int | None = None,
    sequences: int | None = None,
    kv_type: str = "f16",
    flash_attention: bool | None = None,
    gpu_layers: int | None = None,
) -> LlamaSession:
    """Open a GGUF file.

    Args:
        path: The file.
        device: ``cpu``, or ``gpu`` to put layers on it where llama.cpp was built for one.
        threads: CPU threads; the free physical cores if None.
        context: Tokens that the cache holds, of all trajectories together, rounded up to 256; if None, as many as each
            call needs.
        sequences: Most trajectories at a time; llama.cpp's limit if None.
        kv_type: Type of the cache: ``f16``, ``q8_0``, ``q4_0``.
        flash_attention: Whether to use it; llama.cpp's choice if None. A cache that is not f16 needs it.
        gpu_layers: How many layers the GPU holds, the output counting as one; all if None.

    Raises:
        UserError: llama.cpp is not installed; the file is missing, truncated or damaged, or llama.cpp refuses it; an
            option is impossible.
    """
    check_gguf(path)
    if device not in ("cpu", "gpu"):
        raise UserError(f"unknown device {device!r}: cpu or gpu")
    on_gpu = device == "gpu"
    if on_gpu and not library().llama_supports_gpu_offload():
        raise UserError("this llama.cpp was built without GPU support: reinstall llama-cpp-python with it, or use cpu")
    if gpu_layers is not None and (gpu_layers < 0 or not on_gpu):
        raise UserError(f"gpu_layers={gpu_layers} is impossible on {device}: 0 or more, with the device gpu")
    room = free_bytes() - path.stat().st_size
    options = Options(context, sequences, kv_type, flash_attention, threads or _cores.free_cores(), on_gpu, room)
    return LlamaSession(path, options, (-1 if gpu_layers is None else gpu_layers) if on_gpu else 0)
