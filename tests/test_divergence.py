"""The distillation head's divergence against autograd of the plain formula in float64; what the head costs in memory.

Shapes: C tokens, V vocabulary.
"""

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qad import cpu_compiler, native
from qad import divergence as reference
from qad.losses import KL_MODES

IMPLEMENTATIONS = ["reference", *cpu_compiler.instruction_sets()]
KINDS = [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.125), ("jsd", 0.875)]


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with the reference, and with the kernels of every instruction set that this machine has."""
    if request.param == "reference":
        yield request.param
        return
    if reason := native.available():
        pytest.skip(reason)
    native.force_instruction_set(request.param)
    yield request.param
    native.release_instruction_set()


def run(
    implementation: str,
    student_CV: Tensor,
    teacher_CV: Tensor,
    labels_C: Tensor,
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: float = 0.0,
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    call = reference.divergence if implementation == "reference" else native.divergence
    return call(
        student_CV,
        teacher_CV,
        labels_C,
        kind=kind,
        beta=beta,
        temperature=temperature,
        next_token_weight=weight,
        keep_logits=keep_logits,
    )


def by_the_book(
    student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, kind: str, beta: float, temperature: float, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (divergence_C, nll_C, gradient_CV) in float64."""
    z = student_CV.double().requires_grad_()
    log_q, log_p = ((x / temperature).log_softmax(-1) for x in (z, teacher_CV.double()))
    p, q = log_p.exp(), log_q.exp()

    def mean(probability: Tensor, x: Tensor) -> Tensor:
        return torch.where(probability == 0, 0.0, probability * x).sum(-1)

    if kind == "forward":
        value = mean(p, log_p - log_q)
    elif kind == "reverse":
        value = mean(q, log_q - log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        value = beta * mean(p, log_p - log_m) + (1 - beta) * mean(q, log_q - log_m)
    nll = F.cross_entropy(z, labels_C, ignore_index=-100, reduction="none")
    (gradient,) = torch.autograd.grad((value * temperature**2 + weight * nll).sum(), z)
    return value.detach(), nll.detach(), gradient


def example(tokens: int, vocabulary: int, apart: float = 1.0, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return student_CV, teacher_CV, labels_C; every third token has no label."""
    generator = torch.Generator().manual_seed(vocabulary)
    teacher = torch.randn(tokens, vocabulary, generator=generator) * scale
    student = teacher + torch.randn(tokens, vocabulary, generator=generator) * apart
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[::3] = -100
    return student, teacher, labels


def check(
    implementation: str,
    parts: tuple[Tensor, Tensor, Tensor],
    kind: str,
    beta: float = 0.5,
    temperature: float = 1.0,
    weight: float = 0.0,
    tiny: float = 1e-12,
) -> None:
    """Compare with the plain formula: losses to 1e-6, gradients to 1e-6 of a row's largest plus two roundings of 1.

    Probabilities near 1 are what float32 can tell apart to 6e-8; a gradient is a difference of such.
    """
    wanted_value, wanted_nll, wanted = by_the_book(*parts, kind, beta, temperature, weight)
    student, teacher, labels = parts
    gradient = student.clone()
    value, nll = run(implementation, gradient, teacher, labels, kind, beta, temperature, weight)
    assert value.dtype == nll.dtype == torch.float64
    # The reference rounds each log-probability: where the models agree, that is all that is left of the divergence.
    allowed = 1e-6 * wanted_value.abs() + (tiny if implementation != "reference" else 3e-6)
    assert bool(((value - wanted_value).abs() <= allowed).all()), (value, wanted_value)
    assert torch.allclose(nll, wanted_nll, rtol=1e-6, atol=1e-7 if implementation != "reference" else 3e-6)
    slack = 1.2e-7 if implementation != "reference" else 3e-6
    error = (gradient.double() - wanted).abs().amax(-1)
    assert bool((error <= 1e-6 * wanted.abs().amax(-1) + slack * (temperature + weight)).all()), error


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("vocabulary", [1, 3, 17, 1000])
def test_values_and_gradients_are_those_of_the_plain_formula(
    implementation: str, kind: str, beta: float, vocabulary: int
) -> None:
    for temperature in (0.5, 1.0, 2.0):
        for weight in (0.0, 0.3):
            check(implementation, example(7, vocabulary), kind, beta, temperature, weight)


@pytest.mark.parametrize("kind", KL_MODES)
def test_sums_over_a_real_vocabulary_keep_their_digits(implementation: str, kind: str) -> None:
    check(implementation, example(3, 49152 + 1), kind, temperature=2.0, weight=0.3)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("apart", [1e-1, 1e-3])
def test_models_that_nearly_agree(implementation: str, kind: str, beta: float, apart: float) -> None:
    """The terms of such a divergence cancel; the kernels keep six digits of what is left."""
    check(implementation, example(5, 999, apart), kind, beta, tiny=0.0)


@pytest.mark.parametrize("kind", KL_MODES)
def test_rows_that_are_nearly_certain(implementation: str, kind: str) -> None:
    student, teacher, labels = example(4, 333, scale=1.0)
    student[:, 7] += 20.0
    teacher[:, 7] += 22.0
    labels[:] = 7
    check(implementation, (student, teacher, labels), kind, weight=0.3)
    if implementation == "reference":
        return
    # Beyond what float32 knows of probabilities near 1: still the digits of the gradient itself.
    wanted = by_the_book(student, teacher, labels, kind, 0.5, 1.0, 0.3)[2]
    run(implementation, student, teacher, labels, kind, weight=0.3)
    assert bool(((student.double() - wanted).abs().amax(-1) <= 2e-6 * wanted.abs().amax(-1)).all())


@pytest.mark.parametrize("kind", KL_MODES)
def test_logits_that_differ_by_a_large_constant(implementation: str, kind: str) -> None:
    student, teacher, labels = example(5, 257)
    check(implementation, (student + 300.0, teacher, labels), kind, weight=0.3)


@pytest.mark.parametrize("kind", KL_MODES)
def test_extreme_logits(implementation: str, kind: str) -> None:
    student = torch.tensor([[200.0, -200.0, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, -1e4], [1e4, 1e4 - 1, 0.0]])
    teacher = torch.tensor([[-200.0, 200.0, 0.0], [1e4, -1e4, 0.0], [-1e4, 1e4, 1e4], [1e4, 1e4 - 2, 5.0]])
    labels = torch.tensor([0, 0, -100, 1])
    for temperature in (0.5, 1.0, 2.0):
        check(implementation, (student, teacher, labels), kind, temperature=temperature, weight=0.3)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_entries_that_both_models_mask_are_as_if_they_were_not_there(
    implementation: str, kind: str, beta: float
) -> None:
    student, teacher, labels = example(6, 100)
    labels = labels.clamp_max(79)
    masked, masked_teacher = (F.pad(logits[:, :80], (0, 20), value=-math.inf) for logits in (student, teacher))
    wanted_value, wanted_nll, wanted = by_the_book(student[:, :80], teacher[:, :80], labels, kind, beta, 2.0, 0.3)
    value, nll = run(implementation, masked, masked_teacher, labels, kind, beta, 2.0, 0.3)
    assert torch.allclose(value, wanted_value, rtol=2e-6, atol=1e-7)
    assert torch.allclose(nll, wanted_nll, rtol=2e-6)
    assert torch.allclose(masked[:, :80].double(), wanted, atol=3e-6)
    assert not masked[:, 80:].any()


def test_what_one_model_rules_out(implementation: str) -> None:
    """Infinite where the definition says so, finite where it does not."""
    full, holed = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.0, -math.inf, 2.0]])
    labels = torch.tensor([0])
    for kind, student, teacher, infinite in [
        ("forward", holed, full, True),
        ("forward", full, holed, False),
        ("reverse", full, holed, True),
        ("reverse", holed, full, False),
        ("jsd", holed, full, False),
        ("jsd", full, holed, False),
    ]:
        gradient = student.clone()
        value, nll = run(implementation, gradient, teacher, labels, kind, weight=0.3)
        assert bool(torch.isinf(value[0])) == infinite, kind
        assert bool(torch.isfinite(nll[0]))
        if not infinite:
            assert bool(torch.isfinite(gradient).all())
            assert torch.allclose(value, by_the_book(student, teacher, labels, kind, 0.5, 1.0, 0.0)[0], rtol=2e-6)


@pytest.mark.parametrize("kind", KL_MODES)
@pytest.mark.parametrize("damaged", ["student", "teacher"])
def test_a_nan_spreads_over_its_row_and_no_further(implementation: str, kind: str, damaged: str) -> None:
    student, teacher, labels = example(3, 50)
    clean = student.clone()
    clean_value, _ = run(implementation, clean, teacher, labels, kind)
    (student if damaged == "student" else teacher)[1, 33] = math.nan
    value, _ = run(implementation, student, teacher, labels, kind)
    assert torch.isnan(value).tolist() == [False, True, False]
    assert bool(torch.isnan(student[1]).all())
    assert torch.equal(student[[0, 2]], clean[[0, 2]])
    assert torch.equal(value[[0, 2]], clean_value[[0, 2]])


@pytest.mark.parametrize("kind", KL_MODES)
def test_logits_that_are_kept(implementation: str, kind: str) -> None:
    student, teacher, labels = example(4, 77)
    kept, overwritten = student.clone(), student.clone()
    values = [
        run(implementation, logits, teacher, labels, kind, temperature=2.0, weight=0.3, keep_logits=keep)
        for logits, keep in ((kept, True), (overwritten, False))
    ]
    assert torch.equal(kept, student)
    assert not torch.equal(overwritten, student)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*values, strict=True))


def test_tokens_without_a_label_have_no_next_token_loss(implementation: str) -> None:
    student, teacher, labels = example(4, 77)
    unlabelled, weightless = student.clone(), student.clone()
    _, nll = run(implementation, unlabelled, teacher, torch.full_like(labels, -1), "forward", weight=0.3)
    run(implementation, weightless, teacher, labels, "forward")
    assert not nll.any()
    assert torch.equal(unlabelled, weightless)


def kernels_or_skip() -> None:
    if reason := native.available():
        pytest.skip(reason)


def test_no_labels_at_all() -> None:
    if reason := native.available():
        pytest.skip(reason)
    student, teacher, labels = example(4, 50)
    rest = {"kind": "jsd", "beta": 0.5, "temperature": 2.0, "next_token_weight": 0.3, "keep_logits": False}
    expected = student.clone()
    value, nll = native.divergence(expected, teacher, torch.full_like(labels, -100), **rest)
    got = native.divergence(student, teacher, None, **rest)
    assert torch.equal(got[0], value)
    assert torch.equal(got[1], nll)
    assert torch.equal(student, expected)


def test_a_label_outside_the_vocabulary_is_seen() -> None:
    kernels_or_skip()
    student, teacher, _ = example(2, 9)
    _, nll = run("best", student, teacher, torch.tensor([9, 8]), "forward", weight=0.3)
    assert torch.isnan(nll).tolist() == [True, False]


@pytest.mark.parametrize("kind", KL_MODES)
@pytest.mark.parametrize("vocabulary", [1, 15, 16, 50])
def test_rows_apart_and_off_alignment(implementation: str, kind: str, vocabulary: int) -> None:
    student, teacher, labels = example(3, vocabulary)
    wanted = student.clone()
    value, _ = run(implementation, wanted, teacher, labels, kind, weight=0.3)
    for gap, shift in ((0, 1), (3, 0), (5, 2)):
        rooms = [torch.full((3 * (vocabulary + gap) + shift,), 123.0) for _ in range(2)]
        ours, theirs = (room[shift:].view(3, vocabulary + gap)[:, :vocabulary] for room in rooms)
        ours.copy_(student)
        theirs.copy_(teacher)
        there, _ = run(implementation, ours, theirs, labels, kind, weight=0.3)
        assert torch.equal(there, value)
        assert torch.equal(ours, wanted)
        assert torch.equal(theirs, teacher)
        for room in rooms:
            assert bool((room[:shift] == 123.0).all())
            assert bool((room[shift:].view(3, -1)[:, vocabulary:] == 123.0).all())


@pytest.mark.parametrize("kind", KL_MODES)
def test_any_number_of_threads_gives_the_same_bits(kind: str) -> None:
    kernels_or_skip()
    student, teacher, labels = example(5, 300)
    results: list[tuple[Tensor, ...]] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            logits = student.clone()
            results.append((*run("best", logits, teacher, labels, kind, weight=0.3), logits))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(result, results[0], strict=True))


# ---------------------------------------------------------------------------------------------------- memory

# What the system says, so that memory of the matrix products counts too. The peak is that of the process since its
# start: what happened before can only make the figure worse.
_PEAK = textwrap.dedent("""
    import json, sys
    import torch
    from qad.losses import CachedTeacher, LiveTeacher, LossSettings, chunked_distillation

    kind, source, sizes = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    tokens, vocabulary, width, chunk = sizes
    torch.set_num_threads(1)
    head = torch.nn.Parameter(torch.randn(vocabulary, width))
    teacher_head = torch.randn(vocabulary, width)
    hidden, teacher_hidden = torch.randn(tokens, width, requires_grad=True), torch.randn(tokens, width)
    labels = torch.randint(vocabulary, (tokens,))
    settings = LossSettings(kind, next_token_weight=0.1, chunk_tokens=chunk)

    def resident(what):
        # Not getrusage: its peak starts with that of the process that started this one.
        with open("/proc/self/status") as file:
            return 1024 * next(int(line.split()[1]) for line in file if line.startswith(what))

    def step(count, head):
        if source == "live":
            teacher = LiveTeacher(teacher_hidden[:count], teacher_head[:len(head)])
        else:
            teacher = CachedTeacher(torch.arange(20).repeat(count, 1), torch.full((count, 20), -4.0))
        chunked_distillation(hidden[:count], head, labels[:count] % len(head), teacher, settings).loss.backward()

    step(chunk, torch.nn.Parameter(torch.randn(500, width)))
    hidden.grad = None
    before = resident("VmRSS")
    step(tokens, head)
    print(resident("VmHWM") - before)
""")


def peak_bytes(kind: str, source: str, *sizes: int) -> int:
    """Return by how much forward and backward of the head raise the memory of a process."""
    command = [sys.executable, "-c", _PEAK, kind, source, json.dumps(sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is read from /proc")
@pytest.mark.parametrize(("kind", "source"), [("forward", "live"), ("jsd", "live"), ("forward", "cached")])
def test_peak_memory_is_the_heads_gradient_and_one_chunk(kind: str, source: str) -> None:
    kernels_or_skip()
    tokens, vocabulary, width, chunk = 384, 32768, 256, 64
    head, logits = vocabulary * width * 4, chunk * vocabulary * 4
    # The gradient of the hidden states; a few MiB for what matrix products pack and allocators round up; where the
    # teacher is cached, the plain-torch formula over `reference.ROWS` rows at a time.
    small = tokens * width * 4 + 6 * 2**20 + (4 * reference.ROWS * vocabulary * 4 if source == "cached" else 0)
    peak = peak_bytes(kind, source, tokens, vocabulary, width, chunk)
    assert peak < head + logits + small, (peak, head, logits)
    # All logits of both models at once would not fit in the bound: it tells.
    assert 2 * tokens * vocabulary * 4 > head + logits + small
