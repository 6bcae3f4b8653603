"""A mapped safetensors file: the library's tensors, and the memory of those that are in use."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qad.errors import UserError
from qad.tensor_file import TensorFile

_STATUS = Path("/proc/self/status")


def test_the_library_s_tensors(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "codes": torch.randint(-128, 128, (3, 5), generator=generator).to(torch.int8),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "half": torch.randn(2, 3, 4, generator=generator).half(),
        "whole": torch.randn(11, generator=generator),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert file.entries.keys() == tensors.keys()
    for name, expected in load_file(tmp_path / "a.safetensors").items():
        assert file.entries[name].shape == tuple(expected.shape)
        torch.testing.assert_close(file.tensor(name), expected, rtol=0, atol=0)


def test_an_unaligned_tensor(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} '
    assert (8 + len(header)) % 4
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert TensorFile(tmp_path / "a.safetensors").tensor("a").tolist() == [1.5, -2.0]


@pytest.mark.skipif(not _STATUS.exists(), reason="needs Linux's /proc to see the memory of files")
def test_memory_is_that_of_what_is_in_use(tmp_path: Path) -> None:
    def resident() -> int:
        (line,) = (line for line in _STATUS.read_text().splitlines() if line.startswith("RssFile"))
        return int(line.split()[1]) * 1024

    size = 8 << 20
    save_file({f"t{n}": torch.full((size,), n, dtype=torch.int8) for n in range(8)}, tmp_path / "a.safetensors")
    file = TensorFile(tmp_path / "a.safetensors")
    before, peak, first = resident(), 0, file.tensor("t0")
    for n in range(8):
        file.give_back()
        assert int(file.tensor(f"t{n}").sum()) == n * size
        peak = max(peak, resident() - before)
    assert size * 0.9 < peak < 2 * size
    assert int(first.max()) == 0  # given back long ago, and read again


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"\x02\0\0\0\0\0\0\0[]", b"\x02\0\0\0\0\0\0\0{}x"])
def test_damaged(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="a.safetensors is missing, truncated or damaged"):
        TensorFile(tmp_path / "a.safetensors")
