"""Measuring one file in one runtime: a process of its own, so that its peak of memory is its own.

A run is one call of ``Session.sample`` from an empty cache: K trajectories of one prompt, each with exactly the number
of tokens asked for. Before the runs of each K a short one warms up and makes the context. What a run tells:

    prefill tokens/s    tokens of prompts that the engine ran, over the time that took
    first token         from the call until each trajectory has its first token
    aggregate tokens/s  the other tokens of all K, over the time from the first token until all are done: sampling,
                        text and log-probabilities included
    all done            from the call until all are done
    peak                of the process' resident memory, which counts the pages of a mapped file that were read

Of a server only what a client sees is known: its memory and its caches are not, and its prompt tokens a second only if
it counts tokens. Servers keep prompts from call to call, so that each run has a prompt that begins otherwise.
"""

import contextlib
import hashlib
import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import resources
from multiprocessing.connection import Connection
from pathlib import Path

from qad import runtimes
from qad.energy import Meter
from qad.errors import UserError
from qad.files import is_dropping, sha256_of_file
from qad.runtimes import Sampling, Session

# As answers are sampled in practice; greedy trajectories would all be the same.
RULE = Sampling(temperature=0.8, top_p=0.95, seed=1)
# Figures of a run, whose median and spread are told.
FIGURES = ("prefill_tokens_per_s", "first_token_s", "aggregate_tokens_per_s", "all_done_s")
_WARM_TOKENS = 3
_DEFAULT_KV = "f16"


@dataclass(frozen=True)
class Task:
    """What to measure in one process.

    Attributes:
        file: File or folder.
        runtime: Name.
        ks: Numbers of trajectories, rising.
        prompt_tokens, new_tokens, threads, repeats: Of each run, and how many.
        kv_type: Of the cache.
        gpu: Whether the GPU does the work.
    """

    file: Path
    runtime: str
    ks: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    threads: int
    repeats: int
    kv_type: str = _DEFAULT_KV
    gpu: bool = False


@dataclass
class Measured:
    """What the runs of one K told, or why there is nothing to tell.

    Attributes:
        k: How many trajectories.
        figures: Name of a figure -> its value in each run, none where it is unknown; see ``FIGURES``.
        kv_bytes: Keys and values that the runtime claimed; None of a server.
        peak_bytes: Most memory that the process held while it ran them; None where the system does not tell.
        joules: Of each run; empty where the machine does not tell.
        energy_source: Who told; see ``qad.energy``.
        reason: Why there are no figures.
    """

    k: int
    figures: dict[str, list[float]] = field(default_factory=dict)
    kv_bytes: int | None = None
    peak_bytes: int | None = None
    joules: list[float] = field(default_factory=list)
    energy_source: str | None = None
    reason: str | None = None


def digest(path: Path) -> tuple[str, int]:
    """Return the SHA-256 and the bytes of a file, or of a folder's files: of their names and SHA-256, in order."""
    # Of a run, what is measured.
    path = path / "artifact" if (path / "artifact" / "artifact.json").is_file() else path
    if path.is_file():
        return sha256_of_file(path), path.stat().st_size
    whole, size = hashlib.sha256(), 0
    for file in sorted(path.rglob("*")):
        if file.is_file() and not is_dropping(file):
            whole.update(f"{file.relative_to(path).as_posix()}\0{sha256_of_file(file)}\n".encode())
            size += file.stat().st_size
    return whole.hexdigest(), size


def measure(task: Task) -> Iterator[Measured | None]:
    """Yield None after each run, and what was measured after the runs of each K.

    Whatever happens to the process that measures, each K gets its ``Measured``; an end of the process is a reason.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, task), daemon=True)
    left = list(task.ks)
    with _interrupts_ignored():
        process.start()
    theirs.close()
    try:
        while left:
            try:
                message = ours.recv()
            except EOFError:
                process.join()
                for k in left:
                    yield Measured(k, reason=_how_it_ended(process.exitcode))
                return
            if isinstance(message, Measured):
                left.remove(message.k)
            yield message
    finally:
        process.kill()
        process.join()
        ours.close()


@contextlib.contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ignore Ctrl-C for a moment: a process that is started then ignores it from its beginning.

    It is this process' to handle, which ends the other. Elsewhere than in the main thread nothing is done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _how_it_ended(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "the process was killed, as systems do when memory runs out: ask for fewer trajectories or tokens"
    return f"the process that measured ended with {code}: its output above says more"


def _child(connection: Connection, task: Task) -> None:
    """Measure and send; the target of the process."""
    # As the command line does in its own process: torchao warns of CUDA kernels that a CPU torch cannot load.
    for library in ("torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
    left = list(task.ks)
    try:
        with _open(task) as session:
            next_prompt = _prompts(session, task)
            meter = Meter(gpu=task.gpu)
            for k in task.ks:
                try:
                    measured = _measure_k(session, next_prompt, k, task, meter, connection)
                except UserError as error:
                    measured = Measured(k, reason=str(error))
                except (MemoryError, RuntimeError) as error:  # torch says that memory ran out as a RuntimeError
                    measured = Measured(k, reason=f"{type(error).__name__}: {error}".splitlines()[0])
                left.remove(k)
                connection.send(measured)
    except UserError as error:
        for k in left:
            connection.send(Measured(k, reason=str(error)))
    except BrokenPipeError:
        pass  # nobody listens any more


def _open(task: Task) -> Session:
    return runtimes.open_model(
        task.file,
        device="gpu" if task.gpu else "cpu",
        threads=None if runtimes.is_url(task.file) else task.threads,
        kv_type=task.kv_type,
        runtime=task.runtime,
    )


def _prompts(session: Session, task: Task) -> Callable[[], list[int]]:
    """Return what gives the prompt of the next run, of which the session then holds nothing."""
    text = resources.files("qad.data").joinpath("verify.txt").read_text(encoding="utf-8")
    page = session.tokenize(text)
    tokens = task.prompt_tokens
    prompt = (page * (tokens // len(page) + 1))[:tokens]
    if not runtimes.is_url(task.file):

        def forgotten() -> list[int]:
            session.logits([prompt[:1]])
            return prompt

        return forgotten

    def fresh() -> list[int]:
        cut = (session.tokenize(f"{time.time_ns()}: ") + prompt)[:tokens]
        # Pieces of text are no tokens that a server would take: it takes messages.
        return cut if min(cut) >= 0 else session.chat_prompt(session.detokenize(cut))

    return fresh


def _measure_k(
    session: Session, next_prompt: Callable[[], list[int]], k: int, task: Task, meter: Meter, connection: Connection
) -> Measured:
    """Return what the runs of one K tell.

    Raises:
        UserError: K or the context is above what the runtime takes.
    """
    measured = Measured(k, {name: [] for name in FIGURES}, energy_source=meter.source)
    remote = runtimes.is_url(task.file)
    _reset_peak()
    prompt = next_prompt()
    made = 0

    def few(step: object) -> range | None:
        nonlocal made
        made += 1
        return range(k) if made >= _WARM_TOKENS * k else None

    session.sample(prompt, k, RULE, new_tokens=task.new_tokens, ignore_end=True, on_token=few)
    connection.send(None)
    for _ in range(task.repeats):
        prompt = next_prompt()
        with meter:
            done = session.sample(prompt, k, RULE, new_tokens=task.new_tokens, ignore_end=True)
        work = session.work
        if short := [one for one in done if len(one.tokens) != task.new_tokens]:
            early = short[0].reason == "stop"
            why = "the server cannot be told to go on" if early else "the model's context is too small"
            raise UserError(
                f"trajectories end after {len(short[0].tokens)} of {task.new_tokens} tokens ({short[0].reason}): "
                f"{why}; ask for fewer tokens"
            )
        assert remote or not work.reused_tokens, work
        first, last = max(one.first_seconds for one in done), max(one.seconds for one in done)
        figures = {
            "first_token_s": first,
            # A server may begin with one after the other.
            "aggregate_tokens_per_s": k * (task.new_tokens - 1) / (last - min(one.first_seconds for one in done)),
            "all_done_s": last,
        }
        if work.prompt_tokens:
            figures["prefill_tokens_per_s"] = work.prompt_tokens / work.prompt_seconds
        for name, value in figures.items():
            measured.figures[name].append(value)
        if meter.joules is not None:
            measured.joules.append(meter.joules)
        measured.kv_bytes = None if remote else work.cache_bytes
        connection.send(None)
    measured.peak_bytes = None if remote else _peak()
    return measured


def _reset_peak() -> None:
    """Begin a new peak of memory where the system allows it (Linux, proc(5)); else peaks rise with K."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int | None:
    """Return the peak of this process' resident memory in bytes, None where the system does not tell."""
    try:
        # ru_maxrss would count what the parent held when it made this process.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    # macOS counts bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss if sys.platform == "darwin" else None
