"""Distillation losses, computed from hidden states in chunks of tokens.

The logits of a 150k-word vocabulary are the largest tensor of a training step. Here a chunk of tokens at a time is
projected, compared and turned into gradients at once, so that neither model's [tokens, vocabulary] logits exist as a
whole, nor logits together with a stored softmax. What is given up: the gradients are computed in forward, so this must
be the last operation of the graph, and gradients of gradients do not exist.

Shapes: T tokens, C tokens of a chunk, D student width, E teacher width, V vocabulary, P cached entries per token.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from qad.errors import UserError, unknown_name

KL_MODES = ("forward", "reverse", "jsd")
IGNORE = -100


@dataclass(frozen=True)
class LossSettings:
    """What the student minimizes.

    Attributes:
        kl: ``forward`` KL(teacher || student), ``reverse`` KL(student || teacher), or ``jsd``, the generalized
            Jensen-Shannon divergence beta KL(teacher || m) + (1 - beta) KL(student || m) with
            m = beta teacher + (1 - beta) student (Agarwal et al., GKD, arXiv 2306.13649).
        beta: Weight of the teacher in ``jsd``, within (0, 1).
        temperature: Divides both models' logits; the divergence is multiplied by its square (Hinton et al., 2015).
        next_token_weight: Weight of the plain next-token cross-entropy, which is added.
        chunk_tokens: Tokens whose logits exist at a time.
    """

    kl: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    next_token_weight: float = 0.0
    chunk_tokens: int = 128

    def __post_init__(self) -> None:
        if self.kl not in KL_MODES:
            raise unknown_name("divergence", self.kl, list(KL_MODES))
        if not 0.0 < self.beta < 1.0:
            raise UserError(
                f"beta must lie between 0 and 1, not {self.beta}: for 0 use --kl forward, for 1 --kl reverse"
            )
        if not 0.0 < self.temperature < math.inf:
            raise UserError(f"the temperature must be a positive number, not {self.temperature}")


class TeacherChunks(Protocol):
    """Where a chunk's teacher distribution comes from."""

    def vocabulary(self, student_vocabulary: int) -> int:
        """Return how many leading logits both models share; those behind are padding."""
        ...

    def divergence(self, logits_CV: Tensor, start: int, stop: int, settings: LossSettings) -> tuple[Tensor, Tensor]:
        """Return the chunk's divergence per token [C] and its gradient by the student's logits [C, V].

        ``logits_CV`` are the student's, already divided by the temperature; they may be overwritten.
        """
        ...


class LiveTeacher:
    """A teacher at hand: its last hidden states and output head.

    Args:
        hidden_TE: Last hidden states of the tokens.
        head_VE: Output head.
    """

    def __init__(self, hidden_TE: Tensor, head_VE: Tensor) -> None:
        dtype = _product_dtype(head_VE)
        self._hidden_TE = hidden_TE.to(dtype)
        self._head_VE = head_VE.to(dtype)

    def vocabulary(self, student_vocabulary: int) -> int:
        """Vocabularies padded to different sizes share their leading entries."""
        return min(student_vocabulary, self._head_VE.shape[0])

    def divergence(self, logits_CV: Tensor, start: int, stop: int, settings: LossSettings) -> tuple[Tensor, Tensor]:
        """See ``TeacherChunks``."""
        head = self._head_VE[: logits_CV.shape[-1]]
        teacher_CV = F.linear(self._hidden_TE[start:stop], head).to(logits_CV.dtype).div_(settings.temperature)
        return dense_divergence(logits_CV, teacher_CV, settings)


class CachedTeacher:
    """A teacher's top entries from a cache, the rest of its mass in one bucket.

    Args:
        tokens_TP: Vocabulary indices of each token's most probable continuations.
        log_probs_TP: Their log-probabilities at temperature 1.
    """

    def __init__(self, tokens_TP: Tensor, log_probs_TP: Tensor) -> None:
        self._tokens_TP = tokens_TP
        self._log_probs_TP = log_probs_TP

    def vocabulary(self, student_vocabulary: int) -> int:
        """The student's own: the cache names single entries."""
        return student_vocabulary

    def divergence(self, logits_CV: Tensor, start: int, stop: int, settings: LossSettings) -> tuple[Tensor, Tensor]:
        """See ``TeacherChunks``."""
        return bucket_divergence(logits_CV, self._tokens_TP[start:stop], self._log_probs_TP[start:stop], settings)


def _product_dtype(head_VD: Tensor) -> torch.dtype:
    """Return the dtype to multiply with a head: autocast's, where it is on, else the head's own.

    Chosen here, once per batch, because autocast itself would cast the whole head anew for every chunk of tokens.
    """
    device = head_VD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_VD.dtype


def _wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def dense_divergence(student_CV: Tensor, teacher_CV: Tensor, settings: LossSettings) -> tuple[Tensor, Tensor]:
    """Return the divergence per token [C] and its gradient by the student's logits [C, V].

    Both logits are already divided by the temperature. Both arguments may be overwritten. The gradient of
    KL(p || q) by the logits of q is q - p; that of a term f(q) is q (f' - sum q f').
    """
    log_q = student_CV.sub_(student_CV.logsumexp(dim=-1, keepdim=True))
    log_p = teacher_CV.sub_(teacher_CV.logsumexp(dim=-1, keepdim=True))
    if settings.kl == "forward":
        p = log_p.exp()
        value_C = log_p.sub_(log_q).mul_(p).sum(dim=-1)
        return value_C, log_q.exp_().sub_(p)
    q = log_q.exp()
    if settings.kl == "reverse":
        ratio = log_q.sub_(log_p)
        value_C = (q * ratio).sum(dim=-1)
        return value_C, ratio.sub_(value_C.unsqueeze(-1)).mul_(q)
    beta = settings.beta
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    ratio = log_q.sub_(log_m)
    value_p = (log_p.exp() * (log_p - log_m)).sum(dim=-1)
    value_q = (q * ratio).sum(dim=-1)
    # d/dq of beta KL(p||m) + (1-beta) KL(q||m): the terms through m cancel to a constant, which the softmax removes.
    return beta * value_p + (1 - beta) * value_q, ratio.sub_(value_q.unsqueeze(-1)).mul_(q).mul_(1 - beta)


def bucket_divergence(
    student_CV: Tensor, tokens_CP: Tensor, log_probs_CP: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Like ``dense_divergence`` over P named entries and one bucket for everything else.

    With a temperature other than 1 the teacher's entries are tempered among themselves and the bucket, which differs
    from tempering the whole vocabulary: the cache does not hold what that would need.
    """
    log_q_CV = student_CV.sub_(student_CV.logsumexp(dim=-1, keepdim=True))
    log_p = _with_rest(log_probs_CP) / settings.temperature
    log_p = log_p - log_p.logsumexp(dim=-1, keepdim=True)
    log_q_named = log_q_CV.gather(-1, tokens_CP)
    log_q = _with_rest(log_q_named).requires_grad_()
    # The divergence of P + 1 buckets is tiny; autograd differentiates it, the scatter below carries it to V logits.
    with torch.enable_grad():
        value_C = _bucket_value(log_q, log_p, settings)
        (by_log_q,) = torch.autograd.grad(value_C.sum(), log_q)
    # Chain rule from the buckets' log-probabilities to logits z: a named entry j has d log q_j / dz = 1_j - q; the
    # rest bucket has d log r / dz = (q / r outside, 0 inside) - q.
    q_CV = log_q_CV.exp_()
    total = by_log_q.sum(dim=-1, keepdim=True)
    rest = by_log_q[:, -1:] / log_q.detach()[:, -1:].exp()
    named_q = q_CV.gather(-1, tokens_CP)
    grad_CV = q_CV.mul_(rest - total)
    grad_CV.scatter_(-1, tokens_CP, by_log_q[:, :-1] - total * named_q)
    return value_C.detach(), grad_CV


def _bucket_value(log_q: Tensor, log_p: Tensor, settings: LossSettings) -> Tensor:
    if settings.kl == "forward":
        return (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    if settings.kl == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    log_m = torch.logaddexp(log_p + math.log(settings.beta), log_q + math.log(1 - settings.beta))
    value_p = (log_p.exp() * (log_p - log_m)).sum(dim=-1)
    return settings.beta * value_p + (1 - settings.beta) * (log_q.exp() * (log_q - log_m)).sum(dim=-1)


def _with_rest(log_probs_CP: Tensor) -> Tensor:
    """Append the log of the mass that is not named, at least 1e-6 so that its logarithm stays finite."""
    rest = (1.0 - log_probs_CP.exp().sum(dim=-1, keepdim=True)).clamp_min(1e-6)
    return torch.cat([log_probs_CP, rest.log()], dim=-1)


class _ChunkedDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, teacher: TeacherChunks, settings: LossSettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        used = teacher.vocabulary(head_VD.shape[0])
        dtype = _product_dtype(head_VD)
        shared_VD = head_VD[:used].to(dtype)
        kl_sum = hidden_TD.new_zeros((), dtype=torch.float64)
        nll_sum = hidden_TD.new_zeros((), dtype=torch.float64)
        need_hidden, need_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_TD) if need_hidden else None
        grad_head = torch.zeros_like(head_VD) if need_head else None
        square = settings.temperature**2
        for start in range(0, hidden_TD.shape[0], settings.chunk_tokens):
            stop = min(start + settings.chunk_tokens, hidden_TD.shape[0])
            hidden_CD, labels_C = hidden_TD[start:stop].to(dtype), labels_T[start:stop]
            logits_CV = _wide(F.linear(hidden_CD, shared_VD))
            labelled_C = labels_C != IGNORE
            targets_C = labels_C.clamp_min(0).unsqueeze(-1)
            weight = settings.next_token_weight
            nll_C = logits_CV.logsumexp(dim=-1) - logits_CV.gather(-1, targets_C).squeeze(-1)
            nll_sum += nll_C[labelled_C].sum(dtype=torch.float64)
            by_next = None
            if weight and (need_hidden or need_head):
                by_next = logits_CV.softmax(dim=-1)
                by_next.scatter_add_(-1, targets_C, torch.full_like(targets_C, -1, dtype=by_next.dtype))
                by_next.mul_(labelled_C.unsqueeze(-1)).mul_(weight)
            value_C, grad_CV = teacher.divergence(logits_CV.div_(settings.temperature), start, stop, settings)
            kl_sum += value_C.sum(dtype=torch.float64) * square
            if need_hidden or need_head:
                grad_CV.mul_(settings.temperature)
                if by_next is not None:
                    grad_CV.add_(by_next)
                grad_CV = grad_CV.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[start:stop] = grad_CV @ shared_VD
                if grad_head is not None and grad_head.dtype == dtype:
                    grad_head[:used].addmm_(grad_CV.t(), hidden_CD)
                elif grad_head is not None:
                    grad_head[:used].add_(grad_CV.t() @ hidden_CD)
        ctx.grads = (grad_hidden, grad_head)
        loss = kl_sum + settings.next_token_weight * nll_sum
        ctx.mark_non_differentiable(kl_sum, nll_sum)
        return loss.to(torch.promote_types(hidden_TD.dtype, torch.float32)), kl_sum, nll_sum

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else grad.mul_(grad_outputs[0].to(grad.dtype)) for grad in ctx.grads]
        ctx.grads = None
        return (*grads, None, None, None)


@dataclass(frozen=True)
class DistillationSums:
    """Sums over the tokens of a batch.

    Attributes:
        loss: Divergence plus weighted next-token loss, differentiable once.
        kl: Divergence alone.
        nll: Next-token cross-entropy, over the tokens that have a label.
    """

    loss: Tensor
    kl: Tensor
    nll: Tensor


def chunked_distillation(
    hidden_TD: Tensor, head_VD: Tensor, labels_T: Tensor, teacher: TeacherChunks, settings: LossSettings
) -> DistillationSums:
    """Return the distillation loss summed over tokens, without ever holding all logits.

    Args:
        hidden_TD: The student's last hidden states at the tokens that count.
        head_VD: The student's output head.
        labels_T: Next token of each, or ``IGNORE``.
        teacher: The teacher at the same tokens.
        settings: What to minimize.
    """
    return DistillationSums(*_ChunkedDistillation.apply(hidden_TD, head_VD, labels_T, teacher, settings))
