"""Seeded damage to small files, and what readers make of it; run as a program by ``test_fuzz_inputs``.

    python -m tests.helpers_fuzz TARGET FOLDER CASES

reads FOLDER, whose files are whole, and prints one JSON line: how many cases were read, how many refused, and those
that ended as neither. Memory is limited to what the libraries have mapped and a gigabyte; a case has a minute.
"""

import json
import random
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

EXTRA_MEMORY = 1 << 30
SECONDS = 60  # of which a case takes some thousandths; a shared machine may stall
_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    8,
    31,
    127,
    255,
    2**15,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
)
_VALUES: tuple[Any, ...] = (
    *_NUMBERS, -1, -(2**63), 10**30, 1e300, float("nan"), float("inf"), "", "x", "F32", "I8", "BF16", "\x00", "é" * 50,
    None, True, [], {}, [[[[]]]], [-1, 4], [2**62, 2**62], [2**32, 2**32], [0], [3, -5], "a" * 10_000,
)  # fmt: skip


def damage_bytes(data: bytes, random_: random.Random, header: int) -> bytes:
    """Return bytes with one to three kinds of damage, most of it within the header."""
    out = bytearray(data)
    for _ in range(random_.randint(1, 3)):
        size = max(1, len(out))
        place = random_.randrange(min(size, header) if random_.random() < 0.85 else size)
        kind = random_.randrange(7)
        if kind == 0:
            del out[place:]
        elif kind == 1 and place < len(out):
            out[place] ^= 1 << random_.randrange(8)
        elif kind == 2:
            out[place : place + 8] = struct.pack("<Q", random_.choice(_NUMBERS))
        elif kind == 3:
            out[place : place + 4] = struct.pack("<I", random_.choice(_NUMBERS) & 0xFFFFFFFF)
        elif kind == 4:  # splice: a part again somewhere else, which also repeats names
            source = random_.randrange(size)
            part = bytes(out[source : source + random_.randint(1, 64)])
            out[place:place] = part
        elif kind == 5:
            del out[place : place + random_.randint(1, 16)]
        else:
            out[place : place + 4] = bytes(random_.randrange(256) for _ in range(4))
    return bytes(out)


def damage_json(found: Any, random_: random.Random) -> Any:
    """Return a JSON value with one part replaced, removed, renamed or nested."""
    if isinstance(found, dict) and found and random_.random() < 0.9:
        key = random_.choice(list(found))
        kind = random_.randrange(8)
        if kind == 0:
            return {name: value for name, value in found.items() if name != key}
        if kind == 1:
            return {(f"{name}x" if name == key else name): value for name, value in found.items()}
        return found | {key: damage_json(found[key], random_)}
    if isinstance(found, list) and found and random_.random() < 0.8:
        place = random_.randrange(len(found))
        return [*found[:place], damage_json(found[place], random_), *found[place + 1 :]]
    return random_.choice(_VALUES)


def _damaged_text(text: bytes, random_: random.Random) -> bytes:
    kind = random_.random()
    if kind < 0.7:
        return json.dumps(damage_json(json.loads(text), random_)).encode()
    if kind < 0.75:
        depth = random_.choice((500, 5_000, 200_000))
        return b'{"a":' * depth + b"1" + b"}" * depth
    if kind < 0.8:  # the same name twice
        return b'{"format": 1, "a": [2], ' + text.lstrip()[1:]
    return damage_bytes(text, random_, len(text))


def _damaged_safetensors(data: bytes, random_: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if random_.random() < 0.4:
        return damage_bytes(data, random_, 8 + length)
    header = _damaged_text(data[8 : 8 + length], random_)
    stated = len(header) if random_.random() < 0.9 else random_.choice(_NUMBERS)
    return struct.pack("<Q", stated) + header + data[8 + length :]


def damage(file: Path, random_: random.Random) -> None:
    """Damage a file in place, as its kind asks for."""
    data = file.read_bytes()
    if file.suffix == ".json":
        data = _damaged_text(data, random_)
    elif file.suffix == ".safetensors":
        data = _damaged_safetensors(data, random_)
    else:
        data = damage_bytes(data, random_, 2_000 if random_.random() < 0.3 else len(data))
    file.write_bytes(data)


def _decode_all(weights: Any) -> None:
    for name in weights:
        weights[name]


def _read_gguf(folder: Path) -> None:
    from qad.export import get
    from qad.gguf_check import read_header
    from qad.gguf_load import read_config

    file = folder / "model.gguf"
    read_config(read_header(file))
    get("gguf").run_hash(file)
    _decode_all(get("gguf").read(file))


def _read_artifact(folder: Path) -> None:
    from qad.artifact import open_artifact

    artifact = open_artifact(folder)
    for name in (*artifact.grids, *artifact.kept):
        artifact.shape(name)
        artifact.weight(name)


def _read_folder(kind: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from qad.export import get

        get(kind).run_hash(folder)
        _decode_all(get(kind).read(folder))

    return read


def _read_model(folder: Path) -> None:
    from qad.model import load_model

    load_model(str(folder))


# Target -> what reads it, and the files that are damaged.
TARGETS: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "gguf": (_read_gguf, ("model.gguf",)),
    "artifact": (_read_artifact, ("weights.safetensors", "weights.safetensors", "artifact.json")),
    "gptq": (_read_folder("gptq"), ("model.safetensors", "model.safetensors", "quantize_config.json", "config.json")),
    "onnx": (_read_folder("onnx"), ("model.onnx",)),
    "model": (_read_model, ("model.safetensors",)),
}


def _time_is_up(_signal: int, _frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main(target: str, folder: Path, cases: int) -> None:
    """Damage a copy of a folder again and again, and read it."""
    from qad.errors import UserError

    read, files = TARGETS[target]
    work = folder.with_name(folder.name + "-damaged")
    shutil.copytree(folder, work)
    whole = {name: (folder / name).read_bytes() for name in files}
    read(work)  # what is whole is read, and libraries are loaded before memory is limited
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + EXTRA_MEMORY, mapped + EXTRA_MEMORY))
    signal.signal(signal.SIGALRM, _time_is_up)
    outcome: dict[str, Any] = {"read": 0, "refused": 0, "wrong": []}
    for case in range(cases):
        random_ = random.Random(f"{target} {case}")
        name = random_.choice(files)
        (work / name).write_bytes(whole[name])
        damage(work / name, random_)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            read(work)
            outcome["read"] += 1
        except UserError:
            outcome["refused"] += 1
        except BaseException as error:  # whatever is neither: the finding
            frame = error.__traceback__
            while frame is not None and frame.tb_next is not None:
                frame = frame.tb_next
            where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}" if frame else ""
            outcome["wrong"].append(f"case {case} ({name}): {type(error).__name__} {str(error)[:200]} at {where}")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            (work / name).write_bytes(whole[name])
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
