"""GPTQModel on GPTQ folders, with its plain-torch kernel, which multiplies codes and scales as the format says.

Kernels that GPTQModel would choose itself on a CPU are faster and pack or round once more; judging an export needs this
one. What it computes in is the model class of transformers in fp16, so the session is the reference's.

Shapes: B batch, T tokens, V vocabulary.
"""

import contextlib
import importlib.util
import io
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPTQConfig

from qad.architectures import ARCHITECTURES
from qad.errors import UserError
from qad.export._gptq_decode import read_json
from qad.model import load_tokenizer
from qad.runtimes import _cores
from qad.runtimes.reference import TorchSession, check_device

FORMATS = ("gptq",)

_INSTALL = "pip install 'qad[gptq]'"


def available() -> str | None:
    """Return None if GPTQModel is installed, else the reason and the remedy.

    It is not imported to find out: that takes ten seconds.
    """
    if importlib.util.find_spec("gptqmodel") is None:
        return f"gptqmodel is not installed: {_INSTALL}"
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Undo what a library does to its process: importing GPTQModel shows a banner, sets variables and takes the log."""
    variables, handlers, level = dict(os.environ), list(logging.root.handlers), logging.root.level
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    finally:
        for name in os.environ.keys() - variables.keys():
            del os.environ[name]
        os.environ.update(variables)
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)


def load(path: Path, device: str = "cpu") -> Any:
    """Return a folder's model as GPTQModel loads it: a transformers model in fp16 with ``TorchLinear`` layers.

    Args:
        path: The folder.
        device: ``cpu`` or ``gpu``.

    Raises:
        UserError: GPTQModel is not installed, cannot be imported, or cannot load the folder.
    """
    if reason := available():
        raise UserError(reason)
    with _quiet():
        try:
            from gptqmodel import BACKEND, GPTQModel
        except Exception as error:  # whatever a library of another version lacks
            raise UserError(f"gptqmodel cannot be imported ({error}): reinstall it with {_INSTALL}") from error
        where = "cuda:0" if device == "gpu" else "cpu"
        try:
            if _is_split_by_gptqmodel(path):
                # The same layers, put in place by transformers, which leaves fused projections as they are.
                kernel = GPTQConfig(bits=4, backend=BACKEND.GPTQ_TORCH.value)
                model: Any = AutoModelForCausalLM.from_pretrained(
                    path, dtype=torch.float16, device_map=where, quantization_config=kernel
                )
            else:
                # float32 is refused. Products of 4-bit codes and scales of 8 significand bits are exact in fp16.
                loaded: Any = GPTQModel.load(str(path), backend=BACKEND.GPTQ_TORCH, device=where, dtype=torch.float16)
                model = loaded.model
        except Exception as error:  # whatever damaged files and unknown architectures make it raise
            raise UserError(
                f"gptqmodel cannot load {path}: {type(error).__name__}: {error}; export it again"
            ) from error
    for module in model.modules():
        # A compiled version hides the method, takes a minute to make on a CPU, and may keep more bits than fp16.
        module.__dict__.pop("dequantize_weight", None)
    return model.eval()


def _is_split_by_gptqmodel(path: Path) -> bool:
    """Return whether GPTQModel's own loader does not take the folder's architecture as checkpoints have it."""
    architecture = ARCHITECTURES.get(str(read_json(path / "config.json").get("model_type")))
    return architecture is not None and architecture.gptqmodel_splits


def open(path: Path, device: str = "cpu", threads: int | None = None) -> TorchSession:  # noqa: A001
    """Open a GPTQ folder.

    Args:
        path: The folder.
        device: ``cpu`` or ``gpu``.
        threads: Threads that torch uses from now on in this process; the free physical cores if None.

    Raises:
        UserError: See ``load``; or no GPU.
    """
    check_device(device)
    tokenizer = load_tokenizer(str(path))
    model = load(path, device)
    torch.set_num_threads(threads or _cores.free_cores())
    return TorchSession(model, tokenizer)
