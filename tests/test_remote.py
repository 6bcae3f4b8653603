"""Servers as runtimes: real ones, and a real one that fails as it is told to (``tests/helpers_server.py``)."""

import contextlib
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from qad import export
from qad.agreement import log_softmax
from qad.answer import answer as show
from qad.bench import EXTRAS, KEYS, bench_command
from qad.errors import OtherModel, UserError
from qad.report.command import report_command
from qad.runtimes import Lost, Sampling, Step, Trajectory, format_of, llamacpp, open_model, remote, runtime_for
from qad.runtimes._remote_address import address_of, key_of
from qad.runtimes._remote_stream import first_seed
from tests.helpers_models import make_artifact
from tests.helpers_runtimes import needs, skip_without
from tests.helpers_server import Fault, Script, answer, logprob_of, serving, text_of, tokens_of

pytestmark = needs("remote")
HOT = Sampling(temperature=0.9, top_p=0.9, seed=7)
QUESTION = "what"


def expected(prompt: str, index: int, count: int, sampling: Sampling = HOT) -> tuple[list[int], str]:
    """Return what the toy model answers: by its rule, and not by what was sent."""
    return answer(tokens_of(prompt), first_seed(sampling) + index, count)


def check(found: list[Trajectory], prompt: str, count: int, *, exact: bool = False, logprobs: bool = True) -> None:
    """Assert that trajectories are the toy model's."""
    for index, one in enumerate(found):
        tokens, reason = expected(prompt, index, count)
        assert (one.index, one.text, one.reason) == (index, text_of(tokens), reason)
        assert len(one.tokens) == len(one.logprobs) == len(tokens)
        if exact:
            assert one.tokens == tokens
        if logprobs:
            assert one.logprobs == pytest.approx([logprob_of(token) for token in tokens])
        else:
            assert all(map(math.isnan, one.logprobs))
        assert 0 < one.first_seconds <= one.seconds


@pytest.mark.parametrize("owner", ["someone", "vllm"])
@pytest.mark.parametrize("several", [True, False])
def test_trajectories_of_a_server(owner: str, several: bool) -> None:
    script = Script(owner=owner, several=several)
    with serving(script) as url, open_model(url) as session:
        assert isinstance(session, remote.RemoteSession)
        assert session.exact == (owner == "vllm")
        prompt = session.chat_prompt(QUESTION)
        found = session.sample(prompt, 3, HOT, new_tokens=30)
        check(found, QUESTION + "?", 30, exact=session.exact)
        # One request where it can, else one more for each that it left out; it is not asked for several again.
        assert [body.get("n") for body in script.bodies] == [3] if several else [3, None, None]
        assert session.work.calls == len(script.bodies)
        assert session.work.new_tokens == sum(len(one.tokens) for one in found)
        script.bodies.clear()
        check(session.sample(prompt, 2, HOT, new_tokens=30), QUESTION + "?", 30, exact=session.exact)
        assert len(script.bodies) == (1 if several else 2)
        assert "".join(session.detokenize(one.tokens) for one in found) == "".join(one.text for one in found)
        # The same trajectories over a connection each, told token by token.
        shown: dict[int, list[Step]] = {index: [] for index in range(3)}
        again = session.sample(prompt, 3, HOT, new_tokens=30, on_token=lambda step: shown[step.index].append(step))
        check(again, QUESTION + "?", 30, exact=session.exact)
        for one in again:
            steps = shown[one.index]
            assert [step.token for step in steps] == [*one.tokens, None]
            assert "".join(step.text for step in steps) == one.text
            assert steps[-1].reason == one.reason
        # What OpenAI's interface has no word for is said to servers that know it.
        assert ("top_k" in script.bodies[-1]) == (owner == "vllm")


def test_plain_prompts_and_streams() -> None:
    for owner in ("someone", "vllm"):
        with serving(Script(owner=owner)) as url, open_model(url) as session:
            text = "Two words w12 w7 and 4711 äöü\n\n end"
            tokens = session.tokenize(text)
            assert session.detokenize(tokens) == text
            check(session.sample(tokens, 2, HOT, new_tokens=12), text, 12, exact=owner == "vllm")
            pieces = list(session.stream(session.tokenize("abc"), 50, HOT))
            wanted, reason = expected("abc", 0, 50)
            assert "".join(piece.text for piece in pieces) == text_of(wanted)
            ending = pieces[-1].ending
            assert ending is not None
            assert (ending.reason, ending.new_tokens, ending.prompt_tokens) == (reason, len(wanted), 3)
            with pytest.raises(UserError, match="tells no logits: use the model's file"):
                session.logits([tokens])


def test_later_trajectories_of_a_larger_call() -> None:
    with serving(Script(owner="vllm")) as url, open_model(url) as session:
        prompt = session.tokenize("abc")
        whole = session.sample(prompt, 4, HOT, new_tokens=9)
        later = session.sample(prompt, 2, Sampling(0.9, 0.9, seed=7, first=2), new_tokens=9)
        assert [one.tokens for one in later] == [one.tokens for one in whole[2:]]
        other = session.sample(prompt, 4, Sampling(0.9, 0.9, seed=8), new_tokens=9)
        assert not {tuple(one.tokens) for one in other} & {tuple(one.tokens) for one in whole}


def test_stop_texts_and_drops_close_connections() -> None:
    script = Script(pause=0.02)
    with serving(script) as url, open_model(url) as session:
        prompt = session.chat_prompt(QUESTION)
        tokens, _ = expected(QUESTION + "?", 0, 60)
        word = text_of(tokens[4:6])[2:]
        (one,) = session.sample(prompt, 1, HOT, new_tokens=60, stop=[word], on_token=lambda step: None)
        whole = text_of(tokens)
        assert (one.text, one.reason) == (whole[: whole.index(word)], "stop")
        # Nobody watches: the same of several in one request, though their server finds no stop texts.
        both = session.sample(prompt, 2, HOT, new_tokens=60, stop=word)
        assert (both[0].text, both[0].reason) == (one.text, "stop")

        def drop(step: Step) -> list[int] | None:
            return [1, 2] if step.index == 1 else None

        script.left.clear()
        found = session.sample(prompt, 3, HOT, new_tokens=60, on_token=drop)
        assert [one.reason for one in found][1:] == ["dropped", "dropped"]
        check(found[:1], QUESTION + "?", 60)
        assert len(found[1].tokens) == 1
        assert len(script.left) == 2
        assert max(script.left) < 12

        script.left.clear()
        with pytest.raises(ZeroDivisionError):
            session.sample(prompt, 2, HOT, new_tokens=60, on_token=lambda step: [1 // 0])
        stream = session.stream(prompt, 60, HOT)
        next(stream)
        assert isinstance(stream, Generator)
        stream.close()
        time.sleep(0.2)
        assert len(script.left) == 3
        check(session.sample(prompt, 1, HOT, new_tokens=5), QUESTION + "?", 5)


def test_errors_that_pass() -> None:
    for fault in (Fault(429, {"Retry-After": "0.3"}), Fault(503, message="busy")):
        script = Script(faults=deque([fault, fault]))
        with serving(script) as url, open_model(url) as session:
            began = time.perf_counter()
            check(session.sample(session.chat_prompt(QUESTION), 1, HOT, new_tokens=9), QUESTION + "?", 9)
            assert len(script.bodies) == 3
            if fault.status == 429:
                assert time.perf_counter() - began >= 0.6


@pytest.mark.parametrize("owner", ["someone", "vllm"])
@pytest.mark.parametrize(
    ("fault", "watched"),
    # However it broke, it goes on in the same way: that nobody watches is tried with one.
    [
        (Fault(after=5), True),
        (Fault(after=5), False),
        (Fault(after=5, clean=True), True),
        (Fault(after=4, stall=1.5), True),
    ],
    ids=["cut", "cut-unwatched", "clean", "stall"],
)
def test_an_answer_that_is_cut_goes_on(owner: str, watched: bool, fault: Fault) -> None:
    # One that is silent again at the same place is stuck.
    twice = owner == "vllm" or not fault.stall
    script = Script(owner=owner, faults=deque([fault, fault] if twice else [fault]))
    seen: list[Step] = []
    with serving(script) as url, remote.open(url, timeout=1.0) as session:
        prompt = session.chat_prompt(QUESTION)
        (one,) = session.sample(prompt, 1, HOT, new_tokens=14, on_token=seen.append if watched else None)
        check([one], QUESTION + "?", 14, exact=session.exact)
        if watched:
            assert [step.token for step in seen] == [*one.tokens, None]
        if session.exact:
            # What was received is not asked for again.
            assert [body["max_tokens"] for body in script.bodies][1:] == [14 - fault.after, 14 - 2 * fault.after]
        # Of several at once, the others go on one by one.
        script.faults.append(fault)
        check(session.sample(prompt, 3, HOT, new_tokens=14), QUESTION + "?", 14, exact=session.exact)


def test_what_came_before_a_server_died_is_kept() -> None:
    script = Script(pause=0.02)
    with serving(script) as url, remote.open(url, retries=1) as session:
        prompt = session.chat_prompt(QUESTION)
        lengths = {index: len(expected(QUESTION + "?", index, 30)[0]) for index in range(4)}
        shortest = min(lengths, key=lengths.__getitem__)
        assert lengths[shortest] < min(length for index, length in lengths.items() if index != shortest) - 4

        def die(step: Step) -> None:
            script.dead = script.dead or step.reason == "stop"

        with pytest.raises(Lost, match=r"503 shutting down.*1 of 4 answers were whole by then") as caught:
            session.sample(prompt, 4, HOT, new_tokens=30, on_token=die)
        for one in caught.value.trajectories:
            tokens, _ = expected(QUESTION + "?", one.index, 30)
            assert one.reason == ("stop" if one.index == shortest else "lost")
            assert one.text == text_of(tokens[: len(one.tokens)])
            assert len(one.tokens) >= lengths[shortest] - 2
        received = sum(len(one.tokens) for one in caught.value.trajectories if one.reason == "lost")
        assert f"{url} broke off after {received} tokens, and the server then failed (503" in str(caught.value)
        # A server that comes back serves the same session.
        script.dead = False
        check(session.sample(prompt, 4, HOT, new_tokens=30), QUESTION + "?", 30)


def test_what_was_shown_of_a_broken_answer_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    gone = Fault(503, {"Retry-After": "0.01"}, message="restarting")
    script = Script(faults=deque([Fault(after=5), *[gone] * 5]))
    greedy = Sampling(temperature=0.0, top_p=1.0)
    with (
        serving(script) as url,
        pytest.raises(UserError, match=r"after 5 tokens, and the .* \(503 restarting\).*; the text above is what came"),
    ):
        show(Path(url), QUESTION, new_tokens=30, temperature=0.0, top_p=1.0, top_k=0, seed=0, threads=None)
    assert capsys.readouterr().out == text_of(expected(QUESTION + "?", 0, 30, greedy)[0][:5]) + "\n"


def test_another_answer_than_the_one_that_was_broken_off() -> None:
    script = Script(faults=deque([Fault(after=5)]))

    def change(step: Step) -> None:
        script.shift = 1

    told = "broke off after 5 tokens, and the server gave another answer when it was asked again"
    with serving(script) as url, remote.open(url, retries=1) as session, pytest.raises(Lost, match=told):
        session.sample(session.chat_prompt(QUESTION), 1, HOT, new_tokens=14, on_token=change)


def test_servers_that_know_less() -> None:
    script = Script(logprobs=False, usage=False)
    with serving(script) as url, open_model(url) as session:
        prompt = session.chat_prompt(QUESTION)
        check(session.sample(prompt, 2, HOT, new_tokens=20), QUESTION + "?", 20, logprobs=False)
        assert len(script.bodies) == 2
        # Remembered.
        check(session.sample(prompt, 2, HOT, new_tokens=20), QUESTION + "?", 20, logprobs=False)
        assert len(script.bodies) == 3
        with pytest.raises(UserError, match="takes whole messages: an answer cannot be begun"):
            session.sample([*prompt, *session.tokenize("I think")], 1, new_tokens=5)


def test_contexts() -> None:
    for owner, message in (("vllm", "leaves no room in the context of 40"), ("someone", "does not fit the model's")):
        with serving(Script(owner=owner, context=40)) as url, open_model(url) as session:
            assert session.context == 40
            with pytest.raises(UserError, match=message):
                session.sample(session.tokenize("x" * 50), 2, new_tokens=5)
    with serving(Script(owner="vllm", context=40)) as url, open_model(url) as session:
        (one,) = session.sample(session.tokenize("x" * 36), 1, HOT, new_tokens=9, ignore_end=True)
        assert (len(one.tokens), one.reason) == (4, "context")


def test_keys(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    script = Script(key="right-key")
    caplog.set_level("DEBUG")
    with serving(script) as url:
        monkeypatch.setenv("OPENAI_API_KEY", "right-key")
        with pytest.raises(UserError, match=r"401.*it wants a key; set QAD_API_KEY in the environment"):
            open_model(url)
        monkeypatch.setenv("QAD_API_KEY", "wrong-key")
        with pytest.raises(UserError, match=r"provided: Bearer \*\*\*\): the key in QAD_API_KEY is wrong"):
            open_model(url)
        monkeypatch.setenv("QAD_API_KEY", "right-key")
        with open_model(url) as session:
            (one,) = session.sample(session.chat_prompt(QUESTION), 1, HOT, new_tokens=4)
            assert set(script.keys) == {"Bearer right-key"}
            assert "right-key" not in f"{one} {session.work} {vars(session)}"
    assert "right-key" not in caplog.text
    assert "wrong-key" not in caplog.text


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, base, root, model in (
        ("http://h:8000/v1", "http://h:8000/v1", "http://h:8000", None),
        ("http://h:8000", "http://h:8000/v1", "http://h:8000", None),
        ("https://h/some/v1/#a/b", "https://h/some/v1", "https://h/some", "a/b"),
        ("http://[::1]:80/v1#m", "http://[::1]:80/v1", "http://[::1]:80", "m"),
    ):
        for source in (given, Path(given)):
            found = address_of(str(source))
            assert (found.base, found.root, found.model) == (base, root, model)
            assert format_of(Path(source)) == "url"
    assert runtime_for(Path("http://h:8000/v1")) is remote
    for secret in ("http://me:secret@h/v1", "http://h/v1?key=secret", "http://secret@h/v1"):
        with pytest.raises(UserError, match="no key: set QAD_API_KEY") as caught:
            address_of(secret)
        assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="http://host:8000/v1"):
        address_of("http://h:port/v1")
    # OpenAI's key is for OpenAI.
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    assert (key_of("api.openai.com"), key_of("h")) == ("theirs", None)


def test_bench_of_servers_until_an_interrupt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = Script(owner="vllm", pause=0.01)
    over = threading.Event()

    def interrupt() -> None:
        # In the middle of what is asked for last: five answers side by side.
        while not any(body.get("n") == 5 for body in list(script.bodies)):
            if over.wait(0.01):
                return
        os.kill(os.getpid(), signal.SIGINT)

    # A job in the background inherits that it is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=interrupt)
    watcher.start()
    try:
        with serving(script) as url:
            code = bench_command(
                [Path(url), tmp_path / "later.gguf"],
                ks="1,3,5",
                prompt_tokens="20",
                new_tokens=8,
                threads=None,
                repeats=1,
                kv_type="f16",
                gpu=False,
                device="raspberry-pi-5",
                json_file=tmp_path / "out.json",
                command="qad bench",
            )
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGINT, before)
    assert code == 130
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["file"], row["runtime"], row["k"]) for row in rows] == [
        *((url, "remote", k) for k in (1, 3, 5)),
        *((str(tmp_path / "later.gguf"), "", k) for k in (1, 3, 5)),
    ]
    unknown = ("threads", "peak_bytes", "kv_bytes", "bound_tokens_per_s", "bounds", "share_of_bound", "expected_bytes")
    for row in rows[:2]:
        assert set(row) == {*KEYS, *EXTRAS}
        assert {name: row[name] for name in (*unknown, "reason")} == dict.fromkeys((*unknown, "reason"))
        # Eight tokens of each, a hundredth of a second or more before each token of one answer.
        assert row["all_done_s"] > row["k"] * 8 * 0.01
        assert 0 < row["aggregate_tokens_per_s"] < 100
        assert row["prefill_tokens_per_s"] == pytest.approx(20 / row["first_token_s"], rel=0.5)
    for row in rows[2:]:
        assert set(row) == {*KEYS, *EXTRAS}
        assert (row["reason"], row["aggregate_tokens_per_s"]) == ("interrupted", None)
    shown = capsys.readouterr()
    assert "what was measured until then is kept" in shown.err
    assert "servers are seen from outside: their memory, threads and bound are not known" in shown.out
    short = url.removeprefix("http://").removesuffix("/v1")
    assert f"K = 5: {short} remote: interrupted" in shown.out
    assert "K = 1, 3, 5: later.gguf: interrupted" in shown.out

    report_command([tmp_path / "out.json"], tmp_path / "page.html", title=None, command="")
    page = (tmp_path / "page.html").read_text()
    assert "Not measured: later.gguf, K = 1, 3, 5: interrupted" in page
    assert "remote, K = 5: interrupted" in page
    # Servers have no roofline, and the page does not speak as if there was one.
    assert "2 rows of servers, which are seen from outside" in page
    assert "no roofline to hold them against" in page
    assert "tokens/s" in page
    for word in ("Dashed", "bound", "between 0 and 100"):
        assert word not in page[page.index("<body>") :], word


def test_servers_that_cannot_be_used() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=r"no server answers at .*: start one \(llama-server -m FILE.gguf"):
        remote.open(url, retries=0)
    with serving(Script(models=("small", "large"))) as url:
        with pytest.raises(UserError, match=rf"{url} serves small, large: name one behind a #, as in {url}#small"):
            open_model(url)
        with pytest.raises(UserError, match="unknown model of .* 'larg'; known: large, small; did you mean large"):
            open_model(url + "#larg")
        with open_model(url + "#large") as session:
            assert isinstance(session, remote.RemoteSession)
            assert session.address == url + "#large"
        with pytest.raises(UserError, match="has no list of models"):
            open_model(url.replace("/v1", "/v2"))
        with pytest.raises(UserError, match="leave out --threads"):
            open_model(url, threads=2)
        with pytest.raises(UserError, match="leave out --kv-type"):
            open_model(url, kv_type="q8_0")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse what does not fit a full queue")
def test_addresses_where_nothing_is() -> None:
    with contextlib.ExitStack() as stack:
        # What listens and takes nobody: its queue is full, and Linux lets further connections wait unanswered.
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        silent = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=9))
        for server, message in (
            (
                full,
                "takes a connection within 0.5 s: the address is wrong, .* firewall .*; correct the address, or start",
            ),
            (silent, "said nothing for 0.5 s: it is overloaded or stuck, or no such server"),
        ):
            began = time.perf_counter()
            with pytest.raises(UserError, match=message):
                remote.open(f"http://127.0.0.1:{server.getsockname()[1]}/v1", timeout=0.5)
            # Asked once: such an address is not asked again and again.
            assert time.perf_counter() - began < 2


def test_what_tells_a_served_model_from_another() -> None:
    # As llama-server (tools/server/README.md, /v1/models and /props) and vLLM (ModelCard) say it; the time and the
    # context, with which the same file may be served again, are not of the model.
    meta = {"vocab_type": 2, "n_vocab": 32, "n_ctx_train": 64, "n_embd": 16, "n_params": 999, "size": 555}
    card = {"created": 1700000000, "root": "/models/base", "parent": None, "permission": [{"id": "x"}]}
    for script, served in (
        (
            Script(owner="llamacpp", told={"created": 1, "meta": meta}, props={"model_path": "/runs/1/q4.gguf"}),
            {"id": "toy", "size": 555, "n_params": 999, "n_vocab": 32, "n_embd": 16, "path": "/runs/1/q4.gguf"},
        ),
        (Script(owner="vllm", told=card, context=40), {"id": "toy", "root": "/models/base"}),
        (Script(), {"id": "toy"}),
    ):
        with serving(script) as url, remote.open(url) as session:
            assert session.served == served
    with serving(Script(models=())) as url, remote.open(url + "#any") as session:
        assert session.served == {}


@pytest.mark.parametrize(
    ("owner", "k", "watched", "after"),
    [
        # In the middle of an answer, which may be asked for behind what came of it, or from its beginning.
        ("vllm", 1, True, 5),
        ("someone", 1, True, 5),
        ("someone", 3, False, 5),
        # Before anything came: at the request, and behind the headers of an answer.
        ("vllm", 2, True, None),
        ("someone", 3, False, 0),
        # One answer after the other.
        ("me", 3, True, 0),
    ],
)
def test_a_server_that_hangs_is_told_of_in_time(owner: str, k: int, watched: bool, after: int | None) -> None:
    timeout = 1.0
    script = Script(owner=owner)
    with serving(script) as url, remote.open(url, timeout=timeout) as session:
        prompt = session.chat_prompt(QUESTION)
        script.stuck = after is None
        script.faults.extend([Fault(after=after or 0, stall=60)] + [Fault(stall=60)] * 20)
        told = "after 5 tokens and nothing more for 1 s: .* start it again if it has ended or is stuck"
        if not after or not watched:
            told = "said nothing for 1 s: it is overloaded or stuck.*; look at its log, start it again if it is stuck"
        began = time.perf_counter()
        with pytest.raises(UserError, match=told):
            session.sample(prompt, k, HOT, new_tokens=30, on_token=(lambda step: None) if watched else None)
        # And the pause before the second try.
        assert time.perf_counter() - began < 4 * timeout
        assert len(script.bodies) <= (k + 1 if after else k)


def test_a_server_that_hangs_between_answers_is_told_of_in_time() -> None:
    script = Script(owner="vllm")
    with serving(script) as url, remote.open(url, timeout=0.5) as session:
        script.stuck = True
        began = time.perf_counter()
        with pytest.raises(UserError, match=r"said nothing for 0.5 s"):
            session.tokenize("abc")
        assert time.perf_counter() - began < 3


def test_another_model_in_an_open_session() -> None:
    # Another name; the same name of another file, as llama-server tells it; the same of other weights, as vLLM does.
    for before, after, told in (
        (Script(), {"models": ("other",)}, "had toy first and has other now"),
        (
            Script(owner="llamacpp", props={"model_path": "/runs/1/q4.gguf"}),
            {"props": {"model_path": "/runs/2/q4.gguf"}},
            r"had toy \(path /runs/1/q4.gguf\) first and has toy \(path /runs/2/q4.gguf\) now",
        ),
        (
            Script(owner="vllm", told={"root": "/models/base"}),
            {"told": {"root": "/models/tuned"}},
            r"had toy \(root /models/base\) first and has toy \(root /models/tuned\) now",
        ),
    ):
        with serving(before) as url, remote.open(url) as session:
            prompt = [5, 6, 7] if session.exact else session.tokenize("abc")
            assert len(session.sample(prompt, 2, HOT, new_tokens=9)) == 2
            for name, value in after.items():
                setattr(before, name, value)
            with pytest.raises(OtherModel, match=f"{url} {told}.*: start it with the first one again, or give the"):
                session.sample(prompt, 2, HOT, new_tokens=9)
            with pytest.raises(OtherModel, match=told):
                list(session.stream(prompt, 9, HOT))


def test_answers_of_another_model_than_the_first() -> None:
    # Nothing is known of it but what its answers say.
    script = Script(models=(), answering="first")
    with serving(script) as url, remote.open(url + "#any") as session:
        prompt = session.tokenize("abc")
        for watched in (None, lambda step: None):
            check(session.sample(prompt, 2, HOT, new_tokens=9, on_token=watched), "abc", 9)
        # Some say it in a part of their pieces only.
        script.answering = ""
        check(session.sample(prompt, 1, HOT, new_tokens=9), "abc", 9)
        script.answering = "second"
        with pytest.raises(OtherModel, match=r"had first first and has second now"):
            list(session.stream(prompt, 9, HOT))

    def change(step: Step) -> None:
        script.answering = "second"

    # Not as the answers that came before it was lost either: of which model those are is not known any more.
    script = Script(answering="first", pause=0.01)
    with serving(script) as url, remote.open(url) as session, pytest.raises(OtherModel, match="has second now"):
        session.sample(session.tokenize("abc"), 3, HOT, new_tokens=30, on_token=change)


def test_a_list_of_models_that_cannot_be_had_again_is_no_change() -> None:
    script = Script(told={"root": "/models/base"})
    with serving(script) as url, remote.open(url) as session:
        prompt = session.tokenize("abc")
        for loading, told, models in ((1, {}, ("toy",)), (0, {}, ("more", "toy")), (0, {"root": 7.5}, ("toy",))):
            script.loading, script.told, script.models = loading, told, models
            check(session.sample(prompt, 1, HOT, new_tokens=9), "abc", 9)
            assert script.loading == 0


def test_a_server_that_starts_is_waited_for() -> None:
    script = Script(loading=2)
    with serving(script) as url, remote.open(url) as session:
        check(session.sample(session.chat_prompt(QUESTION), 1, HOT, new_tokens=5), QUESTION + "?", 5)
    assert script.loading == 0


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Return when a server answers."""
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the server did not start")


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skip_without("llamacpp")
    run = tmp_path_factory.mktemp("remote")
    export.get("gguf").write(make_artifact(run, "llama-tied", max_position_embeddings=512), run / "tiny.gguf")
    return run / "tiny.gguf"


@dataclass(frozen=True)
class Running:
    """A server's process and its URL."""

    process: "subprocess.Popen[bytes]"
    url: str


@pytest.fixture(scope="module")
def python_server(gguf: Path) -> Iterator[Running]:
    """Run llama_cpp.server."""
    pytest.importorskip("llama_cpp.server.app", reason="llama-cpp-python[server] is not installed")
    port = free_port()
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--port", str(port), "--n_ctx", "256"]
    command += ["--n_threads", "1", "--n_threads_batch", "1", "--model_alias", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/v1/models", process)
            yield Running(process, f"http://127.0.0.1:{port}/v1")
        finally:
            process.kill()


def test_llama_cpp_python_server(python_server: Running, gguf: Path) -> None:
    with open_model(python_server.url) as session, llamacpp.open(gguf, threads=1) as local:
        assert isinstance(session, remote.RemoteSession)
        assert session.kind == "llama_cpp.server"
        prompt = session.chat_prompt("Is it?")
        # It answers one request at a time, and interrupts the one it is at for the next.
        found = session.sample(prompt, 3, HOT, new_tokens=12, ignore_end=True)
        assert [(len(one.text) > 0, one.reason) for one in found] == [(True, "length")] * 3
        assert len({one.text for one in found}) == 3
        again = session.sample(prompt, 3, HOT, new_tokens=12, ignore_end=True, on_token=lambda step: None)
        assert [one.text for one in again] == [one.text for one in found]
        greedy = session.sample(prompt, 1, new_tokens=8)[0]
        best = log_softmax(local.logits([local.chat_prompt("Is it?")])[0, -1:])[0].max()
        assert greedy.logprobs[0] == pytest.approx(best, abs=0.05)
        streamed = "".join(piece.text for piece in session.stream(prompt, 8))
        assert streamed == greedy.text

        def drop(step: Step) -> list[int] | None:
            return [0] if len(step.text) and step.index == 0 else None

        dropped = session.sample(prompt, 2, HOT, new_tokens=12, ignore_end=True, on_token=drop)
        assert [one.reason for one in dropped] == ["dropped", "length"]
        assert dropped[1].text == found[1].text
        with pytest.raises(UserError, match=r"does not fit the model's context .*maximum context length is 256"):
            session.sample(session.tokenize("one two three four " * 80), 1, new_tokens=4)
        plain = session.sample(session.tokenize("Is it?"), 2, HOT, new_tokens=5)
        assert all(one.tokens for one in plain)


def test_a_server_that_is_killed_in_the_middle_of_an_answer(python_server: Running) -> None:
    # The last test of this server.
    def kill(step: Step) -> None:
        python_server.process.kill()
        python_server.process.wait()

    with remote.open(python_server.url, retries=1) as session:
        prompt = session.chat_prompt("Is it?")
        with pytest.raises(Lost) as caught:
            session.sample(prompt, 2, HOT, new_tokens=200, ignore_end=True, on_token=kill)
        begun, other = caught.value.trajectories
        assert (begun.reason, other.reason, other.tokens) == ("lost", "lost", [])
        assert 1 <= len(begun.tokens) < 200
        count = f"{len(begun.tokens)} token{'s'[: len(begun.tokens) != 1]}"
        told = f"the connection to {python_server.url} broke off after {count}, and cannot be made again"
        assert str(caught.value).startswith(f"{told} (Connection refused): look at the server's log")
        assert str(caught.value).endswith("; 0 of 2 answers were whole by then")
        # Nothing came of an answer that is asked for now.
        with pytest.raises(UserError, match=r"no server answers at .* \(Connection refused\): start one"):
            list(session.stream(prompt, 5))


@pytest.fixture(scope="module")
def llama_server(gguf: Path) -> Iterator[str]:
    """Run llama-server with four slots; yield its URL."""
    program = shutil.which("llama-server")
    if program is None:
        pytest.skip("there is no llama-server on the PATH: build one from llama.cpp to run this")
    port = free_port()
    command = [program, "-m", str(gguf), "--port", str(port), "-c", "512", "-np", "4", "--kv-unified", "-t", "1"]
    command += ["-tb", "1", "--alias", "tiny", "--slots", "--no-warmup"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def test_llama_server(llama_server: str, gguf: Path) -> None:
    with open_model(llama_server) as session, llamacpp.open(gguf, threads=1) as local:
        assert isinstance(session, remote.RemoteSession)
        assert (session.kind, session.exact, session.context) == ("llama-server", True, 512)
        assert session.vocabulary == local.vocabulary
        prompt = session.chat_prompt("Is it?")
        assert prompt == local.chat_prompt("Is it?")
        text = "Is it so, or 4711?"
        assert session.tokenize(text) == local.tokenize(text)
        assert session.detokenize(local.tokenize(text)) == text
        wanted = local.sample(prompt, 1, new_tokens=24)[0]
        for one in session.sample(prompt, 3, new_tokens=24):
            known = [token for token in one.tokens if token >= 0]
            assert known == [token for token, mine in zip(wanted.tokens, one.tokens, strict=True) if mine >= 0]
            assert one.text == wanted.text
            both = [(a, b) for a, b in zip(one.logprobs, wanted.logprobs, strict=True) if not math.isnan(a)]
            np.testing.assert_allclose(*np.array(both).T, atol=0.05)
        assert session.work.calls == 1
        many = session.sample(prompt, 4, HOT, new_tokens=24, ignore_end=True)
        assert {(len(one.tokens), one.reason) for one in many} == {(24, "length")}
        assert len({one.text for one in many}) == 4
        # More than it has slots for in one request.
        assert len(session.sample(prompt, 6, HOT, new_tokens=8, ignore_end=True)) == 6
        seen = 0

        def drop(step: Step) -> range | None:
            nonlocal seen
            seen += 1
            return range(4) if seen == 12 else None

        dropped = session.sample(prompt, 4, HOT, new_tokens=400, ignore_end=True, on_token=drop)
        assert {one.reason for one in dropped} == {"dropped"}
        # The slots are free for somebody else at once.
        began = time.perf_counter()
        assert len(session.sample(prompt, 1, HOT, new_tokens=2, on_token=lambda step: None)[0].tokens) == 2
        assert time.perf_counter() - began < 5
        with pytest.raises(UserError, match="leaves no room in the context of 512"):
            session.sample([5] * 600, 1, new_tokens=4)
        full = session.sample([5] * 500, 1, HOT, new_tokens=50, ignore_end=True)[0]
        assert full.reason == "context"
        assert len(full.tokens) <= 12
