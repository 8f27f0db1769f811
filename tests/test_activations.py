"""Small floats, the rounding of inputs, and hooks that round them: against tables, compressed-tensors and bitsandbytes.

Shapes: B rows, T tokens, I input features, O out features.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale, decompress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import FP4_E2M1_DATA, QuantizationArgs, QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import forward_quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qtool.numerics.activations import fake_quantize, static_scale
from qtool.numerics.minifloat import (
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    encode_e8m0,
    floor_e8m0,
    round_e2m1,
    round_fp8,
)
from qtool.runtime import inputs as runtime_inputs
from qtool.runtime.inputs import round_inputs
from qtool.scheme import ActivationScheme, QuantScheme

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def check_same(ours: Tensor, theirs: Tensor) -> None:
    gap = (ours.double() - theirs.double()).abs()
    different = int((ours != theirs).sum())
    assert different == 0, f"{different} differ, max difference {gap.max():.3e}, mean {gap.mean():.3e}"


def values_of_16_bits() -> Tensor:
    """Every finite bfloat16, and its two neighbours in float32."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    every = every[every.isfinite()]
    up, down = torch.full_like(every, torch.inf), torch.full_like(every, -torch.inf)
    near = torch.cat([every, every.nextafter(up), every.nextafter(down)])
    return near[near.isfinite()]


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """The nearest of a rising table of magnitudes, by the halves between them; ties to the even place."""
    middles = (table[1:].double() + table[:-1].double()) / 2
    magnitude = values.double().abs()
    below, above = torch.bucketize(magnitude, middles), torch.bucketize(magnitude, middles, right=True)
    place = torch.where(below % 2 == 0, below, above)  # they differ where a value is a middle
    return torch.copysign(table[place], values)


class TestSmallFloats:
    def test_e2m1_against_the_table(self) -> None:
        values = values_of_16_bits()
        check_same(round_e2m1(values), nearest(values, torch.tensor(E2M1)))

    def test_e2m1_against_compressed_tensors(self) -> None:
        values = torch.cat([values_of_16_bits(), torch.linspace(-7, 7, 8001)])
        values = values[values != 0]  # it has no -0 on the way in
        theirs = FP4_E2M1_DATA.cast_to_fp4(values.clone())
        check_same(round_e2m1(values), theirs)
        packed = pack_fp4_to_uint8(theirs[: len(theirs) // 2 * 2][None])
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten()
        check_same(encode_e2m1(values)[: len(codes)], codes)
        check_same(decode_e2m1(codes), unpack_fp4_from_uint8(packed, 1, len(codes), torch.float32)[0])

    def test_e2m1_codes(self) -> None:
        """Bit by bit: sign, two of the exponent, one of the fraction."""
        codes = torch.arange(16, dtype=torch.uint8)
        assert decode_e2m1(codes).tolist() == [*E2M1, *(-value for value in E2M1)]
        assert encode_e2m1(decode_e2m1(codes)).tolist() == list(range(16))
        assert encode_e2m1(torch.tensor([-0.1, 0.1, 1e9, -1e9, 2.5, 3.5])).tolist() == [8, 0, 7, 15, 4, 6]

    @pytest.mark.parametrize("dtype", FP8)
    def test_fp8_against_the_table_and_the_cast(self, dtype: torch.dtype) -> None:
        table = torch.arange(128, dtype=torch.uint8).view(dtype).float()
        table = table[table.isfinite()]
        assert (table[1:] > table[:-1]).all()
        values = values_of_16_bits()
        check_same(round_fp8(values, dtype), nearest(values, table))
        inside = values[values.abs() <= table[-1]]
        check_same(round_fp8(inside, dtype), inside.to(dtype).float())
        assert round_fp8(torch.tensor([1e9, -1e9, torch.inf]), dtype).tolist() == [table[-1], -table[-1], table[-1]]

    @pytest.mark.parametrize("dtype", [None, *FP8])
    def test_what_is_given_stays_and_nan_shows(self, dtype: torch.dtype | None) -> None:
        values = torch.tensor([[0.3, torch.nan], [-0.0, 1000.0]])
        before = values.clone()
        result = round_fp8(values.T, dtype) if dtype else round_e2m1(values.T)  # not contiguous, either
        assert torch.equal(values.nan_to_num(7), before.nan_to_num(7))
        assert result.isnan().tolist() == [[False, False], [True, False]]
        assert torch.signbit(result[0, 1])

    def test_e8m0_codes(self) -> None:
        codes = torch.arange(255, dtype=torch.uint8)
        powers = [2.0 ** (code - 127) for code in range(255)]
        assert decode_e8m0(codes).tolist() == powers
        assert encode_e8m0(decode_e8m0(codes)).tolist() == codes.tolist()
        normal = codes[1:]
        check_same(encode_e8m0(decode_e8m0(normal)), compress_mx_scale(decode_e8m0(normal), torch.uint8))
        check_same(decode_e8m0(normal), decompress_mx_scale(normal).float())

    def test_e8m0_takes_the_power_below(self) -> None:
        values = values_of_16_bits()
        values = values[values >= 2.0**-126]
        floor = floor_e8m0(values)
        assert (floor <= values).all()
        assert (floor.double() * 2 > values.double()).all()
        assert floor_e8m0(torch.tensor([0.0, 2.0**-130])).tolist() == [2.0**-127] * 2


MX = {"type": "float", "strategy": "group", "group_size": 32, "dynamic": True, "scale_dtype": torch.uint8}
DYNAMIC = {
    "int8-token": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "int4-token": {"num_bits": 4, "strategy": "token", "dynamic": True},
    "fp8-e4m3-token": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    "fp8-e4m3-g128": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128, "dynamic": True},
    "mxfp4": {"num_bits": 4, **MX},
    "mxfp8": {"num_bits": 8, **MX},
}
STATIC = {
    "int8-tensor": {"num_bits": 8, "strategy": "tensor"},
    "fp8-e4m3-tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
}
NVFP4 = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local",
    "scale_dtype": torch.float8_e4m3fn,
}  # fmt: skip
every_dynamic = pytest.mark.parametrize("name", DYNAMIC)
every_static = pytest.mark.parametrize("name", [*STATIC, "nvfp4"])


def scheme_of(name: str) -> ActivationScheme:
    if name in ("nvfp4", "mxfp4", "mxfp8", "llm-int8"):
        found = QuantScheme.parse(name).activations
        assert found is not None
        return found
    return ActivationScheme.parse(name, name)


def make_x(seed: int = 0) -> Tensor:
    """[4, 9, 256]: tokens of many magnitudes, with outliers, zeros, and values too small to have a scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 9, 256, generator=generator) * torch.logspace(-3, 2, 9)[:, None]
    x[:, 1, 7] = 300.0
    x[0, 0] = 0
    x[1, 0, :128] = 0
    x[1, 1] *= 1e-30
    x[1, 2] *= 1e-39
    x[2, 0, 40:80] *= 1e-7
    x[2, 0, 96:112] *= 1e-2  # for nvfp4 above what its scale for nothing would round, below what has a scale
    x[3, 3] = x[3, 3].abs()
    return x


def theirs(x: Tensor, args: dict[str, object], scale: Tensor | None = None) -> Tensor:
    """What compressed-tensors 0.19 computes when a model runs."""
    module = SimpleNamespace(
        quantization_status=QuantizationStatus.FROZEN,
        input_scale=scale,
        input_global_scale=scale if args["strategy"] == "tensor_group" else None,
    )
    return forward_quantize(module, x.clone(), "input", QuantizationArgs(**args))


@every_dynamic
def test_dynamic_rounding_is_that_of_compressed_tensors(name: str) -> None:
    for seed in range(3):
        x = make_x(seed)
        check_same(fake_quantize(x, scheme_of(name)), theirs(x, DYNAMIC[name]))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_mx_scales_at_every_exponent_and_border(name: str) -> None:
    """One group for each magnitude from 2^-140 to 2^120, at, below and above where the scale changes."""
    powers = torch.exp2(torch.arange(-140, 121).double())
    fractions = torch.tensor([1, 1.25, 1.5, 1.7499999, 1.75, 1.7500002, 1.9999999], dtype=torch.float64)
    largest = (powers[:, None] * fractions).flatten().float()
    shares = torch.rand(len(largest), 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    shares[:, 5] = 1
    x = (largest[:, None] * shares)[None]
    check_same(fake_quantize(x, scheme_of(name)), theirs(x, DYNAMIC[name]))


@every_static
@pytest.mark.parametrize("share", [1.0, 0.1])
def test_static_rounding_is_that_of_compressed_tensors(name: str, share: float) -> None:
    """Also where the calibration has seen less than there is, and values are clipped."""
    x = make_x()
    scheme, absmax = scheme_of(name), (share * x.abs().amax()).reshape(1)
    scale = static_scale(absmax, scheme)
    check_same(fake_quantize(x, scheme, scale), theirs(x, STATIC.get(name, NVFP4), scale))


@every_static
def test_static_scales_are_those_of_compressed_tensors(name: str) -> None:
    for largest in (0.0, 1e-44, 1e-38, 1e-30, 1e-3, 1.0, 448.0, 3e4, 1e30):
        absmax = torch.tensor([largest])
        if name == "nvfp4":
            expected = generate_gparam(-absmax, absmax)
        else:
            expected, _ = calculate_qparams(-absmax / 3, absmax, QuantizationArgs(**STATIC[name]))
        check_same(static_scale(absmax, scheme_of(name)), expected)


@pytest.mark.parametrize("name", [*DYNAMIC, "nvfp4", "llm-int8"])
def test_no_token_depends_on_the_others(name: str) -> None:
    """But for LLM.int8(), where an outlier takes its column of all tokens along."""
    x, scheme = make_x(), scheme_of(name)
    if name == "llm-int8":
        x.clamp_(-5, 5)
    scale = static_scale(x.abs().amax().reshape(1), scheme) if scheme.is_static else None
    whole = fake_quantize(x, scheme, scale)
    alone = [fake_quantize(token[None], scheme, scale) for token in x.flatten(0, 1)]
    check_same(whole, torch.cat(alone).view_as(x))


@pytest.mark.parametrize("name", [*DYNAMIC, "int8-tensor", "nvfp4"])
def test_chunks_and_threads_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, scheme, threads = make_x(), scheme_of(name), torch.get_num_threads()
    scale = static_scale(x.abs().amax().reshape(1), scheme) if scheme.is_static else None
    whole = fake_quantize(x, scheme, scale)
    monkeypatch.setattr("qtool.numerics.chunks.CPU_ELEMENTS", 7 * 256)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            check_same(fake_quantize(x.transpose(0, 1), scheme, scale).transpose(0, 1), whole)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*DYNAMIC, *STATIC, "nvfp4", "llm-int8"]),
    st.integers(-20, 10),
    st.integers(0, 10**6),
)
def test_errors_are_below_half_a_step(name: str, exponent: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, 128, generator=generator) * 2.0**exponent
    x[x.abs() < 2.0 ** (exponent - 3)] = 0
    scheme = scheme_of(name)
    scale = static_scale(x.abs().amax().reshape(1), scheme) if scheme.is_static else None
    rounded = fake_quantize(x, scheme, scale)
    assert (rounded[x == 0] == 0).all(), "zero stays zero"
    assert ((rounded == 0) | (rounded.sign() == x.sign())).all()
    groups = x.unflatten(-1, (-1, scheme.group_size or 128)).abs().amax(-1, keepdim=True)
    largest = groups.expand(-1, -1, scheme.group_size or 128).flatten(1)
    if scheme.granularity == "tensor":
        largest = x.abs().amax()
    if scheme.kind == "int":
        bound = largest / (2**scheme.bits - 1)
    elif scheme.kind == "llm-int8":
        bound = largest / 254 + x.abs() * 2**-11 + 2**-25  # the latter two of float16
    elif scheme.kind in ("fp8-e4m3", "mxfp8"):
        coarser = 2 if scheme.kind == "mxfp8" else 1
        bound = torch.maximum(x.abs() / 16, coarser * largest / 448 * 2**-10)
    else:  # half of the widest step is 1 where the largest is 5 to 7 (mxfp4), or 6 but for the rounding of its scale
        bound = largest / (5 if name == "mxfp4" else 5.6)
    gap = (rounded - x).abs()
    worst = (gap - bound).max()
    assert worst <= 1e-6 * x.abs().amax(), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}, over by {worst:.3e}"


@pytest.mark.parametrize("name", [*STATIC, "mxfp4"])
def test_rounding_twice_is_rounding_once(name: str) -> None:
    """With a fixed scale, and with powers of two; int8 per token is not so, since 127.5 steps are none."""
    x, scheme = make_x(), scheme_of(name)
    x[1] = 1  # not so among denormals
    scale = static_scale(x.abs().amax().reshape(1), scheme) if scheme.is_static else None
    once = fake_quantize(x, scheme, scale)
    check_same(fake_quantize(once, scheme, scale), once)


class TestMixedInt8:
    """LLM.int8() as bitsandbytes 0.50 computes it on a CPU."""

    scheme = scheme_of("llm-int8")

    def make(self) -> Tensor:
        x = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(1))
        x[0, 3, 11], x[1, 7, 11], x[1, 7, 50] = 6.0, -40.0, 7e4
        x[0, 4, 11] = 5.9
        x[0, 5] = 0
        x[0, 6] = 0
        x[0, 6, 50] = 9.0  # nothing beside an outlier
        x[1, 1] *= 0.01
        x[1, 2, 20] = 5.9995  # in float16 it reaches 6
        return x

    def test_codes_and_columns(self) -> None:
        from bitsandbytes.functional import int8_vectorwise_quant

        x = self.make()
        codes, row_stats, columns = int8_vectorwise_quant(x.flatten(0, 1).half(), threshold=6.0)
        assert columns.tolist() == [11, 20, 50]
        expected = codes.float() * (row_stats / 127)[:, None]
        expected[:, columns] = x.flatten(0, 1)[:, columns]
        gap = (fake_quantize(x, self.scheme).flatten(0, 1) - expected).abs()
        assert gap.max() < 1e-6, f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"

    def test_the_product_with_int8_weights(self) -> None:
        import bitsandbytes as bnb
        from bitsandbytes.functional import int8_vectorwise_quant

        x = self.make()
        x[1, 7, 50] = 30.0
        weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(2)).half()
        codes, scale, _ = int8_vectorwise_quant(weight)
        state = bnb.MatmulLtState()
        state.CB, state.SCB, state.has_fp16_weights, state.is_training = codes, scale, False, False
        theirs = bnb.matmul(x, codes, state=state, threshold=6.0)
        ours = fake_quantize(x, self.scheme) @ (codes.float() * (scale / 127)[:, None]).T
        gap = (ours - theirs).abs()
        # its CPU code multiplies by 6.200124e-05 for 1 / 127^2 = 6.2000124e-05
        assert gap.max() < 3e-5 * theirs.abs().max(), f"max difference {gap.max():.3e}, mean {gap.mean():.3e}"
        assert (ours - x @ weight.float().T).abs().max() > 0.01, "something was rounded"

    def test_by_hand(self) -> None:
        x = torch.tensor([[8.0, 1.0, -0.5, 3.0], [5.0, 0.25, 0.0, 1.0]])
        expected = torch.tensor(
            [[8.0, round(127 / 3) * 3 / 127, -round(63.5 / 3) * 3 / 127, 3.0], [5.0, 6 * 5 / 127, 0, 25 * 5 / 127]]
        )
        assert torch.allclose(fake_quantize(x, self.scheme), expected, atol=1e-6)


class Attention(nn.Module):
    """Linears that share an input as those of a block do, and one that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(32, 32, bias=False) for _ in range(3))
        self.change: float = 0.0

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if self.change:
            x += self.change
        return self.o(q * self.k(x))


class TestRoundInputs:
    scheme = scheme_of("int4-token")
    static = scheme_of("fp8-e4m3-tensor")

    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """Grows by one for every rounding."""
        calls: list[int] = []

        def counted(x: Tensor, scheme: ActivationScheme, scale: Tensor | None = None) -> Tensor:
            calls.append(1)
            return fake_quantize(x, scheme, scale)

        monkeypatch.setattr(runtime_inputs, "fake_quantize_inputs", counted)
        return calls

    @torch.no_grad()
    @pytest.mark.parametrize("change", [0.0, 0.3])
    def test_each_linear_reads_its_input_rounded(self, calls: list[int], change: float) -> None:
        torch.manual_seed(0)
        block, x = Attention(), torch.randn(2, 5, 32)
        block.change = change
        scale = torch.tensor([0.01])
        plain = block(x.clone())
        q, k = block.q(fake_quantize(x, self.scheme)), block.k(fake_quantize(x + change, self.scheme))
        expected = block.o(fake_quantize(q * k, self.static, scale))
        roundings = {"q": (self.scheme, None), "k": (self.scheme, None), "o": (self.static, scale)}
        with round_inputs(block, roundings):
            check_same(block(x.clone()), expected)
            assert len(calls) == (3 if change else 2), "q and k share theirs, unless it was changed in between"
            check_same(block(x.clone()), expected)
        check_same(block(x.clone()), plain)
        assert not torch.equal(plain, expected)

    @torch.no_grad()
    def test_scales_that_differ_are_not_shared(self, calls: list[int]) -> None:
        block, x = Attention(), torch.randn(2, 5, 32)
        scales = [torch.tensor([0.02]), torch.tensor([0.01]), torch.tensor([0.01])]
        for k_scale, expected_calls in ((scales[1], 2), (torch.tensor([0.02]), 1)):
            calls.clear()
            with round_inputs(block, {"q": (self.static, scales[0]), "k": (self.static, k_scale)}):
                found = block(x.clone())
            q, k = (fake_quantize(x, self.static, scale) for scale in (scales[0], k_scale))
            check_same(found, block.o(block.q(q) * block.k(k)))
            assert len(calls) == expected_calls

    def test_hooks_go_when_the_block_fails(self) -> None:
        block = Attention()
        with pytest.raises(RuntimeError), round_inputs(block, {"q": (self.scheme, None)}):
            block(torch.zeros(2, 31))
        assert not block.q._forward_pre_hooks
