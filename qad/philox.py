"""Counter-based random numbers: Philox4x32 in plain torch, the same bits on every device and for every kernel.

A noise value depends on (seed, tensor, step, element) alone: not on the order in which tensors are visited, nor on
threads, nor on how often a step was resumed. One call gives 128 bits; an element takes 16 of them, which resolves a
rounding probability to 1.5e-5, far below the gradient noise, at half the arithmetic of 32 bits.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Seven rounds are the fewest
that pass BigCrush there; what is given up against the customary ten is safety margin, which noise in training does not
need.
"""

import torch
from torch import Tensor

ROUNDS = 7
ELEMENTS_PER_CALL = 8
_CHUNK_CALLS = 1 << 15  # int64 temporaries of 256 KiB: they stay in a core's second-level cache
_MASK = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


def philox4x32(counter: tuple[Tensor, int, int, int], key: tuple[int, int], rounds: int = ROUNDS) -> list[Tensor]:
    """Return the four 32-bit words of each call as int64 tensors.

    Args:
        counter: Four 32-bit words; the first is an int64 tensor of call indices.
        key: Two 32-bit words.
        rounds: Rounds of the bijection.
    """
    first = counter[0]
    c0, c1, c2, c3 = (first, *(torch.full_like(first, word & _MASK) for word in counter[1:]))
    k0, k1 = key[0] & _MASK, key[1] & _MASK
    for _ in range(rounds):
        # A 32 x 32 bit product may wrap into the sign bit of int64; masking after the shift restores the high word.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        high_0, low_0 = (product_0 >> 32) & _MASK, product_0 & _MASK
        high_1, low_1 = (product_1 >> 32) & _MASK, product_1 & _MASK
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return [c0, c1, c2, c3]


def uniform16(
    count: int, *, seed: int, tensor: int, step: int, stream: int = 0, device: torch.device | None = None
) -> Tensor:
    """Return ``count`` float32 values (r + 0.5) / 65536 in (0, 1), r a 16-bit random number.

    Element e takes bits 16 * (e % 2) of word (e % 8) // 2 of call e // 8.

    Args:
        count: Number of elements.
        seed: Run seed, 64 bits (the key).
        tensor, step, stream: 32-bit counter words: which tensor, which optimizer step, which use within the step.
        device: Where to compute.
    """
    calls = -(-count // ELEMENTS_PER_CALL)
    out = torch.empty(calls, ELEMENTS_PER_CALL, dtype=torch.float32, device=device)
    for start in range(0, calls, _CHUNK_CALLS):
        index = torch.arange(start, min(start + _CHUNK_CALLS, calls), dtype=torch.int64, device=device)
        words = philox4x32((index, tensor, step, stream), (seed, seed >> 32))
        chunk = out[start : start + _CHUNK_CALLS]
        for position, word in enumerate(words):
            chunk[:, 2 * position] = word & 0xFFFF
            chunk[:, 2 * position + 1] = word >> 16
    return out.view(-1)[:count].add_(0.5).mul_(2.0**-16)
