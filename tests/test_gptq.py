"""GPTQ: exact where it is trivial, never worse than rounding, and equal to the paper's algorithm written naively.

Shapes: O out features, I in features, N tokens.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.calibration.stats import Moments
from qtool.errors import QtoolError
from qtool.methods import METHODS, get_method
from qtool.methods.gptq import GPTQ, reversed_factor, round_columns
from qtool.methods.rtn import RTN
from qtool.numerics.grid import Grid, GridParams, QTensor, grid_of
from qtool.scheme import QuantScheme

SCHEMES = [
    f"int{bits}-{granularity}-{symmetry}"
    for bits in (2, 3, 4, 8)
    for granularity in ("g32", "channel", "tensor")
    for symmetry in ("sym", "asym")
]


def grid(scheme: str, dtype: torch.dtype = torch.bfloat16) -> Grid:
    return grid_of(QuantScheme.parse(scheme), dtype)


def make_weight(rows: int = 32, inputs: int = 96, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def correlated(inputs: int = 96, tokens: int = 1000, seed: int = 1) -> Tensor:
    """Second moment of inputs that share a few directions, with a few large features, float32."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, inputs, generator=generator)
    x_NI = shared + 0.5 * torch.randn(tokens, inputs, generator=generator)
    x_NI[:, ::19] *= 6
    return x_NI.T @ x_NI / tokens


def loss(weight_OI: Tensor, quantized: QTensor, second_II: Tensor) -> float:
    """tr(D H D^T), D = W - W^, in float64."""
    error = weight_OI.double() - quantized.dequantize().double()
    return float(((error @ second_II.double()) * error).sum())


def mismatch(ours: Tensor, other: Tensor) -> str:
    gap = (ours.double() - other.double()).abs()
    return f"{int((gap > 0).sum())} of {gap.numel()} differ; max difference {gap.max():.3e}, mean {gap.mean():.3e}"


def naive_gptq(
    weight_OI: Tensor, grid: Grid, params: GridParams, second_II: Tensor, damp: float, activation: bool
) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 with blocks of one column, in float64; codes [O, I].

    Scales are those of each column's own group, whatever the order.
    """
    rows, inputs = weight_OI.shape
    hessian = second_II.double().clone()
    mean = hessian.diagonal().mean()
    for i in range(inputs):
        if hessian[i, i] == 0:
            hessian[i, i] = mean
    hessian += damp * mean * torch.eye(inputs, dtype=torch.float64)
    order = list(range(inputs))
    if activation:
        order.sort(key=lambda i: -float(second_II[i, i]))
    weight = weight_OI.double()[:, order].clone()
    hessian = hessian[order][:, order]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scale, zero = params.scale.double(), params.zero
    groups = scale.shape[1]
    half = 2 ** (grid.scheme.bits - 1)
    codes = torch.zeros(rows, inputs, dtype=torch.uint8)
    for j in range(inputs):
        group = order[j] * groups // inputs
        column_scale = scale[:, group].expand(rows)
        column_zero = (
            zero[:, group].double().expand(rows) if zero is not None else torch.full((rows,), float(half)).double()
        )
        code = ((weight[:, j] / column_scale).round() + column_zero).clamp(0, 2 * half - 1)
        codes[:, order[j]] = code.to(torch.uint8)
        error = (weight[:, j] - (code - column_zero) * column_scale) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:][None]
    return codes


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("scales", ["searched", "minmax"])
def test_with_uncorrelated_inputs_it_is_rounding(scheme: str, order: str, scales: str) -> None:
    weight = make_weight()
    expected = RTN(scales=scales).solve(weight, grid(scheme), None).weight
    for size in (1.0, 4.0, 2.0**-20):
        for damp in (0.0, 0.01):
            moments = Moments(size * torch.eye(96))
            solved = GPTQ(order=order, scales=scales, damp=damp).solve(weight, grid(scheme), moments)
            assert solved.notes == []
            ours = solved.weight
            told = f"H = {size} I, damp {damp}: {mismatch(ours.codes, expected.codes)}"
            assert torch.equal(ours.codes, expected.codes), told
            assert torch.equal(ours.params.scale, expected.params.scale), told


def test_it_leaves_its_arguments_alone() -> None:
    weight, second = make_weight(), correlated()
    second[3] = second[:, 3] = 0
    before = weight.clone(), second.clone()
    GPTQ().solve(weight, grid("int3-g32-asym"), Moments(second))
    assert torch.equal(weight, before[0])
    assert torch.equal(second, before[1]), "damping is not written into the statistics"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("seed", [0, 1])
def test_never_worse_than_rounding(scheme: str, seed: int) -> None:
    weight, second = make_weight(seed=seed), correlated(seed=seed + 7)
    rounded = {
        scales: loss(weight, RTN(scales=scales).solve(weight, grid(scheme), None).weight, second)
        for scales in ("searched", "minmax")
    }
    for order in ("activation", "natural"):
        for scales in ("searched", "minmax"):
            ours = loss(
                weight, GPTQ(order=order, scales=scales).solve(weight, grid(scheme), Moments(second)).weight, second
            )
            assert ours < rounded[scales], f"{order}, {scales}: {ours:.4e}, rounding {rounded[scales]:.4e}"
    best = loss(weight, GPTQ().solve(weight, grid(scheme), Moments(second)).weight, second)
    assert best < 0.7 * min(rounded.values()), f"gptq {best:.4e}, rounding {rounded}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("order", ["activation", "natural"])
@pytest.mark.parametrize("damp", [0.01, 0.1])
def test_against_the_paper(scheme: str, order: str, damp: float) -> None:
    weight, second = make_weight(), correlated()
    ours = GPTQ(order=order, damp=damp).solve(weight, grid(scheme), Moments(second)).weight
    naive = naive_gptq(weight, grid(scheme), ours.params, second, damp, order == "activation")
    other = QTensor(naive, ours.params, ours.scheme)
    told = mismatch(ours.codes, naive)
    # the same codes, unless float32 puts a weight on the other side of a tie, which moves the rest of its row
    rows = int((ours.codes != naive).any(1).sum())
    assert rows <= 1, f"{rows} rows: {told}"
    assert loss(weight, ours, second) == pytest.approx(loss(weight, other, second), rel=0.01), told


@pytest.mark.parametrize("scheme", ["int2-g32-asym", "int4-g32-sym", "int4-channel-sym", "int3-tensor-asym"])
@pytest.mark.parametrize("order", ["activation", "natural"])
def test_the_block_is_speed_only(scheme: str, order: str) -> None:
    weight, second = make_weight(rows=64), correlated()
    expected = GPTQ(order=order, block=96).solve(weight, grid(scheme), Moments(second)).weight
    for block in (1, 7, 32, 95, 1000):
        ours = GPTQ(order=order, block=block).solve(weight, grid(scheme), Moments(second)).weight
        assert torch.equal(ours.params.scale, expected.params.scale)
        rows = int((ours.codes != expected.codes).any(1).sum())
        told = f"block {block}, {rows} rows: {mismatch(ours.codes, expected.codes)}"
        assert rows <= 1, told
        assert loss(weight, ours, second) == pytest.approx(loss(weight, expected, second), rel=0.01), told


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int3-channel-asym"])
def test_threads_change_the_codes_by_rounding_at_most(scheme: str) -> None:
    weight, second = make_weight(rows=64), correlated()
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(GPTQ().solve(weight, grid(scheme), Moments(second)).weight)
    finally:
        torch.set_num_threads(before)
    rows = int((found[0].codes != found[1].codes).any(1).sum())
    assert rows <= 1, f"{rows} rows: {mismatch(found[0].codes, found[1].codes)}"


@pytest.mark.parametrize("scheme", ["int4-g32-sym", "int3-channel-asym"])
def test_stacked_weights_are_solved_as_each_alone(scheme: str) -> None:
    second, rows = correlated(), [40, 8, 24]
    weights = [make_weight(rows=n, seed=n) for n in rows]
    stacked = GPTQ().solve(torch.cat(weights), grid(scheme), Moments(second)).weight.split(rows)
    for weight, ours in zip(weights, stacked, strict=True):
        alone = GPTQ().solve(weight, grid(scheme), Moments(second)).weight
        assert torch.equal(ours.params.scale, alone.params.scale)
        assert (ours.params.zero is None) == (alone.params.zero is None)
        assert ours.params.zero is None or torch.equal(ours.params.zero, alone.params.zero)
        differing = int((ours.codes != alone.codes).any(1).sum())
        assert differing <= 1, f"{differing} rows: {mismatch(ours.codes, alone.codes)}"


def test_groups_stay_with_their_columns() -> None:
    """With activation order, each column still uses the scale of the group that it stands in."""
    weight, second = make_weight(), correlated()
    weight[:, 32:64] *= 50
    ours = GPTQ().solve(weight, grid("int4-g32-sym"), Moments(second)).weight
    scale = ours.params.scale.float().abs().mean(0)
    assert scale[1] > 20 * scale[0]
    assert scale[1] > 20 * scale[2]


def test_inputs_that_are_always_zero() -> None:
    weight, second = make_weight(), correlated()
    dead = torch.tensor([0, 5, 40, 95])
    second[dead] = 0
    second[:, dead] = 0
    for order in ("activation", "natural"):
        for damp in (0.0, 0.01):
            solved = GPTQ(order=order, damp=damp).solve(weight, grid("int4-g32-sym"), Moments(second))
            assert solved.notes == []
            params = solved.weight.params
            alone = grid("int4-g32-sym").encode(weight, params)[:, dead]
            assert torch.equal(solved.weight.codes[:, dead], alone), (
                "a dead input takes part in no feedback: it is rounded"
            )
            naive = naive_gptq(weight, grid("int4-g32-sym"), params, second, damp, order == "activation")
            told = mismatch(solved.weight.codes, naive)
            assert int((solved.weight.codes != naive).any(1).sum()) <= 1, told


def test_nothing_but_dead_inputs_is_rounding() -> None:
    weight = make_weight()
    solved = GPTQ().solve(weight, grid("int4-g32-sym"), Moments(torch.zeros(96, 96)))
    assert solved.notes == []
    assert torch.equal(solved.weight.codes, RTN().solve(weight, grid("int4-g32-sym"), None).weight.codes)


def few_tokens(tokens: int, inputs: int) -> Tensor:
    x_NI = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(5))
    return x_NI.T @ x_NI / tokens


def test_fewer_tokens_than_inputs() -> None:
    weight, second = make_weight(), few_tokens(tokens=12, inputs=96)
    solved = GPTQ(damp=0.01).solve(weight, grid("int4-g32-sym"), Moments(second))
    assert solved.notes == [], "the usual damping is enough"
    rounded = RTN().solve(weight, grid("int4-g32-sym"), None).weight
    assert loss(weight, solved.weight, second) < 0.3 * loss(weight, rounded, second)
    solved = GPTQ(damp=0.0).solve(weight, grid("int4-g32-sym"), Moments(second))
    assert solved.notes == ["H is not positive definite: damping raised to 0.0001"]
    assert loss(weight, solved.weight, second) < 0.3 * loss(weight, rounded, second)


def test_the_damping_that_is_told_is_the_damping_that_is_used() -> None:
    second, order = few_tokens(tokens=12, inputs=96), torch.arange(96)
    raised, notes = reversed_factor(second, 0.0, order)
    asked, none = reversed_factor(second, 1e-4, order)
    assert notes == ["H is not positive definite: damping raised to 0.0001"]
    assert none == []
    gap = (raised - asked).abs()
    assert gap.max() < 1e-5, f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


def test_a_moment_that_is_none_is_an_error() -> None:
    second = torch.eye(4)
    second[0, 1] = second[1, 0] = 50.0  # no second moment of anything: an eigenvalue is -49
    with pytest.raises(QtoolError, match="not positive definite even with a damping of 1"):
        reversed_factor(second, 0.01, torch.arange(4))


@pytest.mark.parametrize("damp", [0.0, 0.05])
def test_the_factor_read_backwards_is_upper_and_gives_h(damp: float) -> None:
    second = correlated()
    order = second.diagonal().argsort(descending=True, stable=True)
    factor, _ = reversed_factor(second, damp, order)
    upper = factor.flip(0, 1).double()
    assert torch.equal(upper, upper.triu())
    damped = second.double() + damp * second.double().diagonal().mean() * torch.eye(96)
    expected = damped[order][:, order]
    gap = (upper @ upper.T - expected).abs()
    assert gap.max() < 1e-5 * expected.abs().max(), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"


def test_columns_are_rounded_in_the_order_asked_for() -> None:
    """By hand: two inputs, H = [[1, h], [h, 1]]; the second takes the first one's error times h."""
    h = 0.5
    weight = torch.tensor([[0.4, 1.2]])
    params = GridParams(torch.ones(1, 1), None)
    plain = grid("int4-channel-sym", torch.float32)
    factor, _ = reversed_factor(torch.tensor([[1.0, h], [h, 1.0]]), 0.0, torch.tensor([0, 1]))

    def codes(weight: Tensor, order: Tensor) -> list[list[int]]:
        rounder = plain.rounder(params, (1, 2))
        round_columns(weight, rounder, factor, order, 8)
        return rounder.result().codes.tolist()

    # 0.4 -> 0, error 0.4; 1.2 + 0.5 * 0.4 = 1.4 -> 1
    assert codes(weight, torch.tensor([0, 1])) == [[8, 9]]
    # 1.2 -> 1, error 0.2; 0.4 + 0.5 * 0.2 = 0.5 -> 0 (a tie goes to even), so use 1.3: error 0.3 -> 0.55 -> 1
    weight = torch.tensor([[0.4, 1.3]])
    assert codes(weight, torch.tensor([1, 0])) == [[9, 9]]


def test_options_reach_the_method() -> None:
    assert get_method("gptq", {"damp": 1, "order": "natural", "block": 3}) == GPTQ(damp=1.0, order="natural", block=3)
    assert get_method("rtn", {"scales": "minmax"}) == RTN(scales="minmax")
    for name in METHODS:
        assert get_method(name, {}).needs <= {"second", "cross"}
    assert get_method("rtn", {}).needs == frozenset()
    assert get_method("gptq", {}).needs == {"second"}


def test_rounding_takes_the_nearest_code() -> None:
    weight = make_weight()
    for scheme in SCHEMES:
        solved = RTN().solve(weight, grid(scheme), None)
        params, back = solved.weight.params, solved.weight.dequantize()
        best = (back - weight).abs()
        for code in range(2 ** QuantScheme.parse(scheme).bits):
            other = grid(scheme).decode(torch.full(weight.shape, code, dtype=torch.uint8), params)
            worse = best - (other - weight).abs()
            assert worse.max() <= 1e-6, f"{scheme}: code {code} is nearer by {worse.max():.3e}"
