"""K trajectories: one prefill, the same answers whatever runs beside them, cache that is freed and accounted for."""

import dataclasses
import re
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from qad import export
from qad.agreement import log_softmax
from qad.artifact import open_artifact
from qad.errors import UserError
from qad.runtimes import GREEDY, Sampling, Session, Step, Trajectory, get, gptq, llamacpp, ort, reference
from qad.runtimes._llama_api import _log_lines
from qad.runtimes._sampling import Chooser
from tests.helpers_models import make_artifact, make_tokenizer
from tests.helpers_runtimes import needs, skip_without

needs_llama = needs("llamacpp")
HOT = Sampling(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01, seed=5)
PROMPT = [9, 8, 7, 30, 31, 200, 201, 77]
CELL_VALUES = 8 * 2 * (64 + 64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a run and its GGUF file. Eight layers: a cell is large beside the numbers that describe it."""
    run = tmp_path_factory.mktemp("trajectories")
    artifact = make_artifact(run, "llama-tied", num_hidden_layers=8, head_dim=64, max_position_embeddings=1536)
    export.get("gguf").write(artifact, run / "model.gguf")
    return run, run / "model.gguf"


@pytest.fixture(scope="module")
def onnx_folder(model: tuple[Path, Path]) -> Path:
    """Return the ONNX folder of the same run."""
    skip_without("ort")
    pytest.importorskip("onnxruntime_genai")
    folder = model[0] / "student-onnx"
    export.get("onnx").write(open_artifact(model[0]), folder)
    return folder


@pytest.fixture(scope="module")
def gptq_folder(model: tuple[Path, Path]) -> Path:
    """Return the GPTQ folder of the same run."""
    skip_without("gptq")
    folder = model[0] / "student-gptq"
    export.get("gptq").write(open_artifact(model[0]), folder)
    return folder


@pytest.fixture(params=["llamacpp", "ort", "reference"])
def session(request: pytest.FixtureRequest, model: tuple[Path, Path]) -> Iterator[Session]:
    if request.param == "llamacpp":
        skip_without("llamacpp")
    if request.param == "ort":
        path = request.getfixturevalue("onnx_folder")
    else:
        path = model[1] if request.param == "llamacpp" else model[0]
    with get(request.param).open(path, threads=1) as opened:
        yield opened


@pytest.fixture
def llama(model: tuple[Path, Path]) -> Iterator[llamacpp.LlamaSession]:
    skip_without("llamacpp")
    with llamacpp.open(model[1], threads=1) as opened:
        yield opened


def test_greedy_trajectories_are_the_stream(session: Session) -> None:
    streamed = [piece.token for piece in session.stream(PROMPT, 24) if piece.token is not None]
    for k in (1, 2, 5):
        for index, trajectory in enumerate(session.sample(PROMPT, k, new_tokens=24)):
            assert trajectory.index == index
            assert trajectory.tokens == streamed
            assert trajectory.reason == ("length" if len(streamed) == 24 else "stop")


def test_the_prompt_is_run_once(session: Session) -> None:
    for k, prompt in ((4, PROMPT), (1, [50, *PROMPT]), (7, [60, *PROMPT, 61])):
        trajectories = session.sample(prompt, k, new_tokens=6)
        assert session.work.prompt_tokens == len(prompt)
        assert session.work.reused_tokens == 0
        # The last token of each needs no run.
        assert session.work.new_tokens == sum(len(one.tokens) - (one.reason != "stop") for one in trajectories)
        assert session.work.calls == max(len(one.tokens) - (one.reason != "stop") for one in trajectories)


def test_a_trajectory_does_not_depend_on_k(session: Session) -> None:
    many = session.sample(PROMPT, 8, HOT, new_tokens=20)
    few = session.sample(PROMPT, 3, HOT, new_tokens=20)
    assert [one.tokens for one in many[:3]] == [one.tokens for one in few]
    (alone,) = session.sample(PROMPT, 1, HOT, new_tokens=20)
    assert alone.tokens == many[0].tokens
    if not isinstance(session, reference.TorchSession):
        assert [one.logprobs for one in many[:3]] == [one.logprobs for one in few]
        assert alone.logprobs == many[0].logprobs
    assert len({tuple(one.tokens) for one in many}) > 6
    again = session.sample(PROMPT, 8, HOT, new_tokens=20)
    assert [(one.tokens, one.logprobs) for one in many] == [(one.tokens, one.logprobs) for one in again]
    other = session.sample(PROMPT, 8, Sampling(temperature=1.2, seed=6), new_tokens=20)
    assert [one.tokens for one in other] != [one.tokens for one in many]


def test_logprobs_are_the_models(session: Session) -> None:
    for one in session.sample(PROMPT, 3, HOT, new_tokens=16):
        rows = log_softmax(session.logits([[*PROMPT, *one.tokens]])[0])[len(PROMPT) - 1 : -1]
        wanted = rows[np.arange(len(one.tokens)), one.tokens]
        # Attention in a call of one token and of many differs in llama.cpp; here the mean over the answer counts.
        assert abs(np.mean(wanted) - np.mean(one.logprobs)) < 0.05
        if isinstance(session, reference.TorchSession):
            np.testing.assert_allclose(one.logprobs, wanted, atol=1e-3)
        assert 0 < one.prompt_seconds <= one.first_seconds <= one.seconds


def test_text_and_steps(session: Session) -> None:
    shown: dict[int, list[Step]] = {index: [] for index in range(4)}
    trajectories = session.sample(PROMPT, 4, HOT, new_tokens=30, on_token=lambda step: shown[step.index].append(step))
    for one in trajectories:
        steps = shown[one.index]
        assert "".join(step.text for step in steps) == one.text
        assert [step.token for step in steps] == [*one.tokens, None]
        assert [step.logprob for step in steps[:-1]] == one.logprobs
        assert [step.reason for step in steps] == [None] * len(one.tokens) + [one.reason]
        # The tiny tokenizer's special tokens are its first three.
        assert one.text == session.detokenize([token for token in one.tokens if token > 2])


def test_an_answer_that_the_model_ends(session: Session) -> None:
    end = make_tokenizer("smollm").eos_token_id
    # A random model ends an answer by chance: some seed among these does.
    for seed in range(20):
        ended = session.sample(PROMPT, 16, Sampling(temperature=3.0, seed=seed), new_tokens=40)
        if any(one.reason == "stop" for one in ended):
            break
    else:
        pytest.fail("no answer ended")
    for one in ended:
        assert end not in one.tokens
        assert (one.reason == "stop") == (len(one.tokens) < 40)
    # The same streams, in which the token that ended an answer is one like any other.
    whole = session.sample(PROMPT, 16, Sampling(temperature=3.0, seed=seed), new_tokens=40, ignore_end=True)
    assert {(len(one.tokens), one.reason) for one in whole} == {(40, "length")}
    for one, other in zip(ended, whole, strict=True):
        assert other.tokens[: len(one.tokens)] == one.tokens
        assert one.reason == "length" or other.tokens[len(one.tokens)] <= 2  # llama.cpp has more ends


def test_stop_texts(session: Session) -> None:
    (whole,) = session.sample(PROMPT, 1, HOT, new_tokens=40)
    middle = len(whole.text) // 2
    word = whole.text[middle : middle + 5]
    shown: list[str] = []
    (cut,) = session.sample(
        PROMPT, 1, HOT, new_tokens=40, stop=["\x00never", word], on_token=lambda step: shown.append(step.text)
    )
    assert cut.reason == "stop"
    assert cut.text == whole.text[: whole.text.index(word)] == "".join(shown)
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert len(cut.tokens) < 40
    # The beginning of a stop text that does not come is shown after all.
    shown.clear()
    (same,) = session.sample(
        PROMPT, 1, HOT, new_tokens=40, stop=whole.text[-3:] + "\x00", on_token=lambda step: shown.append(step.text)
    )
    assert same.text == whole.text == "".join(shown)


def test_dropping(session: Session) -> None:
    alone = session.sample(PROMPT, 8, HOT, new_tokens=24)
    full = session.work.new_tokens
    first, trigger, last = [one.index for one in alone if len(one.tokens) > 12][:3]
    seen: dict[int, int] = dict.fromkeys(range(8), 0)

    def drop_two(step: Step) -> list[int] | None:
        if step.token is not None:
            seen[step.index] += 1
        return [first, last] if step.index == trigger and seen[trigger] == 8 else None

    dropped = session.sample(PROMPT, 8, HOT, new_tokens=24, on_token=drop_two)
    assert [one.index for one in dropped if one.reason == "dropped"] == [first, last]
    # The first had its eighth token before it was dropped; the last did not get its.
    assert dropped[first].tokens == alone[first].tokens[:8]
    assert dropped[last].tokens == alone[last].tokens[:7]
    assert seen[last] == 7

    def run(one: Trajectory) -> int:
        return len(one.tokens) - (one.reason == "length")

    assert session.work.new_tokens == full - run(alone[first]) - run(alone[last]) + 14
    for index in set(range(8)) - {first, last}:
        assert dropped[index].tokens == alone[index].tokens
        assert dropped[index].reason == alone[index].reason
        # Torch's products differ in the last bits with the rows of a batch, the other engines' do not.
        atol = 1e-4 if isinstance(session, reference.TorchSession) else 0
        np.testing.assert_allclose(dropped[index].logprobs, alone[index].logprobs, rtol=0, atol=atol)

    stopped = session.sample(PROMPT, 6, HOT, new_tokens=24, on_token=lambda step: range(6))
    assert {one.reason for one in stopped} == {"dropped"}
    assert [len(one.tokens) for one in stopped] == [1, 0, 0, 0, 0, 0]
    assert session.work.calls == 0


def test_gptq_folders_keep_the_same_promises(gptq_folder: Path) -> None:
    """What the tests above say of every engine, of this one in one session: loading takes seconds."""
    with gptq.open(gptq_folder, threads=1) as session:
        test_greedy_trajectories_are_the_stream(session)
        test_the_prompt_is_run_once(session)
        test_a_trajectory_does_not_depend_on_k(session)
        test_dropping(session)


def test_a_callback_that_fails_leaves_the_session_usable(session: Session) -> None:
    before = session.sample(PROMPT, 3, HOT, new_tokens=12)

    def fail(step: Step) -> None:
        if step.index == 1:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        session.sample(PROMPT, 3, HOT, new_tokens=12, on_token=fail)
    assert [one.tokens for one in session.sample(PROMPT, 3, HOT, new_tokens=12)] == [one.tokens for one in before]


def test_the_models_context_ends_trajectories(session: Session) -> None:
    prompt = np.random.default_rng(0).integers(5, 500, 1530).tolist()
    for one in session.sample(prompt, 2, HOT, new_tokens=50):
        assert one.reason == "context" or (one.reason == "stop" and len(one.tokens) < 6)
        assert len(one.tokens) <= 6
    with pytest.raises(UserError, match="leaves no room in the model's context of 1536: shorten"):
        session.sample([1] * 1536, 2, new_tokens=1)


def test_bad_requests(session: Session) -> None:
    for k, new_tokens in ((0, 5), (2, 0)):
        with pytest.raises(UserError, match="ask for at least one"):
            session.sample(PROMPT, k, new_tokens=new_tokens)
    with pytest.raises(UserError, match="empty stop text"):
        session.sample(PROMPT, 1, new_tokens=5, stop=[""])


def test_cache_of_the_reference(model: tuple[Path, Path]) -> None:
    sizes: list[int] = []
    with reference.open(model[0], threads=1) as session:

        def watch(step: Step) -> range | None:
            if step.index == 3:
                sizes.append(session.work.cache_bytes)
            return range(2) if step.index == 0 and len(sizes) == 5 else None

        session.sample(PROMPT, 4, Sampling(temperature=1, seed=3), new_tokens=8, on_token=watch)
    token = 4 * CELL_VALUES
    assert sizes[4] == 4 * (len(PROMPT) + 4) * token
    assert sizes[6] == 2 * (len(PROMPT) + 6) * token


def test_cache_of_onnx_runtime(onnx_folder: Path) -> None:
    """A row for each trajectory, made at once for prompt and answer; rows that are dropped are freed."""
    prompt, token = np.random.default_rng(6).integers(5, 500, 700).tolist(), 4 * CELL_VALUES
    sizes, held = [], []
    with ort.open(onnx_folder, threads=1) as session:

        def watch(step: Step) -> range | None:
            if step.index == 7 and step.token is not None:
                sizes.append(session.work.cache_bytes)
                held.append(tracemalloc.get_traced_memory()[0] - before)
            return range(6) if step.index == 0 and len(sizes) == 3 else None

        (alone,) = session.sample(prompt, 1, HOT, new_tokens=5, ignore_end=True)
        assert session.work.cache_bytes == 705 * token
        # numpy, whose arrays the buffers are, tells what it takes.
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        trajectories = session.sample(prompt, 8, HOT, new_tokens=5, on_token=watch, ignore_end=True)
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        # More tokens than are run at a time, and the prompt only once.
        assert session.work.prompt_tokens == 700
        assert trajectories[0].tokens[:3] == alone.tokens[:3]
    row = 705 * token
    assert sizes == [8 * row] * 4 + [2 * row]
    assert 8 * row < held[2] < 8.5 * row
    assert 2 * row < held[4] < 2.5 * row
    # The prompt's own goes layer after layer as it is copied.
    assert peak < 9.5 * row


def test_prompts_longer_than_a_batch(llama: llamacpp.LlamaSession) -> None:
    prompt = np.random.default_rng(1).integers(5, 500, 1100).tolist()
    streamed = [piece.token for piece in llama.stream(prompt, 12) if piece.token is not None]
    assert [one.tokens for one in llama.sample(prompt, 3, new_tokens=12)] == [streamed] * 3
    assert llama.work.prompt_tokens + llama.work.reused_tokens == 1100


def test_a_common_beginning_is_kept(llama: llamacpp.LlamaSession) -> None:
    beginning = np.random.default_rng(2).integers(5, 500, 300).tolist()
    first = llama.sample(beginning, 4, HOT, new_tokens=10)
    # The context grows here: the kept cells move along.
    longer = [*beginning, *first[0].tokens, 70, 71]
    llama.sample(longer, 8, HOT, new_tokens=40)
    assert (llama.work.reused_tokens, llama.work.prompt_tokens) == (300, len(first[0].tokens) + 2)
    branch = [*beginning[:120], 90, 91]
    llama.sample(branch, 2, HOT, new_tokens=10)
    assert (llama.work.reused_tokens, llama.work.prompt_tokens) == (120, 2)
    llama.sample(branch, 2, HOT, new_tokens=10)
    assert (llama.work.reused_tokens, llama.work.prompt_tokens) == (122, 0)
    # What was reused stands for what would have been run: the logits after the prompt are those of a fresh context.
    for prompt in (longer, branch):
        tokens = np.array(prompt, dtype=np.int32)
        llama.sample(beginning, 2, new_tokens=3)
        reused, common = llama._context.read(tokens)
        assert common >= 120
        llama._context.clear()
        fresh, common = llama._context.read(tokens)
        assert common == 0
        kept, new = (log_softmax(one[None])[0] for one in (reused, fresh))
        assert abs(float((np.exp(new) * (new - kept)).sum())) < 1e-2


def claimed_bytes() -> int:
    """Return the bytes that llama.cpp logged for the cache of the latest context."""
    sizes = re.findall(r"KV buffer size = +([\d.]+) MiB", "".join(_log_lines()))
    return round(sum(float(size) for size in sizes) * 2**20)


@needs_llama
@pytest.mark.parametrize(("kind", "value_bytes"), [("f16", 2.0), ("q8_0", 34 / 32), ("q4_0", 18 / 32)])
def test_memory_of_trajectories(kind: str, value_bytes: float, model: tuple[Path, Path]) -> None:
    prompt, k, new = np.random.default_rng(3).integers(5, 500, 256).tolist(), 8, 64
    used: list[int] = []
    with llamacpp.open(model[1], threads=1, kv_type=kind) as session:

        def watch(step: Step) -> None:
            if session.work.calls == len(used):
                used.append(session.state_bytes())

        trajectories = session.sample(prompt, k, Sampling(temperature=1.0, seed=2), new_tokens=new, on_token=watch)
        cell = CELL_VALUES * value_bytes
        assert session.work.cache_bytes == (256 + k * new) * cell
        assert abs(claimed_bytes() - session.work.cache_bytes) < 0.01 * session.work.cache_bytes
        # In use: the prompt once, and of each trajectory all tokens but the newest.
        assert len(used) > 40, "another seed: all ended early"
        for done, measured in enumerate(used):
            wanted = (256 + sum(min(done, len(one.tokens)) for one in trajectories)) * cell
            assert abs(measured - wanted) < 0.05 * wanted
        session.sample([5, *prompt], 1, new_tokens=1)
        assert abs(session.state_bytes() - 257 * cell) < 0.05 * used[0]


@needs_llama
def test_a_full_context_ends_trajectories(model: tuple[Path, Path]) -> None:
    prompt = np.random.default_rng(4).integers(5, 500, 200).tolist()
    with llamacpp.open(model[1], threads=1, context=256, sequences=8) as session:
        for k in (8, 3):
            trajectories = session.sample(prompt, k, Sampling(temperature=0.5, seed=2), new_tokens=100)
            assert {one.reason for one in trajectories} == {"context"}
            # Each has one token more than it has cells.
            assert [len(one.tokens) for one in trajectories] == [56 // k + 1] * k
        # Those that are dropped leave their cells to the others.
        left = session.sample(
            prompt,
            4,
            Sampling(temperature=0.5, seed=2),
            new_tokens=100,
            on_token=lambda step: [0, 1] if step.index == 3 else None,
        )
        assert [len(one.tokens) for one in left] == [1, 1, 29, 29]
        with pytest.raises(UserError, match=r"9 trajectories are above this session's limit of 8"):
            session.sample(prompt, 9, new_tokens=1)
        with pytest.raises(UserError, match=r"do not fit a context of 256: 6 trajectories fit"):
            session.sample([*prompt, *[3] * 50], 8, new_tokens=1)
        with pytest.raises(UserError, match=r"do not fit a context of 256: a prompt of 252 tokens fits"):
            session.sample([3] * 300, 4, new_tokens=1)
        with pytest.raises(UserError, match="do not fit the model's context of 256"):
            list(session.stream(prompt, 100))


@needs_llama
def test_options_of_llamacpp(model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: tuple[dict[str, object], ...] = (
        {"kv_type": "q8_0"},
        {"kv_type": "q4_0", "flash_attention": True},
        {"flash_attention": False},
    )
    with llamacpp.open(model[1], threads=1) as session:
        wanted = session.logits([PROMPT])[0, -1:]
    for options in kinds:
        with llamacpp.open(model[1], threads=1, **options) as session:  # type: ignore[arg-type]
            found = log_softmax(session.logits([PROMPT])[0, -1:])[0]
            close = log_softmax(wanted)[0]
            assert 0 < float((np.exp(close) * (close - found)).sum()) < 0.3
    bad: tuple[tuple[dict[str, object], str], ...] = (
        ({"kv_type": "q5"}, "unknown kv_type 'q5': f16, q8_0, q4_0"),
        ({"kv_type": "q8_0", "flash_attention": False}, "needs flash attention"),
        ({"context": 0}, "at least 1"),
        ({"sequences": 0}, "llama.cpp takes 1 to 256"),
        ({"gpu_layers": 3}, "impossible on cpu"),
    )
    for options, message in bad:
        with pytest.raises(UserError, match=message):
            llamacpp.open(model[1], threads=1, **options)  # type: ignore[arg-type]
    with llamacpp.open(model[1], threads=1) as session:
        with pytest.raises(UserError, match="257 trajectories are above this session's limit of 256"):
            session.sample(PROMPT, 257, new_tokens=1)
        # A machine of 10 MB: a cell is 4 KiB.
        free = type("Memory", (), {"available": 10_000_000})()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
        with pytest.raises(UserError, match=r"100 x 300 new ones need .* 10\.0 MB are free: .* at a time .* would fit"):
            session.sample(PROMPT, 100, new_tokens=300)
        assert len(session.sample(PROMPT, 4, new_tokens=4)) == 4


def test_a_callback_that_uses_the_session_is_told(llama: llamacpp.LlamaSession) -> None:
    def use(step: Step) -> None:
        llama.logits([[1, 2, 3]])

    with pytest.raises(RuntimeError, match="something else"):
        llama.sample(PROMPT, 2, new_tokens=5, on_token=use)
    assert len(llama.sample(PROMPT, 2, new_tokens=5)) == 2


def plain_choice(logits: NDArray[np.float32], rule: Sampling, chance: float) -> int:
    """Return the choice by the definition: sort everything, cut, cumulate; in double precision."""
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits[order].astype(np.float64) - logits.max()) / rule.temperature)
    if rule.top_k:
        weights[rule.top_k :] = 0
    weights /= weights.sum()
    before = np.cumsum(weights) - weights
    weights[before >= rule.top_p] = 0
    weights[weights < rule.min_p * weights[0]] = 0
    heights = np.cumsum(weights[np.argsort(order)])
    return int(np.searchsorted(heights, chance * heights[-1], side="right"))


class Chance:
    """A random stream that gives one number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


RULES: dict[str, Callable[[float], Sampling]] = {
    "all": lambda t: Sampling(t),
    "top_k": lambda t: Sampling(t, top_k=37),
    "top_k of all": lambda t: Sampling(t, top_k=10**6),
    "top_p": lambda t: Sampling(t, top_p=0.9),
    "tight top_p": lambda t: Sampling(t, top_p=0.05),
    "min_p": lambda t: Sampling(t, min_p=0.03),
    "everything": lambda t: Sampling(t, top_k=500, top_p=0.9701, min_p=0.001),
}


@pytest.mark.parametrize("rule", RULES)
def test_choices_are_the_definitions(rule: str) -> None:
    generator = np.random.default_rng(0)
    agreed = total = 0
    for vocabulary, spread in ((7, 1.0), (1000, 0.01), (5003, 3.0), (5003, 0.0)):
        for temperature in (0.3, 1.0, 1.7):
            sampling = RULES[rule](temperature)
            chooser = Chooser(sampling, vocabulary)
            logits = (generator.normal(size=vocabulary) * spread).astype(np.float32)
            if spread:
                logits[generator.integers(vocabulary, size=vocabulary // 20)] = -np.inf
            for chance in (0.0, *generator.random(20), 1 - 2**-53):
                token, logprob = chooser.choose(logits, Chance(chance))  # type: ignore[arg-type]
                np.testing.assert_allclose(logprob, log_softmax(logits[None])[0, token], atol=1e-4)
                agreed += token == plain_choice(logits, sampling, chance)
                total += 1
    # Sums of float32 move a boundary by parts of a millionth: one number in many thousands falls between.
    assert agreed >= total - 2


def test_logits_that_are_no_numbers() -> None:
    logits = np.zeros(300, dtype=np.float32)
    for bad in (np.nan, np.inf):
        logits[77] = bad
        with pytest.raises(UserError, match="not a number"):
            Chooser(GREEDY, 300).choose(logits, np.random.default_rng())


def test_sessions_tell_their_context(session: Session, model: tuple[Path, Path]) -> None:
    assert session.context == 1536
    if isinstance(session, llamacpp.LlamaSession):
        with llamacpp.open(model[1], threads=1, context=300) as small:
            # llama.cpp makes contexts in steps of 256.
            assert small.context == 512


def test_a_call_can_make_the_later_ones_of_a_larger_one(session: Session) -> None:
    whole = session.sample(PROMPT, 6, HOT, new_tokens=12)
    later = session.sample(PROMPT, 3, dataclasses.replace(HOT, first=3), new_tokens=12)
    assert [one.tokens for one in later] == [one.tokens for one in whole[3:]]
    assert [one.index for one in later] == [0, 1, 2]


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ({"top_p": 0.0}, "sampling with top_p 0.0 is impossible: give more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"temperature": float("nan")}, "temperature nan is impossible: give 0 or more"),
        ({"top_k": -1}, "top_k -1"),
        ({"min_p": 1.1}, "min_p 1.1 is impossible: give 0 to 1"),
        ({"seed": -5}, "seed -5"),
    ],
)
def test_an_impossible_rule_names_what_is_impossible(rule: dict[str, float], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Sampling(**rule)  # type: ignore[arg-type]
