"""A GGUF model in llama.cpp: its weights, its vocabulary, its chat template, and what a token of context costs."""

import codecs
import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

from qad.errors import UserError
from qad.runtimes._llama_api import last_failure, library, quiet


class LlamaModel:
    """A model that is loaded.

    Args:
        path: The file.
        gpu_layers: How many layers a GPU holds; -1: all.

    Attributes:
        handle: llama.cpp's own; None once it is closed.

    Raises:
        UserError: llama.cpp cannot load it.
    """

    def __init__(self, path: Path, gpu_layers: int) -> None:
        self._library = library()
        self.path = path
        quiet()
        settings = self._library.llama_model_default_params()
        settings.n_gpu_layers = gpu_layers
        self.handle = self._library.llama_model_load_from_file(str(path).encode(), settings)
        if not self.handle:
            raise UserError(f"llama.cpp cannot load {path}: {last_failure()}")
        self._vocabulary = self._library.llama_model_get_vocab(self.handle)
        self.vocabulary = int(self._library.llama_vocab_n_tokens(self._vocabulary))
        self.trained_context = int(self._library.llama_model_n_ctx_train(self.handle))
        self._pieces: dict[tuple[int, bool], bytes] = {}

    def cell_values(self) -> int:
        """Return how many numbers the keys and values of one token are."""
        read = self._library
        head = read.llama_model_n_embd(self.handle) // read.llama_model_n_head(self.handle)
        name = self.metadata("general.architecture")
        sizes = (self.metadata(f"{name}.attention.{kind}_length") for kind in ("key", "value"))
        key, value = (int(size) if size else head for size in sizes)
        return read.llama_model_n_layer(self.handle) * read.llama_model_n_head_kv(self.handle) * (key + value)

    def metadata(self, key: str) -> str | None:
        """Return a text or number of the file's metadata as text, None if it is absent."""
        size = 1024
        while True:
            buffer = ctypes.create_string_buffer(size)
            length = self._library.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)
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

    def ends(self, token: int) -> bool:
        """Return whether a token ends an answer."""
        return bool(self._library.llama_vocab_is_eog(self._vocabulary, token))

    @functools.cached_property
    def _prefixes(self) -> bool:
        """Whether the tokenizer puts a space before a text, which is not shown then."""
        kind, prefix = self.metadata("tokenizer.ggml.model"), self.metadata("tokenizer.ggml.add_space_prefix")
        return kind == "llama" and prefix != "false"

    def piece(self, token: int, *, first: bool) -> bytes:
        """Return a token's bytes, which may be a part of a character; none of a special token.

        Args:
            token: The token.
            first: It begins a text.
        """
        key = token, first
        if key not in self._pieces:
            self._pieces[key] = self._piece(token, special=False, first=first)
        return self._pieces[key]

    def _piece(self, token: int, *, special: bool, first: bool = False) -> bytes:
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
            raise UserError(f"the chat template in {self.path} cannot be rendered: {error}") from error
        # Some templates begin with the first token themselves; a second one would change every answer.
        return self._tokenize(rendered, add_special=not (bos and rendered.startswith(bos)))

    def close(self) -> None:
        """Free the model. May be called twice."""
        if self.handle:
            self._library.llama_model_free(self.handle)
        self.handle = None


class LlamaText:
    """Text of the tokens of one sequence."""

    def __init__(self, model: LlamaModel) -> None:
        self._model = model
        self._first = True
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Return what is complete with this token and was not before."""
        first, self._first = self._first, False
        return self._decoder.decode(self._model.piece(token, first=first))

    def end(self) -> str:
        """Return what is left, complete or not."""
        return self._decoder.decode(b"", final=True)
