"""Runtimes: one module per engine, each satisfying ``Runtime``. The folder listing is the registry.

Whoever judges or uses a model asks for a ``Session`` and stays blind to the engine behind it.

Shapes: B batch, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qad import export
from qad.errors import UserError
from qad.registry import module_named, module_names
from qad.runtimes._memory import check_weights
from qad.runtimes._sampling import GREEDY, Sampling, choose
from qad.runtimes._trajectories import Lost, OnToken, Reason, Step, Trajectory, Work

__all__ = [
    "ARTIFACT",
    "FOLDER",
    "GREEDY",
    "URL",
    "Ending",
    "Lost",
    "OnToken",
    "Piece",
    "Reason",
    "Runtime",
    "Sampling",
    "Session",
    "Step",
    "Trajectory",
    "Work",
    "choose",
    "format_of",
    "get",
    "is_url",
    "names",
    "open_model",
    "plain_url",
    "runtime_for",
]

# Kinds of model that are no exported file: a run's artifact, a Hugging Face folder, and a server.
ARTIFACT = "artifact"
FOLDER = "folder"
URL = "url"


@dataclass(frozen=True)
class Ending:
    """Why and how fast a generation ended.

    Attributes:
        reason: ``stop``: the model ended its answer; ``length``: it reached the number of new tokens.
        prompt_tokens, new_tokens: How many were read and made.
        prompt_seconds, new_seconds: How long that took.
    """

    reason: Literal["stop", "length"]
    prompt_tokens: int
    new_tokens: int
    prompt_seconds: float
    new_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Speed of making new tokens."""
        return self.new_tokens / self.new_seconds if self.new_seconds > 0 else 0.0


@dataclass(frozen=True)
class Piece:
    """A part of an answer as it is generated.

    Attributes:
        text: Text that is complete; characters of several tokens wait for the last of them.
        token: The token that brought it, None in the last piece.
        ending: None but in the last piece.
    """

    text: str
    token: int | None = None
    ending: Ending | None = None


class Session(Protocol):
    """An opened model."""

    @property
    def vocabulary(self) -> int:
        """Number of logits per position."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and an answer may have together; None where the engine does not tell."""
        ...

    def tokenize(self, text: str) -> list[int]:
        """Return a text's tokens: special tokens in it are recognized, none is added around it."""
        ...

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, special ones included."""
        ...

    def chat_prompt(self, text: str) -> list[int]:
        """Return the tokens of one user message under the model's own chat template, ready for the answer."""
        ...

    def logits(self, tokens_BT: ArrayLike) -> NDArray[np.float32]:
        """Return the logits after each token of each sequence, shape [B, T, V]."""
        ...

    def stream(self, prompt_T: Sequence[int], new_tokens: int, sampling: Sampling = GREEDY) -> Iterator[Piece]:
        """Yield an answer piece by piece; the last piece holds the ending.

        Raises:
            UserError: Prompt and answer do not fit the model's context.
        """
        ...

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
        """Return k continuations of one prompt, made side by side; ``work`` then tells what they cost.

        Args:
            prompt_T: Tokens of the prompt.
            k: How many.
            sampling: Rule and seed. Trajectory i draws from the i-th random stream of the seed, whatever k is.
            new_tokens: Most tokens of each.
            on_token: Called with every ``Step``. It returns None, or the indexes of trajectories to drop, which may be
                any: their cache is freed and the others go on as if nothing had been. ``range(k)`` ends the call.
            stop: Texts at which a trajectory ends; its text ends before them.
            ignore_end: Take the token that ends an answer as any other, so that each has ``new_tokens``: for timing.

        Raises:
            UserError: No room for the prompt and a token of each trajectory, or more trajectories than the engine
                takes; the message says what fits.
        """
        ...

    def forget(self) -> None:
        """Let go of what is kept of earlier prompts: the next call computes all, as in a session just opened."""
        ...

    @property
    def work(self) -> Work:
        """What the latest call of ``sample`` cost; while one runs, what it has cost so far."""
        ...

    def close(self) -> None:
        """Free the model. May be called twice."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Runtime(Protocol):
    """What a module of this folder offers."""

    @property
    def FORMATS(self) -> tuple[str, ...]:
        """Formats it opens: names of exporters, ``ARTIFACT``, ``FOLDER``, ``URL``."""
        ...

    def available(self) -> str | None:
        """Return None if it is ready to run, else the reason why not and the remedy."""
        ...

    def open(self, path: Path, device: str = "cpu", threads: int | None = None) -> Session:
        """Open a model.

        Args:
            path: File or folder of one of the formats; a server's address, as ``plain_url`` reads it from a path.
            device: ``cpu``, or ``gpu`` where the engine was built for one.
            threads: Threads of the CPU; the free physical cores if None.

        Raises:
            UserError: The runtime is not available, or the model is missing, damaged or of an unknown kind.
        """
        ...


def plain_url(source: str | Path) -> str:
    """Return a URL as text; a path made of one has lost a slash, which is put back."""
    text = source.as_posix() if isinstance(source, Path) else source
    return text if "://" in text else text.replace(":/", "://", 1)


def is_url(source: str | Path) -> bool:
    """Return whether a model is named by the address of a server."""
    return plain_url(source).lower().startswith(("http://", "https://"))


def names() -> list[str]:
    """Return the names of the runtimes."""
    return module_names(__name__)


def get(name: str) -> Runtime:
    """Return the runtime of that name.

    Raises:
        UserError: No such runtime; the message lists those there are.
    """
    return cast(Runtime, module_named(__name__, name, "runtime"))


def format_of(path: Path) -> str:
    """Return the format of a model: the name of its exporter, ``ARTIFACT`` or ``FOLDER``; ``URL`` of a server.

    Raises:
        UserError: Missing, or of no known kind.
    """
    if is_url(path):
        return URL
    if not path.exists():
        raise UserError(f"{path} is missing: give an exported file, a run, a model folder, or a server's http://...")
    if (path / "artifact.json").is_file() or (path / "artifact" / "artifact.json").is_file():
        return ARTIFACT
    for name in export.names():
        if export.get(name).recognizes(path):
            return name
    if (path / "config.json").is_file():
        return FOLDER
    raise UserError(f"{path} is neither an exported file, a run, nor a model folder with a config.json")


def runtime_for(path: Path) -> Runtime:
    """Return the first available runtime that opens a model.

    Raises:
        UserError: No runtime does, with each one's reason.
    """
    return get(_name_for(path))


def _name_for(path: Path) -> str:
    kind = format_of(path)
    reasons = []
    for name in names():
        runtime = get(name)
        if kind in runtime.FORMATS:
            reason = runtime.available()
            if reason is None:
                return name
            reasons.append(f"{name}: {reason}")
    raise UserError(f"no runtime can open {path} ({'; '.join(reasons) or f'none reads the format {kind}'})")


def open_model(
    source: str | Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    kv_type: str = "f16",
    runtime: str | None = None,
) -> Session:
    """Open a model by its name on the command line: what every verb that asks a model something calls.

    Args:
        source: Exported file or folder, run, model folder, or a server's address (``http://host:8000/v1``, with
            ``#model`` behind it where the server has several).
        device: ``cpu``, or ``gpu`` where the engine was built for one.
        threads: Of the CPU; the free physical cores if None.
        kv_type: Of the key-value cache, where the engine has a choice.
        runtime: Name of the one to open it; the first that can if None.

    Raises:
        UserError: Missing, damaged, of no known kind, or no runtime opens it; larger than the memory that is free; the
            server does not answer or has no such model; or an option that is not the caller's to choose.
    """
    path = Path(source)
    name = runtime or _name_for(path)
    engine = get(name)
    if reason := engine.available():
        raise UserError(reason)
    options: dict[str, Any] = {}
    if "kv_type" in inspect.signature(engine.open).parameters:
        options["kv_type"] = kv_type
    elif kv_type != "f16":
        raise UserError(f"the type of the cache is not to be chosen for {path}: leave out --kv-type")
    if not is_url(path) and device == "cpu":
        check_weights(path, name)
    return engine.open(path, device, threads, **options)
