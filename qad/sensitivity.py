"""What rounding each tensor to each grid costs: the expected KL to the unrounded model, in nats per token.

To second order, an error D [N, K] of a linear layer costs 1/2 E[(g^T D x)^2], where x is the layer's input and g the
gradient by its output of log p(y), y drawn from the model itself: the Fisher information, here factored into that of
inputs and that of outputs as in K-FAC (Martens and Grosse, arXiv 1503.05671). Rounding errors of different rows are
uncorrelated, which leaves the diagonal of E[g g^T]. Within a row, rounding to nearest pays (D A D^T) with A = E[x x^T];
rounding with compensation pays, for the error of input i, one over the square of that input's entry in the Cholesky
factor of A's inverse (GPTQ, arXiv 2210.17323), so that no matrix need be rounded that way to know.

Embedding and head, of which there are one or two, are measured: rounded, and the KL taken.

What is given up: the interaction of errors, correlations of gradients across tokens, all but a sample of the rows.

Shapes: B sequences, T tokens, N output features, K input features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qad.grid import get_grid
from qad.measure import measure, shifted_labels
from qad.plan import model_weights
from qad.rounding import damped, inverse_factor, round_without_hessian
from qad.tensor import dequantize

Costs = dict[str, dict[str, float]]
Progress = Callable[[int, int], None]

_BATCH_TOKENS = 1024
_INPUT_TOKENS, _GRADIENT_TOKENS, _END_TOKENS = 8192, 4096, 2048
_MOMENT_BYTES = 1 << 30  # second moments held at a time
_ROWS = 128  # rows of a matrix that are rounded for its estimate
_DAMPING = 0.01


def measure_costs(
    model: nn.Module,
    candidates: Mapping[str, Sequence[str]],
    calibration_BT: Tensor,
    *,
    mode: str,
    seed: int = 0,
    on_progress: Progress = lambda done, total: None,
) -> Costs:
    """Return for each tensor what each of its grids costs.

    Args:
        model: A causal language model in float32; unchanged afterwards.
        candidates: Name of each weight -> names of the grids to judge for it.
        calibration_BT: Token ids, all sequences of one length.
        mode: How the tensors will be rounded: ``rtn``, ``mse`` or ``gptq``.
        seed: Of the labels that are drawn.
        on_progress: Called with (steps done, steps in total).
    """
    modules = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    weights = model_weights(model)
    ends = [name for name in candidates if (weight := weights[name]) is not None and weight.is_end]
    linears = {name: modules[name] for name in candidates if name not in ends}
    groups = list(_groups(linears))
    gradients, inputs, texts = (
        _batches(calibration_BT, tokens) for tokens in (_GRADIENT_TOKENS, _INPUT_TOKENS, _END_TOKENS)
    )
    total = len(gradients) + len(groups) * len(inputs) + sum(map(len, candidates.values()))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    on_progress(0, total)
    costs: Costs = {name: {} for name in candidates}
    energy = _gradient_energy(model, linears, gradients, seed, tick)
    for group in groups:
        importances = _importances(model, group, inputs, mode == "gptq", tick)
        for name, module in group.items():
            moment = importances.pop(name)
            for grid in candidates[name]:
                costs[name][grid] = _expected(module.weight.data, energy[name], moment, grid, mode)
                tick()
    for name in ends:
        for grid, cost in _measured(model, name, candidates[name], texts, mode):
            costs[name][grid] = cost
            tick()
    return costs


def _batches(tokens_BT: Tensor, count: int) -> Sequence[Tensor]:
    """Return batches of the first sequences, of about ``count`` tokens."""
    length = tokens_BT.shape[1]
    return tokens_BT[: max(1, count // length)].split(max(1, _BATCH_TOKENS // length))


def _tokens(batches: Sequence[Tensor]) -> int:
    return sum(part.numel() for part in batches)


def _method(mode: str) -> str:
    """Return how a tensor is rounded without compensation; ``gptq`` does so where it has nothing to compensate."""
    return "rtn" if mode == "rtn" else "mse"


@contextmanager
def _hooked(hooks: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _gradient_energy(
    model: nn.Module, linears: Mapping[str, nn.Linear], batches: Sequence[Tensor], seed: int, tick: Callable[[], None]
) -> dict[str, Tensor]:
    """Return for each layer the mean over tokens of g^2 [N], g by its output of log p(y), y drawn from the model."""
    energy = {name: torch.zeros(module.out_features) for name, module in linears.items()}

    def keep(name: str, grad: Tensor) -> None:
        energy[name] += grad.detach().reshape(-1, grad.shape[-1]).square().sum(dim=0)

    def watch(_: nn.Module, __: Any, output: Tensor, name: str) -> None:
        output.register_hook(partial(keep, name))

    def need_gradient(_: nn.Module, __: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    generator = torch.Generator().manual_seed(seed)
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    hooks = [module.register_forward_hook(partial(watch, name=name)) for name, module in linears.items()]
    hooks.append(embedding.register_forward_hook(need_gradient))
    model.requires_grad_(False)  # gradients of activations only
    try:
        with _hooked(hooks), torch.enable_grad():
            for batch_BT in batches:
                logits = model(input_ids=batch_BT, use_cache=False).logits.flatten(0, 1).float()
                drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator).squeeze(-1)
                F.cross_entropy(logits, drawn, reduction="sum").backward()
                tick()
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    return {name: total / _tokens(batches) for name, total in energy.items()}


def _groups(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """Yield the layers in groups whose second moments fit into memory together, in order."""
    group: dict[str, nn.Linear] = {}
    size = 0
    for name, module in linears.items():
        needed = 4 * module.in_features**2
        if group and size + needed > _MOMENT_BYTES:
            yield group
            group, size = {}, 0
        group[name] = module
        size += needed
    if group:
        yield group


@torch.no_grad()
def _importances(
    model: nn.Module,
    group: Mapping[str, nn.Linear],
    batches: Sequence[Tensor],
    compensated: bool,
    tick: Callable[[], None],
) -> dict[str, Tensor]:
    """Return for each layer what squared errors cost: [K] by input if compensated, else the second moments [K, K].

    Layers that read the same tensor share one result.
    """
    moments: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    seen: list[tuple[Tensor, str]] = []

    def gather(_: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
        given = args[0]
        first = next((other for tensor, other in seen if tensor is given), None)
        if first is not None:
            owner[name] = first
            return
        seen.append((given, name))
        owner[name] = name
        x_TK = given.reshape(-1, given.shape[-1])
        if name not in moments:
            moments[name] = x_TK.new_zeros(x_TK.shape[1], x_TK.shape[1])
        moments[name].addmm_(x_TK.t(), x_TK)

    with _hooked([module.register_forward_pre_hook(partial(gather, name=name)) for name, module in group.items()]):
        for batch_BT in batches:
            model.base_model(input_ids=batch_BT, use_cache=False)  # type: ignore[operator,union-attr]
            seen.clear()
            tick()
    for moment in moments.values():
        moment.div_(_tokens(batches))
    if compensated:
        moments = {
            name: inverse_factor(damped(moment, _DAMPING)).diagonal().reciprocal().square()
            for name, moment in moments.items()
        }
    return {name: moments[owner[name]] for name in group}


def _expected(weight_NK: Tensor, energy_N: Tensor, moment: Tensor, grid: str, mode: str) -> float:
    """Return 1/2 sum_n E[g_n^2] (error of row n), from evenly spread rows."""
    count = min(_ROWS, weight_NK.shape[0])
    rows = torch.linspace(0, weight_NK.shape[0] - 1, count).round().long()
    sample_NK = weight_NK[rows]
    rounded = round_without_hessian(sample_NK, get_grid(grid), _method(mode), "the weight")
    error_NK = dequantize(rounded.quantized).sub_(sample_NK)
    by_row_N = error_NK.square() @ moment if moment.ndim == 1 else (error_NK @ moment * error_NK).sum(dim=1)
    # The rows left out are taken to have the errors of the others, with the energy of their own.
    share = float(energy_N[rows] @ by_row_N) / max(float(energy_N[rows].sum()), 1e-30)
    return 0.5 * share * float(energy_N.sum())


def _measured(
    model: nn.Module, name: str, grids: Sequence[str], parts: Sequence[Tensor], mode: str
) -> Iterator[tuple[str, float]]:
    """Yield the KL of the model with one tensor rounded, for each grid."""
    parameter = dict(model.named_parameters())[name]
    exact = parameter.data
    batches = [
        {
            "input_ids": part,
            "attention_mask": torch.ones_like(part),
            "labels": shifted_labels(part, torch.ones_like(part)),
        }
        for part in parts
    ]
    # The first measurement leaves the exact model's hidden states in the batches.
    measure(model, model, batches)
    teacher = _HeadOnly(model.get_output_embeddings().weight.data)  # type: ignore[operator,union-attr]
    for grid in grids:
        rounded = round_without_hessian(exact, get_grid(grid), _method(mode), name)
        parameter.data = dequantize(rounded.quantized)
        try:
            yield grid, measure(model, teacher, batches).kl
        finally:
            parameter.data = exact


class _HeadOnly(nn.Module):
    """A teacher whose hidden states are known already."""

    def __init__(self, head_VD: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(head_VD.shape[1], head_VD.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(head_VD, requires_grad=False)

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head."""
        return self.head
