"""The cases that tests and benchmarks share: int4 linears whose every parameter differs.

A bug shows only where values differ: no two neighbouring scales or zero points of a case are equal,
so a wrong group or row is a wrong answer, and no case is all zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torchao.quantization import Int4Tensor

from cuda_int4.tensors import CudaCoalescedInt4Tensor


@dataclass(frozen=True)
class Case:
    """One linear: x [M, K], int4 weight [N, K].

    Attributes:
        M: rows of x.
        N: output features.
        K: input features.
        group_size: weights along K that share a scale.
        convention: ``"native"`` or ``"executorch"``, of the source tensor.
        zero: ``"symmetric"``; ``"integer"`` zero points 0..15; ``"fractional"``: any float, also
            negative and beyond 15.
        dtype: of x.
        scale_dtype: of the scales.
    """

    M: int
    N: int
    K: int
    group_size: int
    convention: str = "executorch"
    zero: str = "symmetric"
    dtype: torch.dtype = torch.bfloat16
    scale_dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        dtypes = [str(d).removeprefix("torch.") for d in (self.dtype, self.scale_dtype)]
        return (
            f"M{self.M}-N{self.N}-K{self.K}-g{self.group_size}-{self.convention}-{self.zero}"
            f"-{'-'.join(dtypes)}"
        )

    def source(self, seed: int) -> Int4Tensor:
        """The torchao tensor; its fields as its convention has them."""
        generator = torch.Generator().manual_seed(seed)
        n_groups = self.K // self.group_size
        qdata = torch.randint(0, 256, (self.N, self.K // 2), dtype=torch.uint8, generator=generator)
        scale = _distinct_scales(n_groups, self.N, self.scale_dtype, generator)
        if self.zero == "symmetric":
            z = torch.full_like(scale, 8)
        elif self.zero == "integer":
            z = _shuffled(torch.arange(scale.numel()) % 16, generator).view_as(scale)
        else:
            z = 80 * (torch.arange(scale.numel()) + 1) / scale.numel() - 39.875
            z = _shuffled(z, generator).view_as(scale)
        if self.convention == "native":  # float zero in units of w; not rounded to the zero of z
            qdata = (qdata ^ 0x88).view(torch.int8)
            z = (8 - z.double()) * scale.double()
        return Int4Tensor(
            qdata, scale, z.to(self.scale_dtype), [1, self.group_size], torch.Size((self.N, self.K))
        )

    def make(self, seed: int) -> tuple[Tensor, CudaCoalescedInt4Tensor]:
        """An x [M, K] of unit variance, and the packed weight."""
        x = torch.randn(self.M, self.K, generator=torch.Generator().manual_seed(seed + 1))
        weight = CudaCoalescedInt4Tensor.from_int4(self.source(seed))
        return x.to(self.dtype), weight.to(self.dtype)


def definition(source: Int4Tensor) -> Tensor:
    """What an Int4Tensor means, in float64, one weight's formula at a time: the readers' oracle."""
    N, K = source.shape
    q = torch.empty(N, K, dtype=torch.float64)
    unsigned = source.qdata.view(torch.uint8)
    q[:, ::2], q[:, 1::2] = (unsigned % 16).double(), (unsigned // 16).double()
    g = torch.arange(K) // source.block_size[1]
    scale, zero = source.scale.double().t()[:, g], source.zero_point.double().t()[:, g]
    if source.qdata.dtype == torch.int8:
        signed = torch.where(q < 8, q, q - 16)
        return signed * scale + zero
    return (q - zero) * scale


def _distinct_scales(
    n_groups: int, N: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """[n_groups, N], 2**-9 to 2**-5, shuffled; distinct as far as the dtype has values for it."""
    steps = 4 * torch.arange(n_groups * N) / (n_groups * N)  # 4 octaves, each linear: exact floats
    values = torch.ldexp(1 + steps % 1, steps.floor() - 9)
    return _shuffled(values.to(dtype), generator).view(n_groups, N)


def _shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(values.numel(), generator=generator)]


# (N, K, group_size): ragged N, the least K, K that 256 does not divide, every group size.
SHAPES = (
    (1, 32, 32),
    (3, 96, 32),
    (8, 64, 64),
    (7, 192, 64),
    (13, 128, 128),
    (33, 384, 128),
    (5, 512, 256),
    (9, 160, 160),
    (16, 1056, 1056),
    (65, 1024, 32),
)
_ZEROS = ("symmetric", "integer", "fractional")
_CONVENTIONS = ("executorch", "native")

# Every shape in both conventions with every kind of zero point.
WEIGHTS = tuple(
    Case(1, N, K, group_size, convention, zero)
    for N, K, group_size in SHAPES
    for convention in _CONVENTIONS
    for zero in _ZEROS
)
# x and scales in each dtype, equal and mixed.
DTYPES = tuple(
    Case(2, 13, 288, 32, "native", "fractional", dtype, scale_dtype)
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for scale_dtype in (torch.bfloat16, torch.float16, torch.float32)
)
DECODE = WEIGHTS + tuple(replace(case, M=1) for case in DTYPES)
PREFILL = tuple(
    replace(case, M=M) for M, case in zip((2, 7, 64, 33) * len(WEIGHTS), WEIGHTS, strict=False)
)
LINEARS = DECODE + PREFILL + DTYPES
