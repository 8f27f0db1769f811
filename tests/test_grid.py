"""Integer grids and their scale search: properties over every scheme, and a naive search beside ours.

Shapes: O out features, I in features, G groups, K weights of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qtool.numerics import chunks
from qtool.numerics.grid import Grid, GridParams, QTensor, grid_of
from qtool.numerics.search import range_affine
from qtool.scheme import QuantScheme

GRANULARITIES = ["tensor", "channel", "g16", "g32"]
SCALE_DTYPES = [torch.bfloat16, torch.float16]
ALL = list(itertools.product(range(2, 9), GRANULARITIES, ["sym", "asym"], SCALE_DTYPES))
GRIDS = [
    pytest.param(bits, granularity, symmetry, dtype, id=f"int{bits}-{granularity}-{symmetry}-{str(dtype)[6:]}")
    for bits, granularity, symmetry, dtype in ALL
]
every_grid = pytest.mark.parametrize(("bits", "granularity", "symmetry", "dtype"), GRIDS)


def make_grid(bits: int, granularity: str, symmetry: str, dtype: torch.dtype) -> Grid:
    return grid_of(QuantScheme.parse(f"int{bits}-{granularity}-{symmetry}"), dtype)


def make_weight(rows: int = 6, inputs: int = 96, seed: int = 0) -> Tensor:
    """Weights of ordinary size with outliers, a skewed row, a row of one sign, and an all-zero group."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.05 * torch.randn(rows, inputs, generator=generator)
    weight[0] += 0.1
    weight[1] = weight[1].abs() + 0.01
    weight[2, ::17] *= 12
    weight[3] = -weight[3].abs()
    weight[4, :32] = 0
    return weight


def spread(values: Tensor, columns: int) -> Tensor:
    """Parameters [O, G] or [1, 1] for each weight [O or 1, I]."""
    return values.float().repeat_interleave(columns // values.shape[1], dim=1)


def difference(ours: Tensor, other: Tensor) -> str:
    gap = (ours.double() - other.double()).abs()
    return f"max difference {gap.max():.3e}, mean {gap.mean():.3e}, {int((gap > 0).sum())} of {gap.numel()} differ"


def range_of(grid: Grid, params: GridParams, columns: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest weight that can be represented, for each weight."""
    half = 2 ** (grid.scheme.bits - 1)
    scale = spread(params.scale, columns)
    zero = torch.full_like(scale, half) if params.zero is None else spread(params.zero, columns)
    ends = torch.stack([-zero * scale, (2 * half - 1 - zero) * scale])
    return ends.amin(0), ends.amax(0)


@every_grid
@pytest.mark.parametrize("search", [True, False], ids=["searched", "minmax"])
def test_error_is_at_most_half_a_step(
    bits: int, granularity: str, symmetry: str, dtype: torch.dtype, search: bool
) -> None:
    grid, weight = make_grid(bits, granularity, symmetry, dtype), make_weight()
    params = grid.fit(weight, search=search)
    back = grid.decode(grid.encode(weight, params), params)
    low, high = range_of(grid, params, weight.shape[1])
    half_step = spread(params.scale, weight.shape[1]).abs() / 2
    inside = (weight >= low) & (weight <= high)
    excess = ((weight - back).abs() - half_step * (1 + 1e-5))[inside]
    assert (excess <= 0).all(), f"{int((excess > 0).sum())} errors over half a step, by {excess.max():.3e} at most"
    # outside the range the nearest end is taken
    clipped = torch.where(weight < low, low, high)[~inside]
    assert torch.allclose(back[~inside], clipped, rtol=1e-6, atol=0), difference(back[~inside], clipped)
    assert inside.float().mean() > 0.8, "the range leaves most weights out"


@every_grid
def test_codes_and_parameters_are_valid(bits: int, granularity: str, symmetry: str, dtype: torch.dtype) -> None:
    grid, weight = make_grid(bits, granularity, symmetry, dtype), make_weight()
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(1))
    groups = {"tensor": (1, 1), "channel": (6, 1), "g16": (6, 6), "g32": (6, 3)}[granularity]
    for params in (grid.fit(weight), grid.fit(weight, importance), grid.fit(weight, search=False)):
        codes = grid.encode(weight, params)
        assert codes.dtype == torch.uint8
        assert codes.shape == weight.shape
        assert int(codes.max()) <= 2**bits - 1
        assert params.scale.dtype == dtype, "a scale is stored in its own type"
        assert tuple(params.scale.shape) == groups
        assert torch.isfinite(params.scale).all()
        assert (params.scale.float().abs() > 0).all()
        if symmetry == "sym":
            assert params.zero is None
        else:
            assert params.zero is not None
            assert params.zero.dtype == torch.float32
            assert tuple(params.zero.shape) == groups
            assert torch.equal(params.zero, params.zero.round())
            assert params.zero.min() >= 0
            assert params.zero.max() <= 2**bits - 1
            assert (params.scale > 0).all(), "an asymmetric scale is positive"


@every_grid
def test_every_code_encodes_to_itself(bits: int, granularity: str, symmetry: str, dtype: torch.dtype) -> None:
    grid, weight = make_grid(bits, granularity, symmetry, dtype), make_weight(rows=6, inputs=512)
    params = grid.fit(weight)
    codes = torch.arange(512).remainder(2**bits).to(torch.uint8).repeat(6, 1)
    again = grid.encode(grid.decode(codes, params), params)
    assert torch.equal(again, codes), difference(again, codes)
    back = grid.decode(codes, params)
    assert torch.equal(grid.decode(again, params), back)


@every_grid
def test_encode_is_monotonic(bits: int, granularity: str, symmetry: str, dtype: torch.dtype) -> None:
    grid, weight = make_grid(bits, granularity, symmetry, dtype), make_weight()
    params = grid.fit(weight)
    probes = torch.linspace(-2, 2, 801)
    ladder = probes[None, :, None].expand(6, -1, weight.shape[1])  # every column goes up the ladder
    previous = None
    for step in range(0, 801, 20):
        back = grid.decode(grid.encode(ladder[:, step].contiguous(), params), params)
        if previous is not None:
            assert (back >= previous).all(), f"decoded weights fall by {(previous - back).max():.3e}"
        previous = back


@every_grid
def test_zero_stays_zero(bits: int, granularity: str, symmetry: str, dtype: torch.dtype) -> None:
    grid, weight = make_grid(bits, granularity, symmetry, dtype), make_weight()
    weight[5, ::2] = 0
    for search in (True, False):
        params = grid.fit(weight, search=search)
        back = grid.decode(grid.encode(weight, params), params)
        assert (back[weight == 0] == 0).all(), f"{int((back[weight == 0] != 0).sum())} zeros are not zero any more"
        nothing = torch.zeros_like(weight)
        params = grid.fit(nothing, search=search)
        assert torch.isfinite(params.scale).all()
        assert (params.scale != 0).all()
        assert torch.equal(grid.decode(grid.encode(nothing, params), params), nothing)


def weighted_error(grid: Grid, weight: Tensor, params: GridParams, importance: Tensor | None) -> Tensor:
    """Sum of weighted squared errors over what shares a scale, float64 [O, G] (or [1, 1])."""
    error = (grid.decode(grid.encode(weight, params), params).double() - weight.double()).square()
    if importance is not None:
        error = error * importance.double()
    if grid.scheme.granularity == "tensor":
        return error.sum().reshape(1, 1)
    return error.unflatten(1, (params.scale.shape[1], -1)).sum(-1)


@every_grid
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_search_is_never_worse_than_the_range(
    bits: int, granularity: str, symmetry: str, dtype: torch.dtype, weighted: bool
) -> None:
    grid, weight = make_grid(bits, granularity, symmetry, dtype), make_weight(rows=16, inputs=96, seed=bits)
    importance = None
    if weighted:
        importance = torch.rand(96, generator=torch.Generator().manual_seed(2)).pow(4) + 1e-3
        importance[::7] = 0
    searched = weighted_error(grid, weight, grid.fit(weight, importance), importance)
    plain = weighted_error(grid, weight, grid.fit(weight, search=False), importance)
    # both compare float32 errors: the search multiplies by 1/s where encode divides by s
    worse = searched - plain * (1 + 1e-5) - 1e-12
    assert (worse <= 0).all(), (
        f"{int((worse > 0).sum())} groups worse, by {worse.max():.3e} at most of {plain.max():.3e}"
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_is_much_better_than_the_range_at_few_bits(bits: int) -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    for symmetry, share in (("sym", {2: 0.3, 3: 0.5, 4: 0.7}[bits]), ("asym", {2: 0.55, 3: 0.8, 4: 0.96}[bits])):
        grid = make_grid(bits, "channel", symmetry, torch.bfloat16)
        searched = weighted_error(grid, weight, grid.fit(weight), None).sum()
        plain = weighted_error(grid, weight, grid.fit(weight, search=False), None).sum()
        assert searched < share * plain, f"{symmetry}: searched/minmax = {searched / plain:.3f}"


def naive_best(weight_K: Tensor, importance_K: Tensor, bits: int, symmetric: bool, dtype: torch.dtype) -> float:
    """The least weighted error of one group over a dense grid of scales and every zero point, in float64."""
    weight, importance, top = weight_K.double(), importance_K.double(), 2**bits - 1
    largest = weight.abs().max() / max(2 ** (bits - 1) - 1, 1)
    if symmetric:
        scales = torch.cat([torch.linspace(0.1, 1.1, 500), -torch.linspace(0.1, 1.1, 500)]).double() * largest
        zeros = torch.tensor([2.0 ** (bits - 1)]).double()
    else:
        width = (weight.max().clamp(min=0) - weight.min().clamp(max=0)) / top
        scales = torch.linspace(0.1, 1.1, 400).double() * width
        zeros = torch.arange(top + 1).double()
    scales = scales.to(dtype).double()
    best = float("inf")
    for zero in zeros:
        codes = ((weight[None] / scales[:, None]).round() + zero).clamp(0, top)
        error = (((codes - zero) * scales[:, None] - weight[None]).square() * importance).sum(1)
        best = min(best, float(error.min()))
    return best


# bits, weights of a group, and how far the sum of errors may be above the naive one's, symmetric and asymmetric
CLOSE = [(2, 32, 1.03, 1.03), (3, 32, 1.02, 1.04), (4, 32, 1.03, 1.08), (5, 64, 1.03, 1.10), (8, 128, 1.07, 1.15)]


@pytest.mark.parametrize("symmetry", ["sym", "asym"])
@pytest.mark.parametrize(("bits", "inputs", "close_sym", "close_asym"), CLOSE)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_search_comes_close_to_a_naive_search(
    bits: int, inputs: int, close_sym: float, close_asym: float, symmetry: str, weighted: bool
) -> None:
    generator = torch.Generator().manual_seed(10 * bits)
    weight = torch.randn(24, inputs, generator=generator)
    weight[::3] += 0.7
    weight[1::3] *= torch.rand(inputs, generator=generator) * 2
    importance = torch.rand(inputs, generator=generator).square() + 0.01 if weighted else torch.ones(inputs)
    grid = make_grid(bits, "channel", symmetry, torch.float16)
    params = grid.fit(weight, importance if weighted else None)
    ours = weighted_error(grid, weight, params, importance)[:, 0]
    naive = torch.tensor([naive_best(row, importance, bits, symmetry == "sym", torch.float16) for row in weight])
    ratio = ours / naive
    told = f"ours/naive: sum {ours.sum() / naive.sum():.4f}, worst {ratio.max():.4f}, mean {ratio.mean():.4f}"
    assert ours.sum() <= (close_sym if symmetry == "sym" else close_asym) * naive.sum(), told
    assert ratio.max() <= 1.7, told


@pytest.mark.parametrize(
    ("weight", "bits", "scale"),
    [
        ([-2.0, -1.0, 0.0, 1.0], 2, 1.0),  # -2^(b-1) is on the negative side
        ([2.0, 1.0, 0.0, -1.0], 2, -1.0),  # here a negative scale puts it on the positive one
        ([-4.0, 3.0, 1.0, 2.0], 3, 1.0),
        ([4.0, -3.0, -1.0, 2.0], 3, -1.0),
    ],
)
def test_the_larger_end_gets_the_extra_level(weight: list[float], bits: int, scale: float) -> None:
    grid = make_grid(bits, "channel", "sym", torch.bfloat16)
    params = grid.fit(torch.tensor([weight]))
    back = grid.decode(grid.encode(torch.tensor([weight]), params), params)
    assert back.tolist() == [weight], f"scale {params.scale.item()}"
    assert params.scale.item() == scale


def test_a_worked_example() -> None:
    weight = torch.tensor([[-0.5, 0.0, 1.0, 0.25]])
    # symmetric, 3 bits: scale 1/3 in bfloat16 = 0.333984375; codes 4 + round(w / s)
    grid = make_grid(3, "channel", "sym", torch.bfloat16)
    params = grid.fit(weight, search=False)
    assert params.scale.item() == 0.333984375
    assert grid.encode(weight, params).tolist() == [[3, 4, 7, 5]]  # -1.497, 0, 2.994, 0.749
    # asymmetric, 2 bits: range -0.5..1, scale 0.5, zero point 1
    grid = make_grid(2, "channel", "asym", torch.bfloat16)
    params = grid.fit(weight, search=False)
    assert params.scale.item() == 0.5
    assert params.zero is not None
    assert params.zero.item() == 1
    assert grid.encode(weight, params).tolist() == [[0, 1, 3, 1]]  # 0.25 / 0.5 is a tie: to even
    assert grid.decode(torch.tensor([[0, 1, 3, 1]], dtype=torch.uint8), params).tolist() == [[-0.5, 0, 1, 0]]


def test_asymmetric_ranges_always_hold_zero() -> None:
    for weight in (torch.full((1, 16), 0.9), torch.full((1, 16), -0.9), torch.linspace(5, 6, 16)[None]):
        scale, zero = range_affine(weight[:, None], 4, torch.bfloat16)
        assert zero is not None
        assert 0 <= zero.item() <= 15
        assert abs(scale.item() * 15 - weight.abs().max().item()) < 0.01 * weight.abs().max()


@pytest.mark.parametrize("symmetry", ["sym", "asym"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_small_float16_scales_keep_their_precision(bits: int, symmetry: str) -> None:
    """Scales below 2^-14 are subnormal in float16, and still better than the smallest normal one."""
    weight = 3e-4 * torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    errors = {}
    for dtype in SCALE_DTYPES:
        grid = make_grid(bits, "channel", symmetry, dtype)
        errors[dtype] = weighted_error(grid, weight, grid.fit(weight), None).sum()
    ratio = errors[torch.float16] / errors[torch.bfloat16]
    assert ratio < 1.1, f"error with float16 scales is {ratio:.2f} times that with bfloat16 scales"


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4])
@pytest.mark.parametrize("symmetry", ["sym", "asym"])
def test_any_size_of_weights(size: float, symmetry: str) -> None:
    weight = size * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    grid = make_grid(4, "g32", symmetry, torch.bfloat16)
    relative = (weighted_error(grid, weight, grid.fit(weight), None).sum() / weight.double().square().sum()).sqrt()
    assert relative < 0.12, f"relative error {relative:.3f}"


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "scheme", ["int4-g32-sym", "int3-g16-asym", "int2-channel-sym", "int8-channel-asym", "int4-tensor-asym"]
)
def test_threads_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    weight = make_weight(rows=37, inputs=96)
    importance = torch.rand(96, generator=torch.Generator().manual_seed(3))
    grid = grid_of(QuantScheme.parse(scheme), torch.bfloat16)
    torch.set_num_threads(1)
    expected = [grid.fit(weight, i, search) for i in (None, importance) for search in (True, False)]
    for count, elements in itertools.product((1, 2), (1, 97, 1000, 1 << 26)):
        torch.set_num_threads(count)
        monkeypatch.setattr(chunks, "CPU_ELEMENTS", elements)
        found = [grid.fit(weight, i, search) for i in (None, importance) for search in (True, False)]
        assert torch.get_num_threads() == count, "the thread count is put back"
        for ours, other in zip(found, expected, strict=True):
            told = f"{count} threads, chunks of {elements}: {difference(ours.scale, other.scale)}"
            assert torch.equal(ours.scale, other.scale), told
            assert (ours.zero is None) == (other.zero is None)
            assert ours.zero is None or other.zero is None or torch.equal(ours.zero, other.zero), told


@pytest.mark.usefixtures("threads")
def test_chunks_come_back_in_order_and_errors_pass_through() -> None:
    cpu = torch.device("cpu")
    for count in (1, 2):
        torch.set_num_threads(count)
        assert chunks.map_chunks(lambda i: i * i, range(50), cpu) == [i * i for i in range(50)]
        with pytest.raises(ZeroDivisionError):
            chunks.map_chunks(lambda i: 1 // (i - 3), range(5), cpu)
        assert torch.get_num_threads() == count
    assert chunks.chunk_rows(cpu, 10**12) == 1
    assert chunks.chunk_rows(cpu, 0) >= 1


@every_grid
def test_per_column_agrees_with_the_whole(bits: int, granularity: str, symmetry: str, dtype: torch.dtype) -> None:
    grid, weight = make_grid(bits, granularity, symmetry, dtype), make_weight()
    rows, inputs = weight.shape
    params = grid.fit(weight)
    codes = grid.encode(weight, params)
    whole = grid.decode(codes, params)
    columns = torch.randperm(inputs, generator=torch.Generator().manual_seed(4))[:50]
    some = grid.per_column(params, columns, rows, inputs)
    assert tuple(some.scale.shape) == (rows, 50)
    assert torch.equal(grid.encode(weight[:, columns], some), codes[:, columns])
    back = grid.decode(codes[:, columns], some)
    assert torch.equal(back, whole[:, columns]), difference(back, whole[:, columns])


@pytest.mark.parametrize("scheme", ["int4-g16-sym", "int4-g16-asym", "int8-channel-asym"])
def test_splitting_stacked_weights(scheme: str) -> None:
    grid, weight = grid_of(QuantScheme.parse(scheme), torch.bfloat16), make_weight()
    params = grid.fit(weight)
    whole = QTensor(grid.encode(weight, params), params, grid.scheme)
    parts = whole.split([1, 3, 2])
    assert [len(p.codes) for p in parts] == [1, 3, 2]
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), whole.dequantize())


finite = st.floats(-1e4, 1e4, width=32, allow_nan=False)


@given(
    bits=st.integers(2, 8),
    symmetry=st.sampled_from(["sym", "asym"]),
    dtype=st.sampled_from(SCALE_DTYPES),
    weights=st.lists(finite, min_size=8, max_size=8)
    | st.lists(st.sampled_from([0.0, 1.0, -1.0, 1e-3]), min_size=8, max_size=8),
    importance=st.none() | st.lists(st.floats(0, 1e6, width=32), min_size=8, max_size=8),
)
@settings(deadline=None, max_examples=150)
def test_any_group_of_weights(
    bits: int, symmetry: str, dtype: torch.dtype, weights: list[float], importance: list[float] | None
) -> None:
    grid, weight = make_grid(bits, "channel", symmetry, dtype), torch.tensor([weights])
    importance_I = None if importance is None else torch.tensor(importance)
    params = grid.fit(weight, importance_I)
    codes = grid.encode(weight, params)
    assert int(codes.max()) < 2**bits
    back = grid.decode(codes, params)
    assert torch.isfinite(back).all()
    assert (back[weight == 0] == 0).all()
    assert torch.equal(grid.encode(back, params), codes)
    searched = weighted_error(grid, weight, params, importance_I).sum()
    plain = weighted_error(grid, weight, grid.fit(weight, search=False), importance_I).sum()
    scale = weight.double().square().sum() * (1.0 if importance_I is None else importance_I.max().double())
    assert searched <= plain * (1 + 1e-5) + 1e-9 * scale, f"searched {searched:.6e}, minmax {plain:.6e}"
