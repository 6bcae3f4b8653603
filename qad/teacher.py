"""A teacher's top-k log-probabilities on disk, keyed by sample: training then needs no teacher forward passes.

    FOLDER/index.json              top-k, temperature 1, sample id -> shard and token range
    FOLDER/shard-00000.safetensors tokens [tokens, P] int32, log_probs [tokens, P] float16

Keyed by what the sample is (a hash of its tokens), not by when it came: a cache keyed by step is wrong as soon as the
data are shuffled. The mass of all other tokens is one bucket, ``losses.bucket_divergence``.

Shapes: B sequences, T tokens, P cached entries per token, V vocabulary.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qad.errors import UserError
from qad.files import replacing_file
from qad.measure import last_hidden, output_head

_INDEX = "index.json"
_SHARD_TOKENS = 65_536
_CHUNK_TOKENS = 256


class TeacherCache:
    """An opened cache.

    Args:
        folder: The cache's folder.

    Raises:
        UserError: Missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            index = json.loads((folder / _INDEX).read_text())
            self.top_k: int = index["top_k"]
            self.key: str = index["key"]
            self._samples: dict[str, list[int]] = dict(index["samples"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder} is no readable teacher cache ({error}); delete it to build it anew") from error
        self._shards: dict[int, Any] = {}

    def __contains__(self, sample_id: str) -> bool:
        """Return whether a sample is cached."""
        return sample_id in self._samples

    def _open(self, shard: int) -> Any:
        path = self._folder / f"shard-{shard:05d}.safetensors"
        try:
            return safe_open(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); delete the folder to build it anew") from error

    def lookup(self, sample_ids: list[str], counted_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Return tokens [C, P] (int64) and log-probabilities [C, P] (float32) at the counted positions.

        Args:
            sample_ids: The batch's samples.
            counted_BT: Which positions count.

        Raises:
            UserError: A sample is not in the cache or has another length there, or its shard is damaged.
        """
        tokens, log_probs = [], []
        for sample_id, counted_T in zip(sample_ids, counted_BT, strict=True):
            if sample_id not in self._samples:
                raise UserError(f"sample {sample_id} is not in {self._folder}; delete the folder to build it anew")
            shard, start, length = self._samples[sample_id]
            positions = counted_T.nonzero().flatten().cpu()
            if len(positions) and int(positions[-1]) >= length:
                raise UserError(f"sample {sample_id} in {self._folder} is shorter than the data's; delete the folder")
            file = self._shards.get(shard)
            if file is None:
                file = self._shards[shard] = self._open(shard)
            tokens.append(file.get_slice("tokens")[start : start + length][positions])
            log_probs.append(file.get_slice("log_probs")[start : start + length][positions])
        device = counted_BT.device
        return torch.cat(tokens).long().to(device), torch.cat(log_probs).float().to(device)


@torch.no_grad()
def build_cache(
    folder: Path,
    teacher: nn.Module,
    batches: Iterable[dict[str, Any]],
    *,
    top_k: int,
    key: str,
    vocabulary: int,
    on_progress: Callable[[int], None] = lambda samples: None,
) -> TeacherCache:
    """Run the teacher over batches and write its top-k; a cache that stands under the same key is reused.

    The index is written last, so that an interrupted build is never taken for a whole one.

    Args:
        folder: Where to write.
        teacher: The teacher.
        batches: ``input_ids``, ``attention_mask`` and the list ``sample_id``.
        top_k: Entries per token.
        key: What the cache depends on: teacher, data, settings.
        vocabulary: Leading entries shared with the student; the teacher's padding behind them is dropped.
        on_progress: Called with the number of samples done.
    """
    if (folder / _INDEX).exists():
        cache = TeacherCache(folder)
        if cache.key == key and cache.top_k == top_k:
            return cache
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _INDEX).unlink(missing_ok=True)
    head_VE = output_head(teacher)[:vocabulary]
    samples: dict[str, list[int]] = {}
    pending: list[tuple[Tensor, Tensor]] = []
    shard = filled = 0

    def flush() -> None:
        nonlocal shard, filled
        with replacing_file(folder / f"shard-{shard:05d}.safetensors") as path:
            tensors = {"tokens": torch.cat([t for t, _ in pending]), "log_probs": torch.cat([p for _, p in pending])}
            save_file(tensors, path)
        pending.clear()
        shard, filled = shard + 1, 0

    for batch in batches:
        hidden_BTE = last_hidden(teacher, batch)
        for sample_id, hidden_TE, mask_T in zip(batch["sample_id"], hidden_BTE, batch["attention_mask"], strict=True):
            if sample_id in samples:
                continue
            hidden_TE = hidden_TE[: int(mask_T.sum())]
            for part in hidden_TE.split(_CHUNK_TOKENS):
                top = F.linear(part, head_VE).float().log_softmax(dim=-1).topk(min(top_k, len(head_VE)))
                pending.append((top.indices.int().cpu(), top.values.half().cpu()))
            samples[sample_id] = [shard, filled, len(hidden_TE)]
            filled += len(hidden_TE)
            if filled >= _SHARD_TOKENS:
                flush()
        on_progress(len(samples))
    if pending:
        flush()
    with replacing_file(folder / _INDEX) as path:
        path.write_text(json.dumps({"top_k": top_k, "key": key, "samples": samples}))
    return TeacherCache(folder)
