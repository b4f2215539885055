"""Kernels read and write nothing outside their tensors: each lies against a page of no access.

A byte too far is a SIGSEGV, which the tests' process would not survive: the sweep runs in its own.
"""

import ctypes
import mmap
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import kernel_calls
from cuda_int4.int4 import CanonicalInt4
from cuda_int4.tensors import CudaMarlin24Int4Tensor, CudaMarlinInt4Tensor
from kernel_calls import FLOATS, available_isas

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def fenced(tensor: Tensor, at_end: bool) -> Tensor:
    """A copy that ends (or begins) at a page that can be neither read nor written."""
    nbytes = tensor.numel() * tensor.element_size()
    inner = -(-max(nbytes, 1) // PAGE) * PAGE
    memory = mmap.mmap(-1, inner + 2 * PAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    for fence in (0, PAGE + inner):
        page = ctypes.c_void_p(whole.data_ptr() + fence)
        assert _libc.mprotect(page, ctypes.c_size_t(PAGE), 0) == 0, ctypes.get_errno()
    first = PAGE + inner - nbytes if at_end else PAGE
    copy = whole[first : first + nbytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def sweep(isa: str) -> None:
    """Every op on shapes with tails, its tensors at the end of memory and at its beginning."""
    for at_end in (True, False):
        kernel_calls.poisoned = lambda shape, dtype, at_end=at_end: (
            fenced(torch.full(shape, float("nan"), dtype=dtype), at_end),
            torch.full((1,), float("nan")),
        )
        for N, K, group_size in SHAPES:
            for M in (1, 3, 4, 9):
                for dtype in FLOATS:
                    for scale_dtype in FLOATS:
                        linears(isa, at_end, M, N, K, group_size, dtype, scale_dtype)
        others(isa, at_end)


# N: 1, a ragged unit of the matvec, of the matmul on 8 and 16 lanes; K: not a whole block.
SHAPES = (
    (1, 32, 32),
    (5, 96, 96),
    (7, 160, 32),
    (17, 192, 64),
    (33, 384, 128),
    (3, 2336, 32),  # more blocks than the group buffers hold
)


def linears(isa, at_end, M, N, K, group_size, dtype, scale_dtype) -> None:
    """w4a16 and w4a8, with and without zero points and bias."""

    def fence(t: Tensor) -> Tensor:
        return fenced(t, at_end)

    x = fence(torch.randn(M, K).to(dtype))
    qdata = fence(torch.randint(0, 256, (N, K // 2), dtype=torch.uint8))
    scale = fence(torch.rand(N, K // group_size).to(scale_dtype))
    zero_point = fence(torch.rand(N, K // group_size).to(scale_dtype))
    bias = fence(torch.randn(N).to(dtype))
    for activation in ("none", "int8"):
        for zero, b in ((None, None), (zero_point, bias)):
            y = kernel_calls.linear(
                x, qdata, scale, zero, group_size, bias=b, activation=activation, isa=isa
            )
            assert y.isfinite().all()
    source = CanonicalInt4(qdata.clone(), scale.clone(), zero_point.clone(), group_size)
    dense = CudaMarlinInt4Tensor.from_int4(source)
    eights = CanonicalInt4(torch.full_like(qdata, 0x88), scale.clone(), None, group_size)
    for packed in (dense, CudaMarlin24Int4Tensor.from_int4(eights)):
        parts = (packed.qdata, packed.scale, packed.zero_point)
        fenced_parts = [None if part is None else fence(part) for part in parts]
        meta = None if packed.meta is None else fence(packed.meta)
        for activation in ("none", "int8"):
            y = kernel_calls.linear(
                x, *fenced_parts, group_size, meta=meta, bias=bias, tag=packed.layout_tag,
                out_features=N, activation=activation, isa=isa,
            )  # fmt: skip
            assert y.isfinite().all()


def others(isa: str, at_end: bool) -> None:
    """attention, rms_norm and silu, with head sizes and lengths that no vector divides."""
    for dtype in FLOATS:
        for D, T in ((1, 1), (20, 17), (33, 16)):
            q = fenced(torch.randn(1, 4, 3, D).to(dtype), at_end)
            k, v = (fenced(torch.randn(1, 2, T, D).to(dtype), at_end) for _ in range(2))
            mask = fenced(torch.ones(3, T, dtype=torch.bool), at_end)
            kernel_calls.attention(q, k, v, mask, scale=1.0, isa=isa)
            x = fenced(torch.randn(3, D).to(dtype), at_end)
            weight = fenced(torch.randn(D).to(dtype), at_end)
            kernel_calls.rms_norm(x, weight, 1e-6, isa=isa)
            kernel_calls.silu(x, isa=isa)


@pytest.mark.parametrize("isa", available_isas())
def test_nothing_outside_the_tensors_is_touched(isa):
    found = subprocess.run(
        [sys.executable, __file__, isa], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, f"{found.returncode}: {found.stderr[-2000:]}"


def test_the_fences_hold():
    for at_end, offset in ((True, 8), (False, -1)):
        code = (
            "import sys, torch, ctypes, test_kernels_bounds as t;"
            f"x = t.fenced(torch.zeros(8, dtype=torch.uint8), {at_end});"
            f"ctypes.string_at(x.data_ptr() + {offset}, 1)"
        )
        found = subprocess.run([sys.executable, "-c", code], cwd=__file__.rpartition("/")[0])
        assert found.returncode == -11


if __name__ == "__main__":
    sweep(sys.argv[1])
