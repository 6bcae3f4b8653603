"""Distillation losses, computed from hidden states in chunks of tokens.

The logits of a 150k-word vocabulary are the largest tensor of a training step. Here a chunk of tokens at a time is
projected, compared and turned into gradients at once, so that neither model's [tokens, vocabulary] logits exist as a
whole, nor logits together with a stored softmax: the student's are overwritten with their own gradient. Beyond the
gradients that are asked for, the memory of one chunk is all that forward and backward need. What is given up: the
gradients are computed in forward, so this must be the last operation of the graph, and gradients of gradients do not
exist.

Shapes: T tokens, C tokens of a chunk, D student width, E teacher width, V vocabulary, P cached entries per token.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from qad import divergence as reference
from qad import ops
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
        beta: Weight of the teacher in ``jsd``, within (0, 1). Near 1 the divergence is a small difference: the kernels'
            relative error is 1e-6 up to 0.9, 1e-5 at 0.99 and 1e-3 at 0.9999.
        temperature: Divides both models' logits; the divergence is multiplied by its square (Hinton et al., 2015).
        next_token_weight: Weight of the plain next-token cross-entropy, which is added.
        kl_weight: Weight of the divergence. 0: there is no teacher, and ``NoTeacher`` takes its place.
        chunk_tokens: Rows of logits that a chunk may take in memory, those of both models counted: with a live teacher
            less than half as many tokens are worked on. Fewer than some 100 tokens at a time make products slower.
    """

    kl: str = "forward"
    beta: float = 0.5
    temperature: float = 1.0
    next_token_weight: float = 0.0
    chunk_tokens: int = 256
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kl not in KL_MODES:
            raise unknown_name("divergence", self.kl, list(KL_MODES))
        if not 0.0 < self.beta < 1.0:
            raise UserError(
                f"beta must lie between 0 and 1, not {self.beta}: for 0 use --kl forward, for 1 --kl reverse"
            )
        if not 0.0 < self.temperature < math.inf:
            raise UserError(f"the temperature must be a positive number, not {self.temperature}")
        if not 0.0 <= self.kl_weight < math.inf:
            raise UserError(f"kl_weight must be a number from 0 on, not {self.kl_weight}")
        if self.kl_weight == 0.0 and not self.next_token_weight > 0.0:
            raise UserError("kl_weight 0 leaves nothing to minimize: give --next-token-weight, such as 1")

    @property
    def needs_teacher(self) -> bool:
        """Whether the loss has a divergence in it."""
        return self.kl_weight > 0.0


class TeacherChunks(Protocol):
    """Where a chunk's teacher distribution comes from."""

    logits_dtype: torch.dtype | None
    """What the teacher's logits are computed in; None if there are none."""

    def vocabulary(self, student_vocabulary: int) -> int:
        """Return how many leading logits both models share; those behind are padding."""
        ...

    def divergence(
        self, logits: "ChunkLogits", labels_C: Tensor, start: int, settings: LossSettings, keep_logits: bool
    ) -> tuple[Tensor, Tensor]:
        """Overwrite the student's logits with the loss's gradient; see ``qad.divergence.divergence``.

        Args:
            logits: The student's logits of the chunk, and room for the teacher's.
            labels_C: Next token of each, negative for none.
            start: Where the chunk begins.
            settings: What to minimize.
            keep_logits: No gradient is wanted.

        Returns:
            float64 divergence_C and next-token loss nll_C.
        """
        ...


class ChunkLogits:
    """Memory for the logits of one chunk of tokens, used again for every chunk.

    All of it together is no more than the logits of ``chunk_tokens`` tokens of one model: chunks get shorter where the
    teacher's logits, or products in a shorter dtype, need room as well.

    Args:
        chunk_tokens: Rows of logits in float32 (float64 where the student is) that may exist.
        tokens: All tokens of the batch.
        head_VD: The student's head, which gives vocabulary, device and dtype.
        teacher_dtype: See ``TeacherChunks.logits_dtype``.
    """

    def __init__(self, chunk_tokens: int, tokens: int, head_VD: Tensor, teacher_dtype: torch.dtype | None) -> None:
        vocabulary, device = head_VD.shape[0], head_VD.device
        self._product_dtype = head_VD.dtype
        dtype = torch.float64 if head_VD.dtype == torch.float64 else torch.float32
        models = 1 if teacher_dtype is None else 2
        others = {other for other in (head_VD.dtype, teacher_dtype) if other is not None and other != dtype}
        per_token = dtype.itemsize * models + sum(other.itemsize for other in others)
        # A quarter of the chunk is left to the gradient of the hidden states and to what matrix products pack, so that
        # all of them stay within it. (MKL packs next to nothing on an Intel and 5 MiB on an AMD.)
        self.tokens = max(1, min(tokens, chunk_tokens * dtype.itemsize * 3 // 4 // per_token))
        rows_CV = torch.empty(models * self.tokens, vocabulary, dtype=dtype, device=device)
        self._student_CV, self._teacher_CV = rows_CV[: self.tokens], rows_CV[self.tokens :]
        self._products = {other: torch.empty(self.tokens, vocabulary, dtype=other, device=device) for other in others}
        self.student_CV = self._student_CV

    def project_student(self, hidden_CD: Tensor, head_VD: Tensor) -> None:
        """Set ``student_CV`` to the logits of some tokens, at most ``tokens``."""
        self.student_CV = self._project(hidden_CD, head_VD, self._student_CV)

    def project_teacher(self, hidden_CE: Tensor, head_VE: Tensor) -> Tensor:
        """Return the teacher's logits of the same tokens."""
        return self._project(hidden_CE, head_VE, self._teacher_CV)

    def _project(self, hidden_CD: Tensor, head_VD: Tensor, rows_CV: Tensor) -> Tensor:
        logits_CV = rows_CV[: len(hidden_CD)]
        if hidden_CD.dtype == logits_CV.dtype:
            return torch.mm(hidden_CD, head_VD.t(), out=logits_CV)
        product_CV = self._products[hidden_CD.dtype][: len(hidden_CD)]
        return logits_CV.copy_(torch.mm(hidden_CD, head_VD.t(), out=product_CV))

    def gradient(self) -> Tensor:
        """Return what ``student_CV`` holds, in the dtype of the student's head."""
        if self._product_dtype == self.student_CV.dtype:
            return self.student_CV
        return self._products[self._product_dtype][: len(self.student_CV)].copy_(self.student_CV)


class LiveTeacher:
    """A teacher at hand: its last hidden states and output head.

    Args:
        hidden_TE: Last hidden states of the tokens.
        head_VE: Output head.
    """

    def __init__(self, hidden_TE: Tensor, head_VE: Tensor) -> None:
        dtype = _product_dtype(head_VE)
        self.logits_dtype: torch.dtype | None = dtype
        self._hidden_TE = hidden_TE.to(dtype)
        self._head_VE = head_VE.to(dtype)

    def vocabulary(self, student_vocabulary: int) -> int:
        """Vocabularies padded to different sizes share their leading entries."""
        return min(student_vocabulary, self._head_VE.shape[0])

    def divergence(
        self, logits: ChunkLogits, labels_C: Tensor, start: int, settings: LossSettings, keep_logits: bool
    ) -> tuple[Tensor, Tensor]:
        """See ``TeacherChunks``."""
        student_CV = logits.student_CV
        tokens, vocabulary = student_CV.shape
        teacher_CV = logits.project_teacher(self._hidden_TE[start : start + tokens], self._head_VE[:vocabulary])
        return ops.divergence(
            student_CV,
            teacher_CV,
            labels_C,
            kind=settings.kl,
            beta=settings.beta,
            temperature=settings.temperature,
            next_token_weight=settings.next_token_weight,
            keep_logits=keep_logits,
        )


class NoTeacher:
    """Supervised training: the next-token loss alone. The divergence is 0, and so is its weight."""

    logits_dtype: torch.dtype | None = None

    def vocabulary(self, student_vocabulary: int) -> int:
        """The student's own."""
        return student_vocabulary

    def divergence(
        self, logits: ChunkLogits, labels_C: Tensor, start: int, settings: LossSettings, keep_logits: bool
    ) -> tuple[Tensor, Tensor]:
        """See ``TeacherChunks``."""
        assert not settings.needs_teacher
        student_CV = logits.student_CV
        nll_C = torch.empty(len(student_CV), dtype=torch.float64, device=student_CV.device)
        for first in range(0, len(student_CV), reference.ROWS):
            part = slice(first, first + reference.ROWS)
            log_probs = student_CV[part].log_softmax(dim=-1)
            nll_C[part] = reference.next_token_loss(log_probs, labels_C[part])
            if not keep_logits:
                student_CV[part] = 0.0
                reference.add_next_token_gradient(
                    student_CV[part], log_probs, labels_C[part], settings.next_token_weight
                )
        return torch.zeros_like(nll_C), nll_C


class CachedTeacher:
    """A teacher's top entries from a cache, the rest of its mass in one bucket.

    Args:
        tokens_TP: Vocabulary indices of each token's most probable continuations.
        log_probs_TP: Their log-probabilities at temperature 1.
    """

    logits_dtype: torch.dtype | None = None

    def __init__(self, tokens_TP: Tensor, log_probs_TP: Tensor) -> None:
        self._tokens_TP = tokens_TP
        self._log_probs_TP = log_probs_TP

    def vocabulary(self, student_vocabulary: int) -> int:
        """The student's own: the cache names single entries."""
        return student_vocabulary

    def divergence(
        self, logits: ChunkLogits, labels_C: Tensor, start: int, settings: LossSettings, keep_logits: bool
    ) -> tuple[Tensor, Tensor]:
        """See ``TeacherChunks``."""
        part = slice(start, start + len(labels_C))
        return bucket_divergence(
            logits.student_CV, self._tokens_TP[part], self._log_probs_TP[part], labels_C, settings, keep_logits
        )


def _product_dtype(head_VD: Tensor) -> torch.dtype:
    """Return the dtype to multiply with a head: autocast's, where it is on, else the head's own.

    Chosen here, once per batch, because autocast itself would cast the whole head anew for every chunk of tokens.
    """
    device = head_VD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head_VD.dtype


def bucket_divergence(
    student_CV: Tensor,
    tokens_CP: Tensor,
    log_probs_CP: Tensor,
    labels_C: Tensor,
    settings: LossSettings,
    keep_logits: bool,
) -> tuple[Tensor, Tensor]:
    """Like ``qad.divergence.divergence`` over P named entries and one bucket for everything else.

    With a temperature other than 1 the teacher's entries are tempered among themselves and the bucket, which differs
    from tempering the whole vocabulary: the cache does not hold what that would need.
    """
    value_C = torch.empty(len(student_CV), dtype=torch.float64, device=student_CV.device)
    nll_C = torch.empty_like(value_C)
    for start in range(0, len(student_CV), reference.ROWS):
        part = slice(start, start + reference.ROWS)
        log_probs = student_CV[part].log_softmax(dim=-1)
        log_q = log_probs
        if settings.temperature != 1.0:
            log_q = (student_CV[part] / settings.temperature).log_softmax(dim=-1)
        value_C[part], gradient = _buckets(log_q, tokens_CP[part], log_probs_CP[part], settings)
        nll_C[part] = reference.next_token_loss(log_probs, labels_C[part])
        if not keep_logits:
            gradient.mul_(settings.temperature)
            reference.add_next_token_gradient(gradient, log_probs, labels_C[part], settings.next_token_weight)
            student_CV[part] = gradient
    return value_C, nll_C


def _buckets(
    log_q_CV: Tensor, tokens_CP: Tensor, log_probs_CP: Tensor, settings: LossSettings
) -> tuple[Tensor, Tensor]:
    """Return the divergence per row and its gradient by the student's tempered logits."""
    log_p = _with_rest(log_probs_CP) / settings.temperature
    log_p = log_p - log_p.logsumexp(dim=-1, keepdim=True)
    log_q = _with_rest(log_q_CV.gather(-1, tokens_CP)).requires_grad_()
    # The divergence of P + 1 buckets is tiny; autograd differentiates it, the scatter below carries it to V logits.
    with torch.enable_grad():
        value_C = _bucket_value(log_q, log_p, settings)
        (by_log_q,) = torch.autograd.grad(value_C.sum(), log_q)
    # Chain rule from the buckets' log-probabilities to logits z: a named entry j has d log q_j / dz = 1_j - q; the
    # rest bucket has d log r / dz = (q / r outside, 0 inside) - q.
    q_CV = log_q_CV.exp()
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


def _add_outer_products(grad_VD: Tensor, grad_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add ``grad_CV.T @ hidden_CD`` in place."""
    if grad_VD.dtype == grad_CV.dtype:
        grad_VD.addmm_(grad_CV.t(), hidden_CD)
        return
    # There is no product of one dtype into a sum of another: parts of the vocabulary keep the product small.
    step = 8192
    for first in range(0, len(grad_VD), step):
        grad_VD[first : first + step].add_(grad_CV[:, first : first + step].t() @ hidden_CD)


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
        labels_T = labels_T.contiguous()
        # A teacher knows a divergence of weight 1: the weight is put on the gradients, and out of the other term.
        weight = settings.kl_weight if settings.needs_teacher else 1.0
        relative = replace(settings, next_token_weight=settings.next_token_weight / weight)
        logits = ChunkLogits(settings.chunk_tokens, hidden_TD.shape[0], shared_VD, teacher.logits_dtype)
        for start in range(0, hidden_TD.shape[0], logits.tokens):
            part = slice(start, min(start + logits.tokens, hidden_TD.shape[0]))
            hidden_CD = hidden_TD[part].to(dtype)
            logits.project_student(hidden_CD, shared_VD)
            keep_logits = not (need_hidden or need_head)
            value_C, nll_C = teacher.divergence(logits, labels_T[part], start, relative, keep_logits)
            kl_sum += value_C.sum() * settings.temperature**2
            nll_sum += nll_C.sum()
            if keep_logits:
                continue
            grad_CV = logits.gradient()
            if grad_hidden is not None:
                grad_hidden[part] = grad_CV @ shared_VD
            if grad_head is not None:
                _add_outer_products(grad_head[:used], grad_CV, hidden_CD)
        if weight != 1.0:
            for grad in (grad_hidden, grad_head):
                if grad is not None:
                    grad.mul_(weight)
        ctx.grads = (grad_hidden, grad_head)
        loss = settings.kl_weight * kl_sum + settings.next_token_weight * nll_sum
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
        loss: Weighted divergence plus weighted next-token loss, differentiable once.
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
        teacher: The teacher at the same tokens; ``NoTeacher`` where the divergence has no weight.
        settings: What to minimize.
    """
    assert settings.needs_teacher != isinstance(teacher, NoTeacher)
    return DistillationSums(*_ChunkedDistillation.apply(hidden_TD, head_VD, labels_T, teacher, settings))
