"""Named plans: llama.cpp's mixtures of the same names, by the facts of its ``llama_tensor_get_type``.

Attention values and the down projections of some layers get more bits than the rest, the output head more still. Which
layers these are is llama.cpp's rule: the first and the last eighth, and every third in between. Where rows are not
multiples of 256, ``plan.FALLBACKS`` counts.

https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp (read in 2026-11)
"""

from collections.abc import Callable

from qad.errors import unknown_name
from qad.plan import Rules

_HEAD = "q6_k"


def _more_bits(layer: int, layers: int) -> bool:
    """Return whether a layer is one of those that the M mixtures give more bits."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _mixture(grid: str, values: Callable[[int, int], str], downs: Callable[[int, int], str]) -> Callable[..., Rules]:
    def rules(layers: int, tied: bool) -> Rules:
        listed: list[tuple[str, str]] = []
        for layer in range(layers):
            if (chosen := values(layer, layers)) != grid:
                # The pattern takes a fused qkv_proj too, as llama.cpp does.
                listed.append((f"model.layers.{layer}.self_attn.*v_proj.weight", chosen))
            if (chosen := downs(layer, layers)) != grid:
                listed.append((f"model.layers.{layer}.mlp.down_proj.weight", chosen))
        # A tied embedding is the head; one of its own is rounded like the layers.
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return (*listed, (head, _HEAD), ("*", grid))

    return rules


def _medium(grid: str) -> Callable[..., Rules]:
    def choose(layer: int, layers: int) -> str:
        return "q6_k" if _more_bits(layer, layers) else grid

    return _mixture(grid, choose, choose)


def _uniform(grid: str) -> Callable[..., Rules]:
    return _mixture(grid, lambda layer, layers: grid, lambda layer, layers: grid)


NAMED: dict[str, Callable[..., Rules]] = {
    "q4_k_s": _mixture(
        "q4_k",
        lambda layer, layers: "q5_k" if layer < 4 else "q4_k",
        lambda layer, layers: "q5_k" if layer < layers // 8 else "q4_k",
    ),
    "q4_k_m": _medium("q4_k"),
    "q5_k_s": _uniform("q5_k"),
    "q5_k_m": _medium("q5_k"),
    "q6_k": _uniform("q6_k"),
}


def named_rules(name: str, layers: int, tied: bool) -> Rules:
    """Return the rules of a named plan.

    Args:
        name: One of ``NAMED``.
        layers: How many layers the model has.
        tied: Whether its head is its embedding.

    Raises:
        UserError: No such plan; the message lists those there are.
    """
    if name not in NAMED:
        raise unknown_name("plan", name, list(NAMED))
    return NAMED[name](layers, tied)
