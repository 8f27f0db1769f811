"""Rounding with gradients: forward is what a file holds, backward LSQ's and the clipped straight-through estimator's.

The gradients are checked against a naive second implementation, weight by weight, against finite differences of what
is smooth in them, and against cases worked by hand.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.numerics.activations import fake_quantize, static_scale
from qtool.numerics.blocks import INTEGERS
from qtool.numerics.fake_quant import decode_codes, fake_quantize_inputs, fake_quantize_weight
from qtool.numerics.grid import Grid, GridParams, grid_of
from qtool.runtime.kv import KVCache
from qtool.scheme import BLOCK, EXAMPLES, FLOATS, ActivationScheme, QuantScheme

SCHEMES = [name for name in EXAMPLES if name not in FLOATS]
INT4 = "int4-g32-sym"


def weight_of(rows: int = 4, inputs: int = 256, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))


def fitted(scheme: str, weight_OI: Tensor) -> tuple[Grid, GridParams, GridParams]:
    """A grid, its parameters for a weight as they are stored, and what these mean."""
    grid = grid_of(QuantScheme.parse(scheme), torch.float32)
    params = grid.fit(weight_OI)
    return grid, params, grid.effective(params)


# --- forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_training_sees_is_what_the_file_holds(scheme: str) -> None:
    weight_OI = weight_of()
    grid, params, (scale, zero, _, _) = fitted(scheme, weight_OI)
    read_OI = fake_quantize_weight(weight_OI, scale, zero, grid, params)
    assert torch.equal(read_OI, grid.decode(grid.encode(weight_OI, params), params))
    codes_OI = grid.encode(weight_OI, params)
    assert torch.equal(decode_codes(codes_OI, scale, zero, grid, params), read_OI)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stored_is_the_inverse_of_effective(scheme: str) -> None:
    grid, params, effective = fitted(scheme, weight_of(rows=200))
    again = grid.stored(effective, params)
    meant = zip(grid.effective(again), grid.effective(params), strict=True)
    assert all(torch.equal(a, b) for a, b in meant if a is not None and b is not None)


@settings(max_examples=30, deadline=None)
@given(scheme=st.sampled_from(SCHEMES), factor=st.floats(0.8, 1.25), seed=st.integers(0, 99))
def test_moved_scales_are_stored_within_half_a_step(scheme: str, factor: float, seed: int) -> None:
    """The nearest that can be stored: never farther away than the spacing of what can be."""
    grid, params, (scale, zero, _, _) = fitted(scheme, weight_of(seed=seed))
    stored = grid.effective(grid.stored(GridParams(scale * factor, zero), params)).scale
    spacing = {"mx": 0.5, "nv": 0.07, "dq": 0.05}  # of a power of two, an e4m3, an 8-bit nested one
    share = next((s for part, s in spacing.items() if scheme.startswith(part) or scheme.endswith(part)), 0.01)
    limit = share * (scale * factor).abs()
    inside = torch.ones_like(scale, dtype=torch.bool)
    if params.super_scale is not None and scheme[0] in "qi":  # whole multiples of the block's scale, up to the largest
        step = params.super_scale.float().abs().repeat_interleave(scale.shape[1] // params.super_scale.shape[1], 1)
        limit = limit + step / 2
        inside = (scale * factor).abs() <= INTEGERS[scheme].highest * step
    elif scheme.endswith("-dq") or scheme.startswith("nv"):  # between the smallest and the largest
        inside = (scale * factor >= scale.amin()) & (scale * factor <= scale.amax())
    assert ((stored - scale * factor).abs() <= limit + 1e-9)[inside].all()


# --- backward -----------------------------------------------------------------------------------------------------


def naive_gradients(
    grid: Grid, params: GridParams, weight_OI: Tensor, gradient_OI: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One weight at a time, from the words of the module."""
    effective = grid.effective(params)
    scale, zero = effective.scale, effective.zero
    lowest, highest = grid.ends
    read_OI = grid.decode(grid.encode(weight_OI, params), params)
    of_weight, of_scale = torch.zeros_like(weight_OI), torch.zeros_like(scale)
    of_zero = None if zero is None else torch.zeros_like(zero)
    rows, inputs = weight_OI.shape
    for o in range(rows):
        r = o if len(scale) == rows else 0 if len(scale) == 1 else o // BLOCK
        for i in range(inputs):
            g = i * scale.shape[1] // inputs
            s, w, read, upstream = (float(x) for x in (scale[r, g], weight_OI[o, i], read_OI[o, i], gradient_OI[o, i]))
            z = 0.0 if zero is None else float(zero[r, g])
            if grid.has_minimum:
                value, level, back = (w + z) / s, (read + z) / s, 0.0
            else:
                value, level, back = w / s + z, read / s + z, z
            inside = lowest <= value <= highest
            of_weight[o, i] = upstream * inside
            of_scale[r, g] += upstream * (level - back - (value - back) * inside)
            if of_zero is not None and not inside:
                of_zero[r, g] -= upstream * (1.0 if grid.has_minimum else s)
    return of_weight, of_scale, of_zero


@pytest.mark.parametrize(
    "scheme", [INT4, "int3-g64-asym", "int8-channel-sym", "int4-tensor-sym", "fp8-e4m3-channel", "fp8-block",
               "nvfp4a16", "mxfp4a16", "mxfp8", "nf4", "q4_0", "q4_1", "q4_k", "q6_k", "q2_k", "iq4_xs", "llm-int8"],
)  # fmt: skip
def test_gradients_are_those_of_the_naive_implementation(scheme: str) -> None:
    weight_OI = weight_of(rows=2)
    grid, params, (scale, zero, _, _) = fitted(scheme, weight_OI)
    weight_OI = weight_OI * 1.5  # so that some are beyond the range
    gradient_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(1))
    leaves = [x if x is None else x.clone().requires_grad_() for x in (weight_OI, scale, zero)]
    fake_quantize_weight(*leaves, grid, params).backward(gradient_OI)  # type: ignore[arg-type]
    expected = naive_gradients(grid, params, weight_OI, gradient_OI)
    for leaf, wanted in zip(leaves, expected, strict=True):
        if leaf is not None and wanted is not None:
            assert leaf.grad is not None
            scale_of = wanted.abs().amax() + 1e-6
            assert ((leaf.grad - wanted).abs() <= 1e-4 * scale_of).all(), (scheme, (leaf.grad - wanted).abs().max())


def test_worked_by_hand() -> None:
    """Two bits, scale 0.5: levels -2 .. 1. The first weight is inside, the others beyond either end."""
    grid = grid_of(QuantScheme.parse("int2-g4-sym"), torch.float32)
    weight = torch.tensor([[0.3, 2.0, -3.0, -0.4]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    read = fake_quantize_weight(weight, scale, None, grid, GridParams(scale.detach()))
    assert read.tolist() == [[0.5, 0.5, -1.0, -0.5]]
    read.sum().backward()
    assert weight.grad is not None
    assert scale.grad is not None
    assert weight.grad.tolist() == [[1.0, 0.0, 0.0, 1.0]]
    assert float(scale.grad) == pytest.approx((1 - 0.6) + 1 - 2 + (-1 + 0.8))


def test_zero_point_worked_by_hand() -> None:
    """Two bits, scale 1, zero 1: levels -1 .. 2. Inside the zero does nothing; beyond, it moves the end."""
    grid = grid_of(QuantScheme.parse("int2-g4-asym"), torch.float32)
    weight = torch.tensor([[0.2, 5.0, -5.0, 5.0]])
    scale, zero = torch.tensor([[1.0]]), torch.tensor([[1.0]], requires_grad=True)
    read = fake_quantize_weight(weight, scale, zero, grid, GridParams(scale, zero.detach()))
    assert read.tolist() == [[0.0, 2.0, -1.0, 2.0]]
    read.backward(torch.tensor([[1.0, 1.0, 10.0, 1.0]]))
    assert float(zero.grad) == -1.0 - 10.0 - 1.0  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", [INT4, "int3-g64-asym", "fp8-e4m3-channel", "nf4", "int4-tensor-sym"])
def test_frozen_codes_have_the_gradient_of_finite_differences(scheme: str) -> None:
    """Under frozen codes what is read is linear in the scale: nothing is looked through but the type of the scale."""
    weight_OI = weight_of(rows=2, inputs=64)
    grid, params, (scale, zero, _, _) = fitted(scheme, weight_OI)
    codes_OI = grid.encode(weight_OI, params)
    gradient_OI = torch.randn(weight_OI.shape, generator=torch.Generator().manual_seed(1))
    leaf = scale.clone().requires_grad_()
    decode_codes(codes_OI, leaf, zero, grid, params).backward(gradient_OI)
    for place in [(0, 0), (len(scale) - 1, scale.shape[1] - 1)]:
        values = []
        for sign in (1, -1):
            moved = scale.clone()
            moved[place] *= 1 + sign * 0.01
            values.append(float((decode_codes(codes_OI, moved, zero, grid, params) * gradient_OI).double().sum()))
        assert leaf.grad is not None
        assert float(leaf.grad[place]) == pytest.approx(
            (values[0] - values[1]) / (0.02 * float(scale[place])), rel=1e-3
        )


def test_beyond_the_range_it_is_smooth_in_the_scale() -> None:
    """Clipped weights are read as the end of the range: a finite difference of the very function."""
    grid = grid_of(QuantScheme.parse(INT4), torch.float32)
    weight = torch.full((1, 32), 9.0)
    scale = torch.tensor([[0.5]], requires_grad=True)
    fake_quantize_weight(weight, scale, None, grid, GridParams(scale.detach())).sum().backward()
    ends = [
        float(fake_quantize_weight(weight, torch.tensor([[s]]), None, grid, GridParams(scale)).sum())
        for s in (0.51, 0.49)
    ]
    assert float(scale.grad) == pytest.approx((ends[0] - ends[1]) / 0.02, rel=1e-4)  # type: ignore[arg-type]


def test_descent_on_the_scale_finds_what_the_search_finds() -> None:
    """The gradient points downhill: from scales twice too large, the error falls near that of the search."""
    weight_OI = weight_of()
    grid, params, (best, _, _, _) = fitted(INT4, weight_OI)

    def error(scale: Tensor) -> Tensor:
        return (fake_quantize_weight(weight_OI, scale, None, grid, params) - weight_OI).square().sum()

    shares = torch.full_like(best, 2.0, requires_grad=True)
    optimizer = torch.optim.Adam([shares], lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        error(best * shares).backward()
        optimizer.step()
    assert error(2 * best) > 2 * error(best)
    assert error(best * shares) < 1.2 * error(best)  # codes that change make valleys


# --- inputs -------------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(["int8-tensor", "fp8-e4m3-tensor", "int8-token", "fp8-e4m3-g128", "int4-token"]),
    seed=st.integers(0, 99),
)
def test_inputs_have_a_gradient_inside_the_range_alone(kind: str, seed: int) -> None:
    scheme = ActivationScheme.parse(kind, "test")
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    scale = static_scale(torch.tensor([1.0]), scheme) if scheme.is_static else None
    rounded = fake_quantize_inputs(x, scheme, scale)
    assert torch.equal(rounded, fake_quantize(x, scheme, scale))
    rounded.sum().backward()
    ends = (-1.004, 0.997) if kind == "int8-tensor" else (-1.0, 1.0)
    inside = (x > ends[0]) & (x < ends[1]) if scheme.is_static else torch.ones_like(x, dtype=torch.bool)
    near = (x.detach().abs() - 1).abs() < 0.01
    assert x.grad is not None
    assert torch.equal((x.grad == 1)[~near], inside[~near])
    assert ((x.grad == 0) | (x.grad == 1)).all()


def test_nvfp4_inputs_are_clipped_by_their_fixed_divisor() -> None:
    scheme = QuantScheme.parse("nvfp4").activations
    assert scheme
    x = torch.tensor([[0.5, 2.0] + [0.1] * 14], requires_grad=True)
    fake_quantize_inputs(x, scheme, static_scale(torch.tensor([1.0]), scheme)).sum().backward()
    assert x.grad is not None
    assert x.grad[0, :3].tolist() == [1.0, 0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_keep_their_type(dtype: torch.dtype) -> None:
    scheme = ActivationScheme.parse("int8-token", "test")
    x = torch.randn(2, 32).to(dtype)
    rounded = fake_quantize_inputs(x, scheme)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, fake_quantize(x.float(), scheme).to(dtype))


def test_keys_and_values_pass_gradients() -> None:
    scheme, scale = ActivationScheme("fp8-e4m3", 8, "tensor"), torch.tensor([0.01])
    keys, values = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(2))
    k, v = KVCache(scheme, scale, scale).update(keys, values, 0)
    (k.sum() + v.sum()).backward()
    for leaf in (keys, values):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, (leaf.abs() <= 448 * 0.01).float())
