"""Where training starts: every quantized tensor of a model rounded, layer after layer, on a little calibration text.

Each layer is rounded to reproduce what the unquantized model computes there, given the inputs that the already rounded
layers before it really deliver: the target of a matrix is W plus the share of W (X - X') X'^T (X' X'^T)^-1 that makes
up for the drift of its inputs from X to X' (quantization error propagation, arXiv 2504.09629). Given up against plain
GPTQ: a second copy of the calibration activations.

Shapes: B sequences, T tokens, D model width, N output features, K input features.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qad.architectures import ARCHITECTURES, layer_types
from qad.grid import get_grid
from qad.plan import KEEP, Plan
from qad.rounding import Rounded, RoundingSettings, damped, round_with_hessian, round_without_hessian
from qad.tensor import check_weight, dequantize

INIT_MODES = ("rtn", "mse", "gptq")
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class CalibrationSettings:
    """How the layer walk goes.

    Attributes:
        rounding: Settings of each matrix.
        propagation: Share of the accumulated input drift that a matrix is asked to make up for, 0 to 1.
    """

    rounding: RoundingSettings = field(default_factory=lambda: RoundingSettings(refits=3))
    propagation: float = 0.4


Progress = Callable[[int, int], None]
Arguments = dict[str, dict[str, Any]]


def initialize(
    model: nn.Module,
    plan: Plan,
    mode: str,
    calibration_BT: Tensor | None = None,
    settings: CalibrationSettings | None = None,
    on_progress: Progress = lambda done, total: None,
) -> dict[str, Rounded]:
    """Return codes, scales and starting masters for every quantized tensor of the plan.

    The model's weights are overwritten with the quantized ones, tensor by tensor.

    Args:
        model: A causal language model in float32.
        plan: Which tensor gets which grid.
        mode: ``rtn``, ``mse`` or ``gptq``.
        calibration_BT: Token ids, needed by ``gptq``.
        settings: For ``gptq``.
        on_progress: Called with (tensors done, tensors in total).

    Raises:
        UserError: NaN or infinity in a weight, or a row that its grid does not divide.
    """
    parameters = dict(model.named_parameters())
    wanted = {name: get_grid(grid) for name, grid in plan.items() if grid != KEEP}
    for name, grid in wanted.items():
        check_weight(parameters[name].data, grid, name)
    rounded: dict[str, Rounded] = {}

    def settle(name: str, result: Rounded) -> None:
        rounded[name] = result
        dequantize(result.quantized, out=parameters[name].data)
        on_progress(len(rounded), len(wanted))

    if mode == "gptq":
        assert calibration_BT is not None
        for name, result in _walk(model, wanted, calibration_BT, settings or CalibrationSettings()):
            settle(name, result)
    for name, grid in wanted.items():
        if name not in rounded:
            # Embedding and head: a Hessian of an embedding is diagonal, and 8 bits leave little to compensate.
            method = "mse" if mode == "gptq" else mode
            settle(name, round_without_hessian(parameters[name].data, grid, method, name))
    return {name: rounded[name] for name in wanted}


class _Captured(Exception):
    pass


@torch.no_grad()
def _layer_inputs(model: nn.Module, firsts: Mapping[str, nn.Module], batch_BT: Tensor) -> tuple[Tensor, Arguments]:
    """Return the hidden states that a model hands to its first layer, and the other arguments of each type of layers.

    ``firsts``: The first layer of each type, in the model's order. Types differ in their mask and rotary embedding.
    """
    hidden: list[Tensor] = []
    arguments: Arguments = {}

    def catch(kind: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(args[0] if args else kwargs["hidden_states"])
            others = {"hidden_states", "past_key_values"}
            arguments[kind] = {key: value for key, value in kwargs.items() if key not in others}
            if len(arguments) == len(firsts):
                raise _Captured

        return keep

    handles = [
        layer.register_forward_pre_hook(catch(kind), with_kwargs=True, prepend=True) for kind, layer in firsts.items()
    ]
    try:
        with suppress(_Captured):
            model(batch_BT, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return hidden[0], arguments


@contextmanager
def _recording(
    modules: Mapping[str, nn.Module], inputs: dict[str, list[Tensor]], *, stop: bool = False
) -> Iterator[None]:
    """Record the inputs of modules, flattened to [tokens, K]; with ``stop``, raise ``_Captured`` once one is had."""

    def record(name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[name].append(args[0].reshape(-1, args[0].shape[-1]))
            if stop:
                raise _Captured

        return keep

    handles = [module.register_forward_pre_hook(record(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _walk(
    model: nn.Module, wanted: dict[str, Any], calibration_BT: Tensor, settings: CalibrationSettings
) -> Iterator[tuple[str, Rounded]]:
    """Yield the rounded linear layers of each decoder layer in order. The caller writes them into the model."""
    layers: nn.ModuleList = model.model.layers  # type: ignore[union-attr,assignment]
    config: dict[str, Any] = model.config.to_dict()  # type: ignore[union-attr,operator]
    stages, kinds = ARCHITECTURES[config["model_type"]].stages, layer_types(config)
    firsts = {kind: layers[kinds.index(kind)] for kind in dict.fromkeys(kinds)}
    batch = max(1, _BATCH_TOKENS // calibration_BT.shape[1])
    batches = [_layer_inputs(model.model, firsts, part) for part in calibration_BT.split(batch)]  # type: ignore[arg-type]
    exact = [hidden for hidden, _ in batches]
    actual = list(exact)
    arguments = [kwargs for _, kwargs in batches]

    def run(kind: str, layer: nn.Module, hidden: list[Tensor]) -> list[Tensor]:
        outputs = []
        for part, kwargs in zip(hidden, arguments, strict=True):
            with suppress(_Captured):
                outputs.append(layer(part, **kwargs[kind]))
        return [out[0] if isinstance(out, tuple) else out for out in outputs]

    for index, (kind, layer) in enumerate(zip(kinds, layers, strict=True)):
        linears = {
            f"model.layers.{index}.{name}.weight": module
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and f"model.layers.{index}.{name}.weight" in wanted
        }
        exact_inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
        with _recording(linears, exact_inputs):
            exact = run(kind, layer, exact)
        prefix = f"model.layers.{index}."
        for stage in (
            [name for module in stage if (name := f"{prefix}{module}.weight") in linears] for stage in stages
        ):
            if not stage:
                continue
            actual_inputs: dict[str, list[Tensor]] = {name: [] for name in stage[:1]}
            with _recording({stage[0]: linears[stage[0]]}, actual_inputs, stop=True):
                run(kind, layer, actual)
            x_TK = torch.cat(actual_inputs.pop(stage[0]))
            drift_TK = torch.cat(exact_inputs[stage[0]]).sub_(x_TK)
            for name in stage:
                exact_inputs[name].clear()
            hessian_KK = x_TK.t() @ x_TK
            correction_KK = settings.propagation * torch.linalg.solve(
                damped(hessian_KK, settings.rounding.damping), x_TK.t() @ drift_TK
            )
            for name in stage:
                weight_NK = linears[name].weight.data
                target_NK = weight_NK + weight_NK @ correction_KK.t()
                yield name, round_with_hessian(target_NK, hessian_KK, wanted[name], settings.rounding)
        actual = run(kind, layer, actual)
