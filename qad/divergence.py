"""Divergences between the logits of a teacher and a student, and their gradients, in plain torch: the reference.

The kernels in csrc/ compute the same in one step per row. They agree to rounding, not bit for bit: sums over a whole
vocabulary depend on their order.

Shapes: C tokens, V vocabulary.
"""

import math

import torch
from torch import Tensor

# Rows whose intermediate results exist at a time. Everything here works on each row alone, so a buffer of logits may
# be large while what is computed from it stays small.
ROWS = 16


def divergence(
    student_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float,
    next_token_weight: float,
    keep_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Overwrite student logits with the gradient of the distillation loss, and return the loss per token.

    The gradient is that of temperature^2 x divergence + next_token_weight x nll by the student's logits. Where a
    divergence is infinite (one model rules out what the other expects) its gradient may hold NaN.

    Args:
        student_CV: Logits; overwritten unless ``keep_logits``.
        teacher_CV: Logits.
        labels_C: int64 next tokens, negative for none.
        kind: ``forward``, ``reverse`` or ``jsd``: see ``qad.losses.LossSettings``, for the next three too.
        beta: Weight of the teacher in ``jsd``.
        temperature: Divides the logits.
        next_token_weight: Weight of the next-token cross-entropy.
        keep_logits: Leave the student's logits as they are.

    Returns:
        float64 divergence_C at that temperature (not multiplied by its square), and nll_C at temperature 1, which is 0
        without a label.
    """
    value_C = torch.empty(len(student_CV), dtype=torch.float64, device=student_CV.device)
    nll_C = torch.empty_like(value_C)
    for start in range(0, len(student_CV), ROWS):
        part = slice(start, start + ROWS)
        student, labels = wide(student_CV[part]), labels_C[part]
        log_probs = student.log_softmax(dim=-1)
        log_q = log_probs if temperature == 1.0 else (student / temperature).log_softmax(dim=-1)
        log_p = (wide(teacher_CV[part]) / temperature).log_softmax(dim=-1)
        value_C[part], gradient = _dense(log_q, log_p, kind, beta)
        nll_C[part] = next_token_loss(log_probs, labels)
        if not keep_logits:
            gradient.mul_(temperature)
            add_next_token_gradient(gradient, log_probs, labels, next_token_weight)
            student_CV[part] = gradient
    return value_C, nll_C


def _dense(log_q: Tensor, log_p: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return a divergence per row and its gradient by the logits of q.

    The gradient of KL(p || q) is q - p; that of a term f(q) is q (f' - sum q f').
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward":
        return _mean(p, log_p - log_q), q - p
    if kind == "reverse":
        ratio = log_q - log_p
        value = _mean(q, ratio)
        return value, _weighted(q, ratio.sub_(value.to(q.dtype).unsqueeze(-1)))
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    ratio = log_q - log_m
    value_q = _mean(q, ratio)
    value = beta * _mean(p, log_p - log_m) + (1 - beta) * value_q
    # d/dq of beta KL(p||m) + (1-beta) KL(q||m): the terms through m cancel to a constant, which the softmax removes.
    return value, _weighted(q, ratio.sub_(value_q.to(q.dtype).unsqueeze(-1))).mul_(1 - beta)


def _weighted(probability: Tensor, x: Tensor) -> Tensor:
    """Return the product, 0 where the probability is, whatever it is multiplied with."""
    return (probability * x).masked_fill_(probability == 0, 0.0)


def _mean(probability: Tensor, x: Tensor) -> Tensor:
    return _weighted(probability, x).sum(dim=-1, dtype=torch.float64)


def next_token_loss(log_probs_CV: Tensor, labels_C: Tensor) -> Tensor:
    """Return the cross-entropy of each row's label in float64, 0 where it is negative."""
    nll_C = -log_probs_CV.gather(-1, labels_C.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return nll_C.double().masked_fill_(labels_C < 0, 0.0)


def add_next_token_gradient(gradient_CV: Tensor, log_probs_CV: Tensor, labels_C: Tensor, weight: float) -> None:
    """Add the gradient of weight x ``next_token_loss`` by the logits, in place."""
    if not weight:
        return
    targets = labels_C.clamp_min(0).unsqueeze(-1)
    by_logits = log_probs_CV.exp()
    by_logits.scatter_add_(-1, targets, torch.full_like(targets, -1, dtype=by_logits.dtype))
    gradient_CV.add_(by_logits.mul_((labels_C >= 0).unsqueeze(-1)), alpha=weight)


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
