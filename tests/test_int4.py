"""Reading int4 weights: every format against its own definition in float64, and what is refused."""

import numpy as np
import pytest
import torch
from executorch.extension.llm.export.gguf import ExportableGGUFTensor
from executorch.extension.llm.export.int4 import ExportableInt4Tensor
from expecttest import assert_expected_inline
from torchao.quantization import Int4Tensor, IntxUnpackedToInt8Tensor

import cases
from cuda_int4 import int4
from cuda_int4.packing import pack_nibbles, unpack_nibbles
from messages import folded, message


def tensor(qdata, scale, zero, group_size=None, **optional) -> Int4Tensor:
    """An Int4Tensor from parts; scale and zero [n_groups, N]."""
    N, K = qdata.shape[0], 2 * qdata.shape[1]
    group_size = group_size or K // scale.shape[0]
    return Int4Tensor(qdata, scale, zero, [1, group_size], torch.Size((N, K)), **optional)


def random_qdata(N, K, dtype=torch.uint8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, generator=generator).view(dtype)


def assert_reads_as(read: int4.CanonicalInt4, w: torch.Tensor):
    """The promise of int4.py: 2**-22 * (16 * |scale| + |w|), for each weight."""
    scale = read.scale.double().repeat_interleave(read.group_size, dim=1)
    error = (read.dequantize(torch.float64) - w).abs()
    assert (error <= 2**-22 * (16 * scale.abs() + w.abs())).all()


# ---- values ----


@pytest.mark.parametrize("case", cases.WEIGHTS + cases.DTYPES, ids=str)
def test_a_case_reads_as_its_definition(case):
    source = case.source(seed=0)
    read = int4.read_int4(source)
    assert_reads_as(read, cases.definition(source))
    assert (read.shape, read.group_size) == (tuple(source.shape), case.group_size)
    assert (read.scale.dtype, read.dtype) == (case.scale_dtype, source.dtype)
    assert (read.zero_point is None) == (case.zero == "symmetric")


def test_integer_zero_points_keep_the_dtype_of_scale_and_others_become_float32():
    whole = cases.Case(1, 33, 384, 128, "executorch", "integer")
    assert int4.read_int4(whole.source(0)).zero_point.dtype == torch.bfloat16
    fractional = cases.Case(1, 33, 384, 128, "native", "fractional")
    assert int4.read_int4(fractional.source(0)).zero_point.dtype == torch.float32


def test_zero_points_are_never_clamped():
    zero = torch.tensor([[-7.5, 0.25, 15.5, 300.0]])
    read = int4.read_int4(tensor(random_qdata(4, 32), torch.full((1, 4), 0.5), zero))
    assert torch.equal(read.zero_point, zero.t())


def test_the_convention_follows_the_dtype_of_qdata_and_the_caller_overrides_it():
    scale, zero = torch.full((1, 2), 0.5), torch.tensor([[1.0, -3.0]])
    signed = tensor(random_qdata(2, 32, torch.int8), scale, zero)
    unsigned = tensor(signed.qdata.view(torch.uint8), scale, zero)
    native, executorch = cases.definition(signed), cases.definition(unsigned)
    assert not torch.equal(native, executorch)
    for source in (signed, unsigned):
        assert_reads_as(int4.read_int4(source, "native"), native)
        assert_reads_as(int4.read_int4(source, "executorch"), executorch)
    assert_reads_as(int4.read_int4(signed), native)
    assert_reads_as(int4.read_int4(unsigned), executorch)


def test_a_slice_along_k_reads_as_the_slice():
    source = cases.Case(1, 7, 192, 64, "native", "fractional").source(0)
    part = source[:, 64:192]
    assert not part.qdata.is_contiguous()
    assert_reads_as(int4.read_int4(part), cases.definition(source)[:, 64:192])


def test_nibbles_unpack_to_what_was_packed():
    q = torch.arange(96, dtype=torch.uint8).reshape(2, 48) % 16
    assert torch.equal(unpack_nibbles(pack_nibbles(q)), q)
    assert pack_nibbles(torch.tensor([[1, 2]], dtype=torch.uint8)).item() == 0x21


# ---- groups without a scale ----


def test_native_groups_of_scale_zero_are_exact():
    scale = torch.tensor([[0.0, 0.5, 0.0]], dtype=torch.bfloat16)
    zero = torch.tensor([[-3.25, 1.0, 0.0]], dtype=torch.bfloat16)
    source = tensor(random_qdata(3, 64, torch.int8), scale, zero)
    before = source.qdata.clone()
    read = int4.read_int4(source)
    assert torch.equal(read.dequantize(torch.float64), cases.definition(source))
    assert read.zero_point[:, 0].tolist() == [-1, 6, 8]
    assert read.scale[:, 0].tolist() == [-3.25, 0.5, 0]
    assert read.qdata[0].max() == 0
    assert torch.equal(source.qdata, before)


def test_a_constant_that_the_scale_dtype_cannot_hold_widens_the_scales():
    scale = torch.tensor([[0.0, 0.25]], dtype=torch.bfloat16)
    source = tensor(random_qdata(2, 32, torch.int8), scale, torch.tensor([[1 + 2**-20, 0.0]]))
    read = int4.read_int4(source)
    assert read.scale.dtype == torch.float32
    assert torch.equal(read.dequantize(torch.float64), cases.definition(source))


def test_a_scale_that_vanishes_beside_its_zero_reads_as_a_constant():
    scale = torch.tensor([[2.0**-130]], dtype=torch.bfloat16)  # zero / scale is not a float32
    source = tensor(random_qdata(1, 32, torch.int8), scale, torch.tensor([[3.0]]).bfloat16())
    assert torch.equal(int4.read_int4(source).dequantize(), torch.full((1, 32), 3.0))


def test_executorch_groups_of_scale_zero_stay_zero():
    scale, zero = torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 8.0]])
    read = int4.read_int4(tensor(random_qdata(2, 32), scale, zero))
    assert not read.dequantize()[0].any()
    assert read.zero_point is None  # the 5 meant nothing


# ---- other tensor types ----


def test_exportable_reads_as_the_int4_tensor_it_came_from():
    source = cases.Case(1, 9, 160, 32, "executorch", "integer").source(0)
    read = int4.read_int4(ExportableInt4Tensor.from_int4_tensor(source))
    assert_reads_as(read, cases.definition(source))


def test_exportable_made_from_a_native_tensor_is_refused_unless_stated():
    source = cases.Case(1, 9, 160, 32, "native", "fractional").source(0)
    exportable = ExportableInt4Tensor.from_int4_tensor(source)
    assert_reads_as(int4.read_int4(exportable, "native"), cases.definition(source))
    assert_expected_inline(
        folded(message(int4.read_int4, exportable, who="layers.0.wq.weight")),
        """\
layers.0.wq.weight: expected an ExportableInt4Tensor with uint8 qdata, got int8 [9, 80]: it was
    made from a native Int4Tensor, whose nibbles are signed; give prepare_ the Int4Tensor
    itself, or state convention='native'""",
    )


@pytest.mark.parametrize("zero_dtype", [torch.int8, torch.bfloat16])
def test_intx_reads_as_its_definition(zero_dtype):
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (5, 96), dtype=torch.int8, generator=generator)
    scale = (torch.rand(5, 3, generator=generator) + 0.1).bfloat16()
    zero = torch.randint(-8, 8, (5, 3), generator=generator).to(zero_dtype)
    if zero_dtype.is_floating_point:
        zero = zero + 0.5
    source = intx(codes, scale, zero)
    each = lambda t: t.double().repeat_interleave(32, dim=1)  # noqa: E731
    assert_reads_as(int4.read_int4(source), (codes.double() - each(zero)) * each(scale))


def intx(codes, scale, zero, target=torch.int4, activation=None) -> IntxUnpackedToInt8Tensor:
    block_size = (1, codes.shape[1] // scale.shape[1])
    return IntxUnpackedToInt8Tensor(codes, scale, zero, target, block_size, scale.dtype, activation)


def q4_k_blocks(N, n_blocks, seed=0) -> np.ndarray:
    """Random Q4_K bytes [N, n_blocks * 144], with some sub-blocks of sc 0."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (N, n_blocks, 144), dtype=np.uint8)
    d = random.uniform(1e-4, 1e-2, (N, n_blocks, 2)).astype(np.float16)
    raw[..., :4] = d.view(np.uint8)
    raw[..., 4] &= 0xC0  # sc of sub-block 0
    raw[..., 12] &= 0xF0  # and of sub-block 4, low bits; its high bits are in byte 4
    raw[..., 4] &= 0x3F
    return raw.reshape(N, -1)


def q4_k_definition(row: bytes) -> list[float]:
    """One row of Q4_K blocks, weight by weight, as ggml defines it."""
    w = []
    for start in range(0, len(row), 144):
        block = row[start : start + 144]
        d, dmin = (float(v) for v in np.frombuffer(block[:4], np.float16))
        packed, codes = block[4:16], block[16:]
        for sub in range(8):
            if sub < 4:
                sc, m = packed[sub] & 63, packed[sub + 4] & 63
            else:
                sc = (packed[sub + 4] & 15) | (packed[sub - 4] >> 6) << 4
                m = (packed[sub + 4] >> 4) | (packed[sub] >> 6) << 4
            run = codes[32 * (sub // 2) : 32 * (sub // 2) + 32]
            w += [d * sc * (b >> 4 if sub % 2 else b & 15) - dmin * m for b in run]
    return w


def test_gguf_q4_k_reads_as_ggml_defines_it():
    raw = q4_k_blocks(3, 2)
    weight = ExportableGGUFTensor.from_raw(torch.from_numpy(raw), "q4_k")
    read = int4.read_int4(weight)
    w = torch.tensor([q4_k_definition(row.tobytes()) for row in raw], dtype=torch.float64)
    assert_reads_as(read, w)
    assert (read.shape, read.group_size, read.dtype) == ((3, 512), 32, torch.bfloat16)
    # A sub-block with sc 0 is its minimum everywhere, which executorch's own reader drops.
    assert (w[:, :32] == w[:, :1]).all() and (w[:, 0] != 0).any()
    assert read.zero_point[:, 0].tolist() == [-1, -1, -1]


# ---- act_pre_scale, scale dtype ----


@pytest.mark.parametrize("shape", [(), (1,), (64,), (1, 64)])
def test_act_pre_scale_is_carried_flat(shape):
    pre_scale = torch.rand(shape) + 0.5
    source = tensor(
        random_qdata(2, 64), torch.ones(2, 2), torch.ones(2, 2), act_pre_scale=pre_scale
    )
    assert torch.equal(int4.read_int4(source).act_pre_scale, pre_scale.reshape(-1))


def test_a_smaller_scale_dtype_costs_a_rounding_of_scale_and_zero_point():
    read = int4.from_gguf_blocks(torch.from_numpy(q4_k_blocks(3, 2)), "q4_k")
    small = read.with_scale_dtype(torch.bfloat16)
    assert (small.scale.dtype, small.zero_point.dtype) == (torch.bfloat16, torch.bfloat16)
    error = (small.dequantize() - read.dequantize()).abs()
    each = lambda t: t.float().repeat_interleave(32, dim=1)  # noqa: E731
    offset = each(read.zero_point * read.scale).abs()
    # Half an ulp of bf16 each: of the scale, in q * scale, and of the zero point, in its offset.
    assert (error <= 1.01 * 2**-8 * (15 * each(read.scale).abs() + offset)).all()
    assert error.max() > 0


def test_a_scale_dtype_without_the_range_is_refused():
    scale = torch.full((1, 2), 2.0**-40)
    read = int4.read_int4(tensor(random_qdata(2, 32), scale, torch.full((1, 2), 8.0)))
    assert "take bfloat16" in message(read.with_scale_dtype, torch.float16)
    assert torch.equal(read.with_scale_dtype(torch.bfloat16).dequantize(), read.dequantize())


# ---- refusals ----


def refusals() -> dict[str, tuple]:
    one, qdata = torch.ones(2, 3), random_qdata(3, 64)
    stack = Int4Tensor(
        qdata.expand(2, 3, 32), one.expand(2, 2, 3), one.expand(2, 2, 3), [1, 1, 32], (2, 3, 64)
    )
    column = Int4Tensor(qdata, one, one, [32, 1], torch.Size((3, 64)))
    nan = one.clone()
    nan[1, 2] = torch.nan
    codes, small = torch.zeros(3, 64, dtype=torch.int8), torch.ones(3, 2)
    return {
        "stack of experts": (stack,),
        "blocks along n": (column,),
        "qdata of int32": (tensor(qdata.to(torch.int32), one, one),),
        "unknown convention": (tensor(qdata, one, one), "ggml"),
        "scale in the other order": (tensor(qdata, one.t(), one.t(), 32),),
        "zero_point of another shape": (tensor(qdata, one, one[:1]),),
        "shape of another weight": (Int4Tensor(qdata, one, one, [1, 32], torch.Size((3, 128))),),
        "group_size 16": (tensor(qdata, torch.ones(4, 3), torch.ones(4, 3)),),
        "scale of float64": (tensor(qdata, one.double(), one),),
        "scale with nan": (tensor(qdata, nan, one),),
        "native zero with nan": (tensor(qdata.view(torch.int8), one, nan),),
        "zero_point with nan": (tensor(qdata, one, nan),),
        "fp8 activations": (tensor(qdata, one, one, activation_dtype=torch.float8_e4m3fn),),
        "act_pre_scale of N values": (tensor(qdata, one, one, act_pre_scale=torch.ones(3)),),
        "int8 intx": (intx(codes, small, small, torch.int8),),
        "codes beyond 4 bits": (intx(codes + 9, small, small),),
        "intx with activations": (intx(codes, small, small, activation="int8_asym_per_token"),),
        "convention of an intx": (intx(codes, small, small), "native"),
        "gguf q6_k": (
            ExportableGGUFTensor(torch.zeros(2, 210, dtype=torch.uint8), "q6_k", one.dtype),
        ),
        "float weight": (one,),
    }


def test_what_cannot_be_read_is_refused_with_the_name_and_the_cure():
    found = [
        f"{what}: "
        + message(int4.read_int4, *args, error=(ValueError, NotImplementedError), who="w")
        for what, args in refusals().items()
    ]
    assert_expected_inline(
        folded(*found),
        """\
stack of experts: w: expected a 2-D weight with block_size [1, group_size], got block_size=[1,
    1, 32]; quantise again along K, one weight at a time
blocks along n: w: expected a 2-D weight with block_size [1, group_size], got block_size=[32,
    1]; quantise again along K, one weight at a time
qdata of int32: w: expected qdata int8 (native: signed nibbles, float zero) or uint8
    (executorch: unsigned nibbles, integer zero point), got int32 [3, 32]; state
    convention='native' or 'executorch' (got None)
unknown convention: w: expected qdata int8 (native: signed nibbles, float zero) or uint8
    (executorch: unsigned nibbles, integer zero point), got uint8 [3, 32]; state
    convention='native' or 'executorch' (got 'ggml')
scale in the other order: w: expected scale [n_groups, N] = [2, 3], got float32 [3, 2]; the
    weight contradicts its block_size or shape
zero_point of another shape: w: expected zero_point [n_groups, N] = [2, 3], got float32 [1, 3];
    the weight contradicts its block_size or shape
shape of another weight: w: expected qdata [N, K/2] = [3, 64] for shape (3, 128), got uint8 [3,
    32]; the Int4Tensor contradicts itself
group_size 16: w: expected group_size in 32, 64, 128, 256 or equal to K=64, got group_size=16;
    quantise again with one of these
scale of float64: w: expected scale float16, bfloat16 or float32, got float64; cast it to one of
    them
scale with nan: w: expected finite scale, got nan at [2, 1] (1 in all); quantise again from
    weights without inf and nan
native zero with nan: w: expected finite zero_point, got nan at [2, 1] (1 in all); quantise
    again from weights without inf and nan
zero_point with nan: w: expected finite zero_point, got nan at [2, 1] (1 in all); quantise again
    from weights without inf and nan
fp8 activations: w: expected an Int4Tensor with 16-bit activations, got
    activation_dtype=torch.float8_e4m3fn; quantise again with activation_dtype=torch.bfloat16,
    and ask for int8 activations with activation='int8'
act_pre_scale of N values: w: expected act_pre_scale with 1 value or K=64 along its last
    dimension, got float32 [3]; it multiplies x along K
int8 intx: w: expected target_dtype torch.int4, got torch.int8; quantise to 4 bits
codes beyond 4 bits: w: expected codes in -8..7, got 9..9; the tensor is not 4-bit
intx with activations: w: expected a weight-only tensor, got
    activation_quantization=int8_asym_per_token; quantise again weight-only
    (IntxWeightOnlyConfig) and ask for int8 activations with activation='int8'
convention of an intx: w: expected no convention for IntxUnpackedToInt8Tensor, which has one
    meaning, got 'native'; leave it out
gguf q6_k: w: expected a GGUF tensor of type q4_k, got q6_k; quantise it to Q4_K, or dequantise
    it and quantise again with quantize_
float weight: w: expected an int4 weight (Int4Tensor, ExportableInt4Tensor,
    ExportableGGUFTensor, IntxUnpackedToInt8Tensor), got Tensor of float32 [2, 3]; quantise a
    float weight with quantize_, rebuild another int4 packing as Int4Tensor""",
    )


def test_truncated_gguf_blocks_are_refused():
    assert_expected_inline(
        folded(message(int4.from_gguf_blocks, torch.zeros(2, 143, dtype=torch.uint8), "q4_k")),
        """\
weight: expected Q4_K blocks uint8 [N, 144 * K/256], got uint8 [2, 143]; the tensor is truncated
    or of another type""",
    )
