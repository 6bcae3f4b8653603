"""Writing whole or not at all: exceptions, a full disk, a missing permission and SIGKILL at any moment."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from qad import files
from qad.errors import UserError
from qad.files import begin_flush, check_output, recover_folder, replacing_file, replacing_folder, sha256_of_file


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------------------- one file


def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "model.gguf"
    with replacing_file(target) as temporary:
        temporary.write_bytes(b"one")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_bytes() == b"one"
    with replacing_file(target) as temporary:
        temporary.write_bytes(b"two")
        assert target.read_bytes() == b"one"
    assert target.read_bytes() == b"two"
    assert names(target.parent) == ["model.gguf"]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with replacing_file(tmp_path / "safe") as temporary:
        temporary.write_text("")
    assert (tmp_path / "safe").stat().st_mode == plain.stat().st_mode


def test_a_new_folder_and_all_in_it_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").write_text("")
    with replacing_folder(tmp_path / "safe") as temporary:
        (temporary / "deep").mkdir(mode=0o700)
        (temporary / "deep" / "private").touch(mode=0o600)
    for path, like in (("safe", "plain"), ("safe/deep", "plain"), ("safe/deep/private", "plain/file")):
        assert (tmp_path / path).stat().st_mode == (tmp_path / like).stat().st_mode, path


def test_a_place_that_takes_no_file_is_told_before_the_work(tmp_path: Path) -> None:
    check_output(tmp_path / "out.json", "--json")
    (tmp_path / "old.json").write_text("old")
    check_output(tmp_path / "old.json", "--json")
    assert names(tmp_path) == ["old.json"]
    os.mkfifo(tmp_path / "pipe")
    places = [(tmp_path, "is a folder"), (tmp_path / "pipe", "is a device or a pipe")]
    places.append((tmp_path / "old.json" / "out.json", "old.json is no folder: make it"))
    places.append((tmp_path / "deep" / "er" / "out.json", "deep/er is no folder: make it"))
    if Path("/proc/self").exists():
        places.append((Path("/proc/out.json"), "/proc: "))
    for place, reason in places:
        with pytest.raises(UserError, match=f"{reason}.* with --json"):
            check_output(place, "--json")
    assert (tmp_path / "old.json").read_text() == "old"


def test_devices_and_pipes_are_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="pipe is a device or a pipe: name a file"), replacing_file(pipe):
        pass
    assert pipe.is_fifo()
    assert names(tmp_path) == ["pipe"]


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="there is no /proc here")
def test_a_folder_that_takes_no_files() -> None:
    with pytest.raises(UserError, match="choose another output"), replacing_file(Path("/proc/model.gguf")):
        pass
    with pytest.raises(UserError, match="choose another output"), replacing_folder(Path("/proc/artifact")):
        pass


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_previous_file_survives_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model.gguf"
    target.write_bytes(b"one")

    def fail() -> None:
        with replacing_file(target) as temporary:
            temporary.write_bytes(b"two, half wri")
            raise error

    with pytest.raises(error):
        fail()
    assert target.read_bytes() == b"one"
    assert names(tmp_path) == ["model.gguf"]


def test_the_previous_file_survives_a_full_disk(small_disk: Path) -> None:
    target = small_disk / "model.gguf"
    target.write_bytes(b"one")

    def fill() -> None:
        with replacing_file(target) as temporary:
            temporary.write_bytes(bytes(1 << 20))

    with pytest.raises(UserError, match=r"disk is full while writing .*model\.gguf.*untouched"):
        fill()
    assert target.read_bytes() == b"one"
    assert names(small_disk) == ["model.gguf"]


def test_a_place_without_permission(small_disk: Path) -> None:
    # A read-only file system stops even root, whom permissions do not.
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match="no permission to write .* -o"), replacing_file(small_disk / "model.gguf"):
        pass
    with pytest.raises(UserError, match="no permission to write .* -o"), replacing_folder(small_disk / "artifact"):
        pass


# ---------------------------------------------------------------------------------------------------- a folder


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "run" / "artifact"
    with replacing_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "a").write_text("1")
        assert not target.exists()
    with replacing_folder(target) as temporary:
        (temporary / "b").write_text("2")
        assert (target / "sub" / "a").read_text() == "1"
    assert names(target) == ["b"]
    assert names(target.parent) == ["artifact"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_previous_folder_survives_an_exception(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "artifact"
    target.mkdir()
    (target / "a").write_text("1")

    def fail() -> None:
        with replacing_folder(target) as temporary:
            (temporary / "b").write_text("2")
            raise error

    with pytest.raises(error):
        fail()
    assert names(target) == ["a"]
    assert names(tmp_path) == ["artifact"]


def test_the_previous_folder_survives_a_full_disk(small_disk: Path) -> None:
    target = small_disk / "artifact"
    target.mkdir()
    (target / "a").write_text("1")

    def fill() -> None:
        with replacing_folder(target) as temporary:
            (temporary / "b").write_bytes(bytes(1 << 20))

    with pytest.raises(UserError, match="disk is full"):
        fill()
    assert (target / "a").read_text() == "1"
    assert names(small_disk) == ["artifact"]


@pytest.mark.parametrize("place", ["elsewhere", "not/there/yet"])
def test_a_link_to_a_folder_stays_one(tmp_path: Path, place: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "artifact"
    link.symlink_to(place)
    for version in "12":
        with replacing_folder(link) as temporary:
            (temporary / version).touch()
        assert link.is_symlink()
        assert names(tmp_path / place) == [version]
    assert names(tmp_path) == sorted({"artifact", "elsewhere", place.split("/")[0]})
    assert names((tmp_path / place).parent) == sorted({"artifact", "elsewhere"} if place == "elsewhere" else {"yet"})


def test_a_crash_behind_a_link_is_undone(tmp_path: Path) -> None:
    (tmp_path / "disk" / ".real.previous").mkdir(parents=True)
    (tmp_path / "artifact").symlink_to("disk/real")
    recover_folder(tmp_path / "artifact")
    assert names(tmp_path / "disk") == ["real"]


REPLACING = pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
Replacing = Callable[[Path], AbstractContextManager[Path]]


def write(place: Path, text: str) -> None:
    (place / "part" if place.is_dir() else place).write_text(text)


def read(place: Path) -> str:
    return (place / "part" if place.is_dir() else place).read_text()


@REPLACING
def test_a_second_writer_is_refused_while_the_first_writes(
    tmp_path: Path, replacing: Replacing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_PATIENCE", 0.1)
    target = tmp_path / "model"
    with replacing(target) as temporary:
        write(temporary, "one")
        with (
            pytest.raises(UserError, match="model is being written by another process: wait until it has ended, or"),
            replacing(target) as another,
        ):
            write(another, "two")
        # Others may be written beside it, also one that begins with its name.
        with replacing(tmp_path / "model.2") as other:
            write(other, "2")
        recover_folder(target)
        assert temporary.exists()
    assert read(target) == "one"
    assert names(tmp_path) == ["model", "model.2"]
    with replacing(target) as temporary:
        write(temporary, "two")
    assert read(target) == "two"


@REPLACING
def test_relative_paths(tmp_path: Path, replacing: Replacing, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (Path("model"), Path("runs/mine/model"), Path("../model.2")):
        with replacing(target) as temporary:
            write(temporary, "one")
        assert read(target) == "one"


@REPLACING
def test_a_second_writer_waits_for_one_that_takes_a_moment(tmp_path: Path, replacing: Replacing) -> None:
    target = tmp_path / "record"
    began, done = threading.Event(), []

    def first() -> None:
        with replacing(target) as temporary:
            write(temporary, "one")
            began.set()
            time.sleep(0.2)
            done.append("one")

    thread = threading.Thread(target=first)
    thread.start()
    began.wait(10)
    with replacing(target) as temporary:
        assert done == ["one"]
        write(temporary, "two")
    thread.join()
    assert read(target) == "two"
    assert names(tmp_path) == ["record"]


@REPLACING
def test_writers_that_begin_at_once_do_not_disturb_each_other(tmp_path: Path, replacing: Replacing) -> None:
    target = tmp_path / "record"
    told: list[str] = []

    def one(text: str) -> None:
        try:
            for _ in range(8):
                with replacing(target) as temporary:
                    write(temporary, text)
                    assert read(temporary) == text
        except BaseException as error:
            told.append(repr(error))

    threads = [threading.Thread(target=one, args=(text * 100,)) for text in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told == []
    assert read(target) in [text * 100 for text in "abc"]
    assert names(tmp_path) == ["record"]


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks on Windows")
@REPLACING
def test_what_a_killed_writer_left_stops_nobody(tmp_path: Path, replacing: Replacing) -> None:
    target = tmp_path / "model"
    program = f"""
import time
from pathlib import Path
from qad.files import {replacing.__name__} as replacing
with replacing(Path({str(target)!r})) as temporary:
    print("begun", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        assert len(names(tmp_path)) == 1
        process.kill()
    assert len(names(tmp_path)) == 1
    with replacing(target) as temporary:
        write(temporary, "mine")
    assert names(tmp_path) == ["model"]


@REPLACING
def test_a_temporary_that_somebody_deletes_is_told(tmp_path: Path, replacing: Replacing) -> None:
    # As where a file system has no locks, and another writer takes it for what a killed one left.
    with (
        pytest.raises(UserError, match="model is being written by another process too.*name another place"),
        replacing(tmp_path / "model") as temporary,
    ):
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()
    assert names(tmp_path) == []


def test_a_crash_between_the_two_renames_is_undone(tmp_path: Path) -> None:
    target, previous = tmp_path / "artifact", tmp_path / ".artifact.previous"
    previous.mkdir()
    (previous / "a").write_text("1")
    (tmp_path / ".artifact.x1y2z3w4.tmp").mkdir()
    recover_folder(target)
    assert names(tmp_path) == ["artifact"]
    assert (target / "a").read_text() == "1"


def test_a_crash_after_the_second_rename_is_completed(tmp_path: Path) -> None:
    target, previous = tmp_path / "artifact", tmp_path / ".artifact.previous"
    for folder, text in ((previous, "1"), (target, "2")):
        folder.mkdir()
        (folder / "a").write_text(text)
    recover_folder(target)
    assert names(tmp_path) == ["artifact"]
    assert (target / "a").read_text() == "2"


_WRITER = """
import itertools, sys
from pathlib import Path
from qad.files import replacing_file, replacing_folder
place = Path(sys.argv[1])
for version in itertools.count(int(sys.argv[2])):
    with replacing_folder(place / "artifact") as folder:
        for part in range(8):
            (folder / str(part)).write_text(str(version) * 1000)
    with replacing_file(place / "model.gguf") as file:
        file.write_text(str(version) * 100_000)
    print(version, flush=True)
"""


def test_sigkill_at_any_moment_leaves_one_whole_version(tmp_path: Path) -> None:
    target = tmp_path / "artifact"
    moments = random.Random(1)
    version = 0
    for _ in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path), str(version)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        version = int(writer.stdout.readline())
        time.sleep(moments.uniform(0, 0.02))
        writer.send_signal(signal.SIGKILL)
        version = max([version, *map(int, writer.stdout.read().split())])
        writer.wait()
        recover_folder(target)
        assert names(target) == [str(part) for part in range(8)]
        parts = {(target / str(part)).read_text() for part in range(8)}
        # The version reported last, or the one that was just being finished.
        assert parts in ({str(version) * 1000}, {str(version + 1) * 1000})
        assert (tmp_path / "model.gguf").read_text() in (str(version) * 100_000, str(version + 1) * 100_000)
        version += 2
    assert [name for name in names(tmp_path) if name.startswith(".artifact")] == []


def test_sha256_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_flush_that_begins_early_changes_nothing(tmp_path: Path) -> None:
    parts = [bytes([number]) * size for number, size in enumerate((3, 5 << 20, 4 << 20, 100, 9 << 20, 7))]
    begun = [0]
    with (tmp_path / "grown").open("wb") as file:
        for part in parts:
            file.write(part)
            begun.append(begin_flush(file, begun[-1]))
    # Told as soon as 8 MB have come together, those still in Python's buffer included.
    ends = [0, 0, 9 << 20, 9 << 20, 18 << 20, 18 << 20] if hasattr(os, "posix_fadvise") else [0] * 6
    small = [0, 0, 3, 3, 103, 103]
    assert begun[1:] == [end and end + extra for end, extra in zip(ends, small, strict=True)]
    assert (tmp_path / "grown").read_bytes() == b"".join(parts)


@pytest.mark.parametrize("replacing", [replacing_file, replacing_folder])
def test_an_interrupt_before_the_temporary_has_a_name_leaves_nothing(
    replacing: Callable[[Path], AbstractContextManager[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def interrupted(path: Path, wait: bool = False) -> AbstractContextManager[None]:
        if not wait:
            return locked(path)
        made.append(path)
        raise KeyboardInterrupt

    locked = files.locked
    monkeypatch.setattr(files, "locked", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out"):
        pass
    assert len(made) == 1
    assert list(tmp_path.iterdir()) == []
