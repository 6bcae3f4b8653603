"""llama.cpp on GGUF files, through the low-level functions of llama-cpp-python.

The library's ``Llama`` class is left aside: it keeps one sequence, copies logits per token and decides on its own
about contexts and templates. A context here is made when a sequence needs it and as large as it needs, because its
key-value memory is claimed at once.

Shapes: B batch, T tokens, V vocabulary, R rows of logits.
"""

import codecs
import collections
import ctypes
import functools
import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qad.errors import UserError
from qad.gguf_check import check_gguf
from qad.runtimes import GREEDY, Ending, Piece, Sampling, _cores, choose

FORMATS = ("gguf",)

# Tokens of one decode call: enough for full matrix products, and their logits stay near 300 MB for the largest
# vocabularies.
_BATCH = 512
_CONTEXT_STEP = 256
_INSTALL = "pip install llama-cpp-python (it compiles C++: a compiler, cmake and make are needed)"


def available() -> str | None:
    """Return None if llama.cpp can run here, else the reason and the remedy."""
    if importlib.util.find_spec("llama_cpp") is None:
        return f"llama-cpp-python is not installed: {_INSTALL}"
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"llama-cpp-python cannot be loaded ({error}): reinstall it with {_INSTALL}"
    return None


@functools.cache
def _library() -> Any:
    """Return the bindings, initialized once, with their log kept silent.

    Typed as Any: the bindings take ctypes values that their annotations do not describe.
    """
    reason = available()
    if reason is not None:
        raise UserError(reason)
    import llama_cpp

    llama_cpp.llama_log_set(_log_callback(), ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


@functools.cache
def _log_lines() -> collections.deque[str]:
    """Return the latest lines that llama.cpp logged, kept to explain a failure."""
    return collections.deque(maxlen=200)


@functools.cache
def _log_callback() -> Any:
    """Return the function that llama.cpp logs to. Cached, because C keeps a bare pointer to it."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def keep(_level: int, text: bytes, _data: Any) -> None:
        _log_lines().append(text.decode("utf-8", errors="replace"))

    return keep


def quiet() -> None:
    """Keep llama.cpp's log from the terminal; ``last_failure`` tells what is in it.

    Raises:
        UserError: llama.cpp is not available.
    """
    _library()
    _log_lines().clear()


def last_failure() -> str:
    """Return the lines of llama.cpp's log that tell why something failed."""
    lines = "".join(_log_lines()).splitlines()
    telling = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return "; ".join(dict.fromkeys(line.strip() for line in (telling or lines)[-3:])) or "it gave no reason"


class LlamaSession:
    """A GGUF model in llama.cpp. Satisfies ``qad.runtimes.Session``."""

    def __init__(self, path: Path, *, on_gpu: bool, threads: int) -> None:
        self._library = _library()
        self._threads = threads
        self._path = path
        self._context: Any = None
        self._context_tokens = 0
        self._uses = 0
        self._model: Any = None
        quiet()
        settings = self._library.llama_model_default_params()
        settings.n_gpu_layers = -1 if on_gpu else 0
        self._model = self._library.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise UserError(f"llama.cpp cannot load {path}: {last_failure()}")
        self._vocabulary = self._library.llama_model_get_vocab(self._model)
        self._trained_context = int(self._library.llama_model_n_ctx_train(self._model))

    @property
    def vocabulary(self) -> int:
        """Number of logits per position."""
        return int(self._library.llama_vocab_n_tokens(self._vocabulary))

    def metadata(self, key: str) -> str | None:
        """Return a text or number of the file's metadata as text, None if it is absent."""
        size = 1024
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_model_meta_val_str(self._model, key.encode(), buffer, size)
            if length < 0:
                return None
            if length < size:
                return buffer.value.decode("utf-8", errors="replace")
            size = length + 1

    def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens: special tokens in it are recognized, none is added around it."""
        return self._tokenize(text, add_special=False)

    def _tokenize(self, text: str, *, add_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        buffer = (self._library.llama_token * room)()
        count = self._library.llama_tokenize(self._vocabulary, data, len(data), buffer, room, add_special, True)
        assert count >= 0, count
        return list(buffer[:count])

    def first_token(self) -> int | None:
        """Return the token that the model expects before a text, None if it expects none."""
        if not self._library.llama_vocab_get_add_bos(self._vocabulary):
            return None
        return int(self._library.llama_vocab_bos(self._vocabulary))

    @functools.cached_property
    def _prefixes(self) -> bool:
        """Whether the tokenizer puts a space before a text, which is not shown then."""
        kind, prefix = self.metadata("tokenizer.ggml.model"), self.metadata("tokenizer.ggml.add_space_prefix")
        return kind == "llama" and prefix != "false"

    def _piece(self, token: int, *, special: bool, first: bool = False) -> bytes:
        """Return a token's bytes, which may be a part of a character; ``first``: it begins a text."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_token_to_piece(
                self._vocabulary, token, buffer, size, int(first and self._prefixes), special
            )
            if length >= 0:
                return buffer.raw[:length]
            size = -length

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        pieces = (self._piece(token, special=True, first=index == 0) for index, token in enumerate(tokens))
        return b"".join(pieces).decode("utf-8", errors="replace")

    def chat_prompt(self, text: str) -> list[int]:
        """Return the tokens of one user message under the file's chat template; plain tokens if it has none.

        Raises:
            UserError: The template cannot be rendered.
        """
        template = self.metadata("tokenizer.chat_template")
        if template is None:
            return self._tokenize(text, add_special=True)
        from jinja2 import TemplateError
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        bos, eos = (
            self._piece(token, special=True).decode("utf-8", errors="replace") if token >= 0 else ""
            for token in (
                self._library.llama_vocab_bos(self._vocabulary),
                self._library.llama_vocab_eos(self._vocabulary),
            )
        )
        try:
            formatter = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos)
            rendered = formatter(messages=[{"role": "user", "content": text}]).prompt
        except (TemplateError, ValueError, TypeError) as error:
            raise UserError(f"the chat template in {self._path} cannot be rendered: {error}") from error
        # Some templates begin with the first token themselves; a second one would change every answer.
        return self._tokenize(rendered, add_special=not (bos and rendered.startswith(bos)))

    def _prepare(self, tokens: int) -> None:
        """Make an empty context for that many tokens.

        Raises:
            UserError: More than the model was trained for, or no memory.
        """
        if tokens > self._trained_context:
            raise UserError(f"{tokens} tokens do not fit the model's context of {self._trained_context}: ask for fewer")
        if tokens > self._context_tokens:
            self._free_context()
            settings = self._library.llama_context_default_params()
            size = -(-tokens // _CONTEXT_STEP) * _CONTEXT_STEP
            settings.n_ctx = size
            settings.n_batch = settings.n_ubatch = min(_BATCH, size)
            settings.n_threads = settings.n_threads_batch = self._threads
            settings.no_perf = True
            quiet()
            self._context = self._library.llama_init_from_model(self._model, settings)
            if not self._context:
                raise UserError(f"llama.cpp cannot make a context of {size} tokens for {self._path}: {last_failure()}")
            self._context_tokens = size
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._uses += 1

    def _decode(self, tokens_T: NDArray[np.int32], start: int, *, every: bool) -> NDArray[np.float32]:
        """Run tokens after those already in the context; return logits [R, V] of each one or of the last."""
        count = len(tokens_T)
        batch = self._library.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            for index in range(count):
                batch.token[index] = int(tokens_T[index])
                batch.pos[index] = start + index
                batch.n_seq_id[index] = 1
                batch.seq_id[index][0] = 0
                batch.logits[index] = every or index == count - 1
            status = self._library.llama_decode(self._context, batch)
        finally:
            self._library.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} on {self._path}: {last_failure()}")
        rows = count if every else 1
        pointer = self._library.llama_get_logits(self._context)
        # A copy: the buffer belongs to the context and is overwritten by the next call.
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocabulary)).copy()

    def _check(self, tokens: NDArray[np.int32]) -> None:
        assert tokens.size, "no tokens"
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocabulary:
            raise ValueError(f"tokens must lie in 0..{self.vocabulary - 1}")

    def logits(self, tokens_BT: ArrayLike) -> NDArray[np.float32]:
        """Return the logits after each token of each sequence, shape [B, T, V]."""
        tokens = np.asarray(tokens_BT, dtype=np.int32)
        assert tokens.ndim == 2, tokens.shape
        self._check(tokens)
        batch, length = tokens.shape
        out = np.empty((batch, length, self.vocabulary), dtype=np.float32)
        for row in range(batch):
            self._prepare(length)
            for start in range(0, length, _BATCH):
                end = min(start + _BATCH, length)
                out[row, start:end] = self._decode(tokens[row, start:end], start, every=True)
        return out

    def stream(self, prompt_T: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[Piece]:
        """Yield an answer piece by piece; the last piece holds the ending.

        Raises:
            UserError: Prompt and answer do not fit the model's context.
        """
        prompt = np.asarray(prompt_T, dtype=np.int32)
        self._check(prompt)
        generator = np.random.default_rng(sampling.seed)
        text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._prepare(len(prompt) + new_tokens)
        use = self._uses
        began = time.perf_counter()
        logits = np.empty(0, dtype=np.float32)
        for start in range(0, len(prompt), _BATCH):
            logits = self._decode(prompt[start : start + _BATCH], start, every=False)[0]
        read = time.perf_counter()
        made = 0
        reason = "length"
        while made < new_tokens:
            token = choose(logits, sampling, generator)
            if self._library.llama_vocab_is_eog(self._vocabulary, token):
                reason = "stop"
                break
            made += 1
            yield Piece(text.decode(self._piece(token, special=False, first=made == 1)), token)
            if self._uses != use:
                raise RuntimeError("the session was used for something else before this stream ended")
            if made < new_tokens:
                position = len(prompt) + made - 1
                logits = self._decode(np.array([token], dtype=np.int32), position, every=False)[0]
        rest = text.decode(b"", final=True)
        ending = Ending(reason, len(prompt), made, read - began, time.perf_counter() - read)
        yield Piece(rest, None, ending)

    def _free_context(self) -> None:
        if self._context:
            self._library.llama_free(self._context)
        self._context = None
        self._context_tokens = 0

    def close(self) -> None:
        """Free the model and its context. May be called twice."""
        self._free_context()
        if self._model:
            self._library.llama_model_free(self._model)
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open(path: Path, device: str = "cpu", threads: int | None = None) -> LlamaSession:  # noqa: A001
    """Open a GGUF file.

    Args:
        path: The file.
        device: ``cpu``, or ``gpu`` to put every layer on it where llama.cpp was built for one.
        threads: CPU threads; the free physical cores if None.

    Raises:
        UserError: llama.cpp is not installed; the file is missing, truncated or damaged, or llama.cpp refuses it.
    """
    check_gguf(path)
    if device not in ("cpu", "gpu"):
        raise UserError(f"unknown device {device!r}: cpu or gpu")
    on_gpu = device == "gpu"
    if on_gpu and not _library().llama_supports_gpu_offload():
        raise UserError("this llama.cpp was built without GPU support: reinstall llama-cpp-python with it, or use cpu")
    return LlamaSession(path, on_gpu=on_gpu, threads=threads or _cores.free_cores())
