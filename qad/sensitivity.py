"""What rounding each tensor to each grid costs: the expected KL to the unrounded model, in nats per token.

To second order, an error D [N, K] of a linear layer costs 1/2 E[(g^T D x)^2], where x is the layer's input and g the
gradient by its output of log p(y), y drawn from the model itself: the Fisher information, here factored into that of
inputs and that of outputs as in K-FAC (Martens and Grosse, arXiv 1503.05671). Rounding errors of different rows are
uncorrelated, which leaves the diagonal of E[g g^T]. Tokens count by their gradients: A = E[|g|^2 x x^T] / E[|g|^2],
because the tokens of largest inputs are often those that matter least (so weighted or not makes a factor of four for
SmolLM2's down projections). Within a row rounding to nearest pays D A D^T. Compensation (GPTQ, arXiv 2210.17323)
leaves D = e U with U^T U the inverse of H = E[x x^T] and e_i the rounding error of input i over U_ii; as these errors
are uncorrelated, input i pays its squared rounding error times (U A U^T)_ii / U_ii^2, and no matrix need be rounded
that way to know.

Embedding and head, of which there are one or two, are measured: rounded to one grid, and the KL taken; that of other
grids follows from their squared errors.

What is given up: the interaction of errors, correlations of gradients across tokens, all but a sample of the rows.

Shapes: B sequences, T tokens, N output features, K input features.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
_GRADIENT_TOKENS, _END_TOKENS = 4096, 2048
_MOMENT_BYTES = 1 << 30  # second moments held at a time
_ROWS, _END_ROWS = 128, 1024  # rows of a matrix that are rounded for its estimate
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
    gradients, texts = (_batches(calibration_BT, tokens) for tokens in (_GRADIENT_TOKENS, _END_TOKENS))
    total = len(groups) * len(gradients) + sum(map(len, candidates.values()))
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        on_progress(done, total)

    on_progress(0, total)
    costs: Costs = {name: {} for name in candidates}
    for group in groups:
        statistics = _observe(model, group, gradients, seed, mode == "gptq", tick)
        for name, module in group.items():
            observed = statistics.pop(name)
            for grid in candidates[name]:
                costs[name][grid] = _expected(module.weight.data, observed, grid, mode)
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


def _groups(linears: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """Yield the layers in groups whose second moments fit into memory together, in order."""
    group: dict[str, nn.Linear] = {}
    size = 0
    for name, module in linears.items():
        needed = 2 * 4 * module.in_features**2
        if group and size + needed > _MOMENT_BYTES:
            yield group
            group, size = {}, 0
        group[name] = module
        size += needed
    if group:
        yield group


@dataclass(frozen=True)
class _Observed:
    """What the calibration text shows of one layer.

    Attributes:
        energy_N: Mean over tokens of g^2, g the gradient by the layer's output of log p(y).
        moment: What errors within a row cost: [K] for each input's squared rounding error, or a form [K, K].
    """

    energy_N: Tensor
    moment: Tensor


class _Recorder:
    """Gathers what hooks see of some layers.

    Args:
        linears: The layers.
        with_inputs: Whether to gather the inputs' plain second moments too.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], with_inputs: bool) -> None:
        self.energy = {name: torch.zeros(module.out_features) for name, module in linears.items()}
        self.weighted = {name: torch.zeros(2 * (module.in_features,)) for name, module in linears.items()}
        self.plain: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}
        self.tokens = 0
        self._with_inputs = with_inputs
        self._given: list[tuple[Tensor, str]] = []
        self._hooks = [module.register_forward_hook(partial(self._watch, name)) for name, module in linears.items()]

    def _watch(self, name: str, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x_TK = args[0].detach().reshape(-1, args[0].shape[-1])
        if self._with_inputs:
            # Layers that read the same tensor share one result.
            self.owner[name] = next((first for tensor, first in self._given if tensor is args[0]), name)
            if self.owner[name] == name:
                self._given.append((args[0], name))
                self.plain.setdefault(name, x_TK.new_zeros(2 * (x_TK.shape[1],))).addmm_(x_TK.t(), x_TK)
        output.register_hook(partial(self._weigh, name, x_TK))

    def _weigh(self, name: str, x_TK: Tensor, grad: Tensor) -> None:
        square_TN = grad.detach().reshape(-1, grad.shape[-1]).square()
        self.energy[name] += square_TN.sum(dim=0)
        self.weighted[name].addmm_(x_TK.t() * square_TN.sum(dim=1), x_TK)

    def end_batch(self, tokens: int) -> None:
        """Count a batch, and forget the tensors that were seen in it."""
        self.tokens += tokens
        self._given.clear()

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()


def _observe(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    batches: Sequence[Tensor],
    seed: int,
    compensated: bool,
    tick: Callable[[], None],
) -> dict[str, _Observed]:
    """Return what the calibration text shows of each layer, by gradients of labels drawn from the model."""

    def need_gradient(_: nn.Module, __: Any, output: Tensor) -> None:
        output.requires_grad_(True)

    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    generator = torch.Generator().manual_seed(seed)
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    recorder = _Recorder(linears, compensated)
    start = embedding.register_forward_hook(need_gradient)
    model.requires_grad_(False)  # gradients of activations only
    try:
        with torch.enable_grad():
            for batch_BT in batches:
                logits = model(input_ids=batch_BT, use_cache=False).logits.flatten(0, 1).float()
                drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator).squeeze(-1)
                F.cross_entropy(logits, drawn, reduction="sum").backward()
                recorder.end_batch(batch_BT.numel())
                tick()
    finally:
        recorder.remove()
        start.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
    factors = {
        name: inverse_factor(damped(recorder.plain.pop(name).div_(recorder.tokens), _DAMPING))
        for name in list(recorder.plain)
    }
    observed = {}
    for name in linears:
        energy_N = recorder.energy[name]
        moment = recorder.weighted.pop(name).div_(energy_N.sum().clamp_min(torch.finfo(torch.float32).tiny))
        if compensated:
            upper_KK = factors[recorder.owner[name]]
            moment = ((upper_KK @ moment) * upper_KK).sum(dim=1) / upper_KK.diagonal().square()
        observed[name] = _Observed(energy_N / recorder.tokens, moment)
    return observed


def _expected(weight_NK: Tensor, observed: _Observed, grid: str, mode: str) -> float:
    """Return 1/2 sum_n E[g_n^2] (error of row n), from evenly spread rows."""
    energy_N, moment = observed.energy_N, observed.moment
    count = min(_ROWS, weight_NK.shape[0])
    rows = torch.linspace(0, weight_NK.shape[0] - 1, count).round().long()
    sample_NK = weight_NK[rows]
    error_NK = _rounded(sample_NK, grid, mode).sub_(sample_NK)
    by_row_N = error_NK.square() @ moment if moment.ndim == 1 else (error_NK @ moment * error_NK).sum(dim=1)
    # The rows left out are taken to have the errors of the others, with the energy of their own.
    share = float(energy_N[rows] @ by_row_N) / max(float(energy_N[rows].sum()), 1e-30)
    return 0.5 * share * float(energy_N.sum())


def _measured(
    model: nn.Module, name: str, grids: Sequence[str], parts: Sequence[Tensor], mode: str
) -> Iterator[tuple[str, float]]:
    """Yield for each grid the KL of the model with one tensor rounded: measured for one of them, scaled for others."""
    parameter = dict(model.named_parameters())[name]
    exact = parameter.data
    rows = torch.linspace(0, len(exact) - 1, min(_END_ROWS, len(exact))).round().long()
    errors = {grid: float(_rounded(exact[rows], grid, mode).sub_(exact[rows]).square().sum()) for grid in grids}
    # One in the middle: where the KL is small enough to be quadratic, and large enough to be no rounding of its own.
    lossy = sorted((grid for grid in grids if errors[grid] > 0), key=errors.__getitem__)
    if not lossy:
        yield from ((grid, 0.0) for grid in grids)
        return
    reference = lossy[(len(lossy) - 1) // 2]
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
    parameter.data = _rounded(exact, reference, mode)
    try:
        kl = measure(model, teacher, batches).kl
    finally:
        parameter.data = exact
    yield from ((grid, kl * errors[grid] / errors[reference]) for grid in grids)


def _rounded(weight_NK: Tensor, grid: str, mode: str) -> Tensor:
    """Return a weight rounded to nearest, as a tensor of its own."""
    method = "rtn" if mode == "rtn" else "mse"
    return dequantize(round_without_hessian(weight_NK, get_grid(grid), method, "the weight").quantized)


class _HeadOnly(nn.Module):
    """A teacher whose hidden states are known already."""

    def __init__(self, head_VD: Tensor) -> None:
        super().__init__()
        self.head = nn.Linear(head_VD.shape[1], head_VD.shape[0], bias=False, device="meta")
        self.head.weight = nn.Parameter(head_VD, requires_grad=False)

    def get_output_embeddings(self) -> nn.Linear:
        """Return the output head."""
        return self.head
