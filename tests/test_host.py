"""The machine this runs on, measured for real: sane, merged, kept, and never slower with more."""

import dataclasses
import json
import time
from pathlib import Path

import psutil
import pytest
import torch

from qad import devices, host
from qad.roofline import bound, model_facts
from tests.helpers_models import make_artifact


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> host.Measurement:
    """One measurement for the tests of this file."""
    return host.measure()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of each test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "qad"


def test_what_is_measured_is_plausible(measured: host.Measurement) -> None:
    """Against what a second method reaches here: a copy, and a product in float32, one thread each."""
    source, target = torch.ones(1 << 25), torch.empty(1 << 25)
    target.copy_(source)
    began = time.thread_time()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    target.copy_(source)
    torch.set_num_threads(threads)
    copied = 2 * source.numel() * 4 / (time.thread_time() - began)
    beyond = measured.curves["1"][-1][1]
    assert copied / 4 < beyond < copied * 8
    assert measured.curves["1"][-1][0] == measured.buffer_bytes >= 2**22
    for points in measured.curves.values():
        assert all(1e8 < rate < 1e13 for _, rate in points)
    assert 1e8 < measured.rates["fp32_1"] < 1e14
    assert measured.seconds < 60
    assert torch.get_num_threads() == threads


def test_the_host_is_a_board(measured: host.Measurement, cache: Path, tmp_path: Path) -> None:
    host._keep(measured)
    board = devices.load("host")
    assert board.cores == measured.machine["cores"] <= (psutil.cpu_count() or 1)
    assert 0 < board.usable_bytes <= board.memory_bytes <= psutil.virtual_memory().total
    assert set(board.facts) >= set(devices.REQUIRED)
    assert set(board.facts) <= set(devices.REQUIRED | devices.OPTIONAL)
    if not measured.gpu:
        assert board.engine().name == "cpu"
        # The board keeps it in GB/s: to bytes and back may cost the last bit.
        assert board.bandwidth == pytest.approx(board.read_rate(1 << 40), rel=1e-15)
        for threads in (1, None):
            rates = [board.read_rate(1 << power, threads) for power in range(10, 34)]
            assert rates == sorted(rates, reverse=True)
            assert board.read_rate(1 << 24, 1) <= board.read_rate(1 << 24)
    facts = model_facts(make_artifact(tmp_path / "run", "llama-tied").folder)
    assert bound(board, facts, 8, 64, threads=1) > bound(board, facts, 1, 64, threads=1) > 0


def test_a_measurement_is_kept_and_told(measured: host.Measurement, cache: Path) -> None:
    assert host.kept() is None
    old = dataclasses.replace(measured, when=time.time() - 7200)
    host._keep(old)
    assert host.kept() == old
    assert host.measurement() == old
    assert "measured 2 hours ago" in host.host().facts["cpu_int8_tops"].source
    (file,) = cache.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 0}))
    assert host.kept() is None
    file.write_text("{")
    assert host.kept() is None


def test_another_machine_measures_anew(
    measured: host.Measurement, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host._keep(measured)
    monkeypatch.setattr(host.platform, "node", lambda: "another")
    assert host.kept() is None


def test_the_better_of_two_measurements_counts(measured: host.Measurement) -> None:
    slow = dataclasses.replace(
        measured,
        when=1.0,
        rates={name: rate / 2 for name, rate in measured.rates.items()} | {"int8_1": 9e18},
        curves={threads: [[size, rate / 2] for size, rate in points] for threads, points in measured.curves.items()},
    )
    both = host.merge(slow, measured)
    assert both.curves == measured.curves
    assert both.rates == measured.rates | {"int8_1": 9e18}
    assert (both.times, both.when) == (2, measured.when)
    assert host.merge(measured, slow).curves == measured.curves


def test_without_a_place_to_keep_it(
    measured: host.Measurement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    host._keep(measured)
    assert host.kept() is None


def test_ages() -> None:
    now = time.time()
    assert [host.age(now - seconds) for seconds in (0, 60, 600, 7200, 86400 * 3)] == [
        "just now",
        "60 seconds ago",
        "10 minutes ago",
        "2 hours ago",
        "3 days ago",
    ]
