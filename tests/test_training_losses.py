"""The losses of training against float64 formulas written out, finite differences, and what theory says of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.errors import UsageError
from qtool.training import losses
from qtool.training.losses import TopK, cross_entropy, divergence, state_error, summed_by_slices, top_k
from qtool.training.objective import DIVERGENCES, Objective

KINDS = [kind for kind in DIVERGENCES if kind != "none"]
every_kind = pytest.mark.parametrize("kind", KINDS)
seeds = st.integers(0, 2**31)
temperatures = st.sampled_from([0.5, 1.0, 2.0, 7.0])


def logits(seed: int, tokens: int = 3, vocabulary: int = 11, size: float = 3.0) -> Tensor:
    return size * torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed))


def probabilities(row: list[float], temperature: float) -> list[float]:
    powers = [math.exp(z / temperature) for z in row]
    return [power / sum(powers) for power in powers]


def naive(kind: str, student: list[float], teacher: list[float]) -> float:
    """A divergence of two lists of probabilities."""

    def kl(a: list[float], b: list[float]) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    if kind == "kl":
        return kl(teacher, student)
    if kind == "reverse-kl":
        return kl(student, teacher)
    middle = [(x + y) / 2 for x, y in zip(student, teacher, strict=True)]
    return kl(teacher, middle) / 2 + kl(student, middle) / 2


def lumped(values: list[float], ids: list[int]) -> list[float]:
    """The kept ones, and the sum of all others, where there are any."""
    rest = [value for i, value in enumerate(values) if i not in ids]
    return [values[i] for i in ids] + ([sum(rest)] if rest else [])


def check(found: Tensor, expected: list[float]) -> None:
    gap = (found.double() - torch.tensor(expected, dtype=torch.float64)).abs().max()
    assert gap < 2e-6 * max(1.0, *map(abs, expected)), f"max difference {gap:.3e} of {expected}"


@every_kind
@given(seeds, temperatures)
@settings(max_examples=15, deadline=None)
def test_divergences_are_their_formulas(kind: str, seed: int, temperature: float) -> None:
    student, teacher = logits(seed), logits(seed + 1)
    expected = [
        naive(kind, probabilities(s, temperature), probabilities(t, temperature))
        for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True)
    ]
    check(divergence(kind, student, teacher, temperature), expected)


@every_kind
@given(seeds, temperatures, st.integers(1, 14))
@settings(max_examples=15, deadline=None)
def test_the_top_and_all_others_as_one(kind: str, seed: int, temperature: float, k: int) -> None:
    student, teacher = logits(seed), logits(seed + 1)
    top = top_k(teacher, k, temperature)
    expected = []
    for s, t in zip(student.double().tolist(), teacher.double().tolist(), strict=True):
        p = probabilities(t, temperature)
        ids = sorted(range(len(p)), key=lambda i: -p[i])[:k]
        expected.append(naive(kind, lumped(probabilities(s, temperature), ids), lumped(p, ids)))
    check(divergence(kind, student, top, temperature), expected)
    if k >= 11:
        assert torch.equal(top.log_tail_S, torch.full((3,), -torch.inf))
        assert torch.allclose(
            divergence(kind, student, top, temperature), divergence(kind, student, teacher, temperature), atol=1e-6
        )


@given(seeds, temperatures, st.integers(1, 10))
@settings(max_examples=20, deadline=None)
def test_less_that_is_known_is_less_divergence(seed: int, temperature: float, k: int) -> None:
    """Lumping categories can only lose (the data processing inequality), for all three."""
    student, teacher = logits(seed), logits(seed + 1)
    for kind in KINDS:
        few, more = (divergence(kind, student, top_k(teacher, n, temperature), temperature) for n in (k, k + 1))
        full = divergence(kind, student, teacher, temperature)
        assert (few >= -1e-6).all()
        assert (few <= more + 1e-5).all(), (kind, few, more)
        assert (more <= full + 1e-5).all(), (kind, more, full)


@given(seeds, temperatures)
@settings(max_examples=20, deadline=None)
def test_jsd_is_symmetric_and_bounded(seed: int, temperature: float) -> None:
    student, teacher = logits(seed, size=30.0), logits(seed + 1, size=30.0)
    found = divergence("jsd", student, teacher, temperature)
    assert torch.allclose(found, divergence("jsd", teacher, student, temperature), atol=1e-6)
    assert (found >= -1e-6).all()
    assert (found <= math.log(2) + 1e-6).all()
    certain = torch.tensor([[100.0, 0.0]]), torch.tensor([[0.0, 100.0]])
    assert divergence("jsd", *certain).item() == pytest.approx(math.log(2))


@every_kind
def test_nothing_to_learn_from_itself(kind: str) -> None:
    student = logits(0).requires_grad_()
    found = divergence(kind, student, student.detach(), 2.0)
    found.sum().backward()
    assert student.grad is not None
    assert found.abs().max() < 1e-6
    assert student.grad.abs().max() < 1e-6


@every_kind
@pytest.mark.parametrize("k", [None, 1, 4, 11])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_are_finite_differences(
    kind: str, k: int | None, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)  # differences of float32 say little
    student, teacher = (logits(seed, tokens=2).double() for seed in (3, 4))
    known: Tensor | TopK = top_k(teacher, k, temperature) if k else teacher
    assert torch.autograd.gradcheck(lambda z: divergence(kind, z, known, temperature), student.requires_grad_())


def test_gradients_of_the_other_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    student, teacher = (logits(seed).double().requires_grad_() for seed in (3, 4))
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, torch.tensor([1, 0, 10])), student)
    assert torch.autograd.gradcheck(lambda z: state_error(z, teacher.detach()), student)


def test_the_gradient_keeps_its_size_over_temperature() -> None:
    """Of T^2 KL it is T (q - p), which for large T tends to (z_s - z_t) / V for logits of mean 0 (Hinton, sec. 2)."""
    student, teacher = (z - z.mean(1, keepdim=True) for z in (logits(5), logits(6)))
    sizes = {}
    for temperature in (1.0, 4.0, 30.0, 300.0):
        z = student.clone().requires_grad_()
        (temperature**2 * divergence("kl", z, teacher, temperature)).sum().backward()
        assert z.grad is not None
        p, q = (torch.softmax(x / temperature, 1) for x in (teacher, student))
        assert torch.allclose(z.grad, temperature * (q - p), atol=1e-3), temperature
        sizes[temperature] = z.grad.norm().item()
        if temperature >= 30:
            limit = (student - teacher) / student.shape[1]
            assert (z.grad - limit).norm() < 6 / temperature * limit.norm()
    assert max(sizes.values()) < 3 * min(sizes.values()), sizes
    assert divergence("kl", student, teacher, 300.0).max() < 1e-3, "without the factor it would vanish"


def test_a_longer_vocabulary_is_cut() -> None:
    student, teacher = logits(7, vocabulary=13), logits(8, vocabulary=11)
    for kind in KINDS:
        expected = divergence(kind, student[:, :11], teacher)
        assert torch.equal(divergence(kind, student, teacher), expected)
        assert torch.equal(divergence(kind, teacher, student), divergence(kind, teacher, student[:, :11]))
        assert torch.allclose(divergence(kind, student, top_k(teacher, 11, 1.0)), expected, atol=1e-6)
        few = top_k(teacher, 4, 1.0)
        assert torch.equal(divergence(kind, student, few), divergence(kind, student[:, :11], few))


def test_what_is_far_off_stays_finite() -> None:
    """Probabilities below the smallest float."""
    student, teacher = torch.tensor([[0.0, 500.0, -500.0]]), torch.tensor([[500.0, 0.0, -400.0]])
    for kind in KINDS:
        for known in (teacher, top_k(teacher, 1, 1.0)):
            z = student.clone().requires_grad_()
            found = divergence(kind, z, known)
            found.sum().backward()
            assert z.grad is not None
            assert torch.isfinite(found).all()
            assert torch.isfinite(z.grad).all()
    assert divergence("kl", student, teacher).item() == pytest.approx(500)


def test_half_precision_is_computed_in_float32() -> None:
    student, teacher = logits(9).bfloat16(), logits(10).bfloat16()
    for kind in KINDS:
        expected = divergence(kind, student.float(), teacher.float(), 2.0)
        assert torch.equal(divergence(kind, student, teacher, 2.0), expected)
        assert expected.dtype == torch.float32
    assert torch.equal(
        cross_entropy(student, torch.tensor([1, 2, 3])), cross_entropy(student.float(), torch.tensor([1, 2, 3]))
    )


def test_the_error_of_states_is_relative() -> None:
    ours, theirs = logits(11), logits(12)
    expected = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / sum(b * b for b in y)
        for x, y in zip(ours.double().tolist(), theirs.double().tolist(), strict=True)
    ]
    check(state_error(ours, theirs), expected)
    check(state_error(1000 * ours, 1000 * theirs), expected)
    assert torch.equal(state_error(theirs, theirs), torch.zeros(3))
    assert torch.isfinite(state_error(ours, torch.zeros_like(ours))).all()


@given(st.integers(0, 23), st.integers(1, 9), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_slices_change_nothing(tokens: int, step: int, kept: int) -> None:
    weight = logits(1, 11, 4).requires_grad_()
    hidden = logits(2, tokens, 4)
    sizes: list[int] = []

    def loss(part: slice) -> Tensor:
        sizes.append(len(hidden[part]))
        return (hidden[part] @ weight.T).logsumexp(1)

    before = losses.KEPT_SLICES
    losses.KEPT_SLICES = kept
    try:
        total = summed_by_slices(loss, tokens, step)
    finally:
        losses.KEPT_SLICES = before
    assert sum(sizes) == tokens
    assert max(sizes) <= step
    expected = (hidden @ weight.T).logsumexp(1).sum()
    assert torch.allclose(total, expected, atol=1e-4)
    found, wanted = (torch.autograd.grad(x, weight)[0] for x in (total, expected))
    assert torch.allclose(found, wanted, atol=1e-4)


def test_slices_hold_the_logits_of_a_few_alone() -> None:
    """What is kept for the gradient does not grow with the tokens."""
    kept: list[int] = []

    def bytes_for(tokens: int) -> int:
        kept.clear()
        hidden, weight = logits(1, tokens, 4).requires_grad_(), logits(2, 1000, 4)

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            summed_by_slices(lambda part: (hidden[part] @ weight.T).logsumexp(1), tokens, 10)
        return sum(kept)

    assert bytes_for(20) > 20 * 1000 * 4
    assert bytes_for(2000) < bytes_for(20) + 2000 * 64


def test_objectives() -> None:
    usual = Objective()
    assert (usual.alpha_at(0.3), usual.temperature_at(0.3), usual.fixed_temperature) == (1.0, 1.0, 1.0)
    assert usual.diverges
    assert not usual.has_cross_entropy
    assert not usual.has_states
    moving = Objective(alpha="0.9:0.5", temperature="4:1")
    assert [moving.alpha_at(share) for share in (0, 0.5, 1)] == pytest.approx([0.9, 0.7, 0.5])
    assert [moving.temperature_at(share) for share in (-1, 0.5, 2)] == [4, 2.5, 1]
    assert moving.fixed_temperature is None
    assert moving.has_cross_entropy
    alone = Objective(alpha=0)
    assert alone.has_cross_entropy
    assert not alone.diverges
    assert not Objective(divergence="none", alpha="0").diverges
    assert Objective(divergence="none", hidden=1.0).has_states
    assert Objective(alpha="0:1").diverges
    assert Objective(temperature="2").check_cached() == 2.0


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"divergence": "tv"}, "unknown divergence `tv`"),
    ({"alpha": 1.5}, "alpha is 1.5, but must be a number from 0 to 1"),
    ({"alpha": "0.5:-1"}, "alpha is -1, but must be a number from 0 to 1"),
    ({"alpha": "nan"}, "alpha is nan"),
    ({"alpha": "high"}, "alpha is `high`, but must be a number, or two as in `0.9:0.5`"),
    ({"alpha": "1:2:3"}, "alpha is `1:2:3`"),
    ({"temperature": 0}, "temperature is 0, but must be a number above 0"),
    ({"temperature": "1:inf"}, "temperature is inf"),
    ({"top_k": 0}, "top_k is 0, but must be at least 1"),
    ({"hidden": -1.0}, "hidden is -1.0"),
    ({"attention": math.inf}, "attention is inf"),
    ({"divergence": "none"}, "divergence `none` with alpha 1.0 leaves nothing to train on"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_wrong_objectives_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Objective(**fields)
    assert message in caught.value.message


def test_what_a_cache_cannot_serve() -> None:
    with pytest.raises(UsageError, match="has no hidden states"):
        Objective(hidden=1.0).check_cached()
    with pytest.raises(UsageError, match="one temperature, not for 4:1"):
        Objective(temperature="4:1").check_cached()
