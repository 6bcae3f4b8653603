"""QADTrainer: TRL's supervised trainer with the loss, quantizer and checkpoints of quantization-aware distillation.

Of the parent stay the loop, gradient accumulation, clipping, schedules, mixed precision, logging and resuming. Replaced
are the loss (KL to a teacher and next-token loss, from hidden states; the latter alone without a teacher), the
optimizer's parameter groups (masters and scales instead of the model's quantized parameters), evaluation (KL,
perplexity and same top-1 of the hard-rounded weights) and checkpoints (written whole or not at all). Given up: more
than one process.

Shapes: B sequences, T tokens, D width, V vocabulary, P cached entries per token.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from qad.checkpoints import CHECKPOINTS, checkpoint_step, seal_checkpoint
from qad.errors import UserError
from qad.files import replacing_folder
from qad.losses import IGNORE, CachedTeacher, LiveTeacher, NoTeacher, TeacherChunks, chunked_distillation
from qad.measure import Batch, Quality, last_hidden, measure, output_head, shifted_labels
from qad.recipe import Recipe
from qad.student import Masters
from qad.teacher import TeacherCache

_STATE_FILE = "student.safetensors"
_BEST_FILE = "best.json"


@dataclass(frozen=True)
class Collator:
    """Pads rows of ``input_ids``, ``completion_mask``, ``sample_id`` to a batch.

    Attributes:
        pad_id: Token to pad with.
        loss_on: ``all`` or ``completion``.
    """

    pad_id: int
    loss_on: str

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return ``input_ids``, ``attention_mask``, shifted ``labels`` [B, T] and the list ``sample_id``."""
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        counts = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            tokens = len(row["input_ids"])
            ids[index, :tokens] = torch.tensor(row["input_ids"])
            mask[index, :tokens] = 1
            counts[index, :tokens] = 1 if self.loss_on == "all" else torch.tensor(row["completion_mask"])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": shifted_labels(ids, counts),
            "sample_id": [row["sample_id"] for row in rows],
        }


def _typical_size(weight: Tensor) -> float:
    """Return the root mean square of a weight; 1 for one that is zero, which has no size to be a share of."""
    return float(weight.detach().square().mean().sqrt()) or 1.0


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to pad with; which one does not matter, because padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    return 0


def mixed_precision_available() -> bool:
    """Return whether bfloat16 matrix products are faster than float32 ones: a GPU, or a CPU with AMX.

    AVX-512 BF16 alone does not count: there PyTorch's bfloat16 products ran at half the speed of its float32 ones.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return bool(torch.cpu._is_amx_tile_supported())


def training_arguments(recipe: Recipe, run: Path) -> SFTConfig:
    """Translate a recipe into the trainer's arguments."""
    bf16 = mixed_precision_available()
    if recipe.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(run / "tensorboard")
    return SFTConfig(
        output_dir=str(run / CHECKPOINTS),
        max_steps=recipe.steps,
        per_device_train_batch_size=recipe.micro_batch,
        per_device_eval_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=recipe.batch_size // recipe.micro_batch,
        activation_checkpointing=recipe.gradient_checkpointing,
        learning_rate=1.0,  # every parameter group carries its own
        lr_scheduler_type="cosine",
        warmup_steps=round(recipe.warmup * recipe.steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=1,
        eval_strategy="steps" if recipe.eval_every else "no",
        eval_steps=recipe.eval_every or None,
        save_strategy="steps" if recipe.save_every else "no",
        save_steps=recipe.save_every or 500,
        report_to=["tensorboard"] if recipe.tensorboard else [],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        dataloader_pin_memory=torch.cuda.is_available(),
        max_length=None,
    )


class _EvaluateLast(TrainerCallback):
    """Has the last step evaluated whatever ``eval_every`` is, and before its checkpoint, which records the best."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for an evaluation."""
        control.should_evaluate |= state.global_step >= state.max_steps


class QADTrainer(SFTTrainer):
    """Trains a student's masters on their grids by divergence from a teacher.

    Args:
        model: The student; its quantized parameters are forward buffers (see ``student.Masters``).
        masters: Their masters and scales.
        teacher: The teacher, in the same process; None if the loss has no divergence in it.
        tokenizer: Shared by both.
        recipe: The run.
        run: The run folder.
        train_rows, held_out_rows: Rows of ``input_ids``, ``completion_mask``, ``sample_id``.
        cache: Top-k cache that holds the teacher of the training rows, or None for the live teacher.
        on_best: Called whenever an evaluation is the best so far, with the student hard-rounded.
        callbacks: Further callbacks.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the tokens of the whole optimizer step

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        masters: Masters,
        teacher: nn.Module | None,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        run: Path,
        train_rows: Dataset,
        held_out_rows: Dataset,
        cache: TeacherCache | None = None,
        on_best: Callable[[int, Quality], None],
        callbacks: list[TrainerCallback],
    ) -> None:
        assert (teacher is not None) == recipe.loss.needs_teacher
        self.masters = masters
        self.student = model
        self.teacher = teacher
        self.recipe = recipe
        self._run = run
        self._cache = cache
        self._loss_settings = recipe.loss
        self._on_best = on_best
        self._filled_for: int | None = None
        self.best: tuple[int, Quality] | None = None
        model.add_module("qad_masters", masters)
        for parameter in masters.forward_parameters():
            parameter.requires_grad_(True)
        collator = Collator(padding_id(tokenizer), recipe.loss_on)
        super().__init__(
            model=model,
            args=training_arguments(recipe, run),
            data_collator=collator,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            processing_class=tokenizer,
            callbacks=[_EvaluateLast(), *callbacks],
        )
        self.remove_callback(PrinterCallback)  # the progress bar and run.jsonl say it all
        if self.teacher is not None:
            self.teacher.to(self.args.device)
        self._held_out: list[Batch] = []
        for start in range(0, len(held_out_rows), recipe.micro_batch):
            rows = held_out_rows.select(range(start, min(start + recipe.micro_batch, len(held_out_rows))))
            batch = collator(list(rows))  # type: ignore[arg-type]
            self._held_out.append({k: v.to(self.args.device) for k, v in batch.items() if isinstance(v, Tensor)})

    # The step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of an optimizer step and how many of their tokens count, at least 1.

        The parent would not count the first position: it takes labels for unshifted.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, max(1, sum(int((batch["labels"] != IGNORE).sum()) for batch in batches))

    def _noise(self, step: int) -> dict[str, Any]:
        """Return the noise of an optimizer step: the share of hard blocks rises until ``noise_until``."""
        until = self.recipe.noise_until * self.recipe.steps
        hard_share = 1.0 if step >= until else step / until
        return {"step": step, "noise": self.recipe.noise, "hard_share": hard_share, "seed": self.recipe.seed}

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:  # type: ignore[override]
        """Quantize before the first micro-batch of an optimizer step, collect gradients after the last."""
        step = self.state.global_step
        if self._filled_for != step:
            self.masters.refresh(**self._noise(step))
            self._filled_for = step
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self.masters.collect_gradients(**self._noise(step))
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss per token that counts."""
        assert not return_outputs
        student = self.accelerator.unwrap_model(model)
        counted_BT = inputs["labels"] != IGNORE
        hidden_TD = last_hidden(student, inputs)[counted_BT]
        head_VD = output_head(student)
        sums = chunked_distillation(
            hidden_TD,
            head_VD,
            inputs["labels"][counted_BT],
            self._teacher_chunks(inputs, counted_BT),
            self._loss_settings,
        )
        tokens = counted_BT.sum().clamp_min(1)
        if self.teacher is not None:
            self._metrics["train"]["kl"].append(float(sums.kl / tokens))
        self._metrics["train"]["perplexity"].append(float((sums.nll / tokens).exp()))
        return sums.loss / (tokens if num_items_in_batch is None else num_items_in_batch)

    @torch.no_grad()
    def _teacher_chunks(self, inputs: dict[str, Any], counted_BT: Tensor) -> TeacherChunks:
        if self.teacher is None:
            return NoTeacher()
        if self._cache is not None:
            return CachedTeacher(*self._cache.lookup(inputs["sample_id"], counted_BT))
        hidden = last_hidden(self.teacher, inputs)[counted_BT]
        return LiveTeacher(hidden, output_head(self.teacher))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Return AdamW over masters, learned scales and kept parameters, each with its own learning rate."""
        groups: list[dict[str, Any]] = []
        for master, scales, grid_step in self.masters.groups():
            decay = self.recipe.weight_decay
            unit = grid_step if self.recipe.lr_unit == "grid" else _typical_size(master)
            groups.append({"params": [master], "lr": self.recipe.lr * unit, "weight_decay": decay})
            if scales.requires_grad:
                groups.append({"params": [scales], "lr": self.recipe.scale_lr * grid_step})
        owned = {id(p) for p in self.masters.parameters()} | {id(p) for p in self.masters.forward_parameters()}
        kept = [p for p in self.student.parameters() if id(p) not in owned and p.requires_grad]
        groups.append({"params": kept, "lr": self.recipe.kept_lr})
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), eps=1e-10, weight_decay=0.0)
        return self.optimizer

    # Evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:  # type: ignore[override]
        """Measure the hard-rounded student on the held-out rows and keep the best."""
        self.masters.harden()
        self._filled_for = None
        self.student.eval()
        # In float32, as the teacher's own figures are: the noise of bfloat16 would hide what is measured.
        quality = measure(self.student, self.teacher, self._held_out)
        if self.best is None or self._loss_of(quality) < self._loss_of(self.best[1]):
            self.best = (self.state.global_step, quality)
            self._on_best(self.state.global_step, quality)
        metrics = {"eval_perplexity": quality.perplexity, "eval_best_step": float(self.best[0])}
        if self.teacher is not None:
            metrics |= {"eval_kl": quality.kl, "eval_same_top1": quality.same_top1}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _loss_of(self, quality: Quality) -> float:
        """Return what evaluations are compared by: KL and next-token loss as the recipe weighs them."""
        settings = self._loss_settings
        supervised = settings.next_token_weight * quality.nll if settings.next_token_weight else 0.0
        return settings.kl_weight * quality.kl + supervised if settings.needs_teacher else supervised

    def measure_model(self, model: nn.Module) -> Quality:
        """Return another model's figures on the held-out rows."""
        return measure(model.to(self.args.device), self.teacher, self._held_out)

    # Checkpoints

    def _kept_state(self) -> dict[str, Tensor]:
        """Return masters, scales and kept parameters; forward buffers follow from them."""
        forward = {id(p) for p in self.masters.forward_parameters()}
        return {
            name: parameter.data for name, parameter in self.student.named_parameters() if id(parameter) not in forward
        }

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under its name whole or not at all, then delete the one before."""
        folder = self._run / CHECKPOINTS / f"checkpoint-{self.state.global_step}"
        with replacing_folder(folder) as staging:
            save_file({name: tensor.contiguous() for name, tensor in self._kept_state().items()}, staging / _STATE_FILE)
            self._save_optimizer_and_scheduler(str(staging))
            self._save_rng_state(str(staging))
            states: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
            for callback in [*self.callback_handler.callbacks, self.control]:
                if isinstance(callback, ExportableState):
                    states[type(callback).__name__] = callback.state()
            self.state.save_to_json(str(staging / "trainer_state.json"))
            best = None if self.best is None else [self.best[0], self.best[1].to_dict()]
            (staging / _BEST_FILE).write_text(json.dumps(best))
            seal_checkpoint(staging)
        for other in folder.parent.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def restore(self, checkpoint: Path) -> None:
        """Take over the last checkpoint of a run that has no step left, which ``train`` would take one too far."""
        self._load_from_checkpoint(str(checkpoint))
        self.state.global_step = checkpoint_step(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Restore masters, scales, kept parameters and the best evaluation."""
        folder = Path(resume_from_checkpoint)
        state = load_file(folder / _STATE_FILE)
        parameters = self._kept_state()
        if set(state) != set(parameters):
            raise UserError(f"{folder} belongs to another model; start the run anew with another -o")
        for name, tensor in state.items():
            parameters[name].copy_(tensor)
        best = json.loads((folder / _BEST_FILE).read_text())
        self.best = None if best is None else (best[0], Quality.of(best[1]))
        self._filled_for = None
