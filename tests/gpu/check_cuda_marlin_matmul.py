"""Checks cuda_int4::linear on marlin.v1 and marlin24.v1 on CUDA with M > 16; times it on request.

    python tests/gpu/check_cuda_marlin_matmul.py [--quick] [--time]

Cases, bounds and timing are those of check_cuda_matmul.py, beside this; the weights are packed by
the packers of the package, from codes, scales and zero points drawn here. 2:4 weights have two
codes of each four that may differ from 8, some of which are 8.
"""

from __future__ import annotations

import argparse
import sys

import check_cuda_matmul as base
import torch

from cuda_int4.int4 import CanonicalInt4
from cuda_int4.marlin import Marlin24Int4, MarlinInt4
from cuda_int4.marlin_layouts import MARLIN, MARLIN24, meta_shape, padded_n, qdata_shape

PLACES = (0x4, 0x8, 0x9, 0xC, 0xD, 0xE)  # two of four, in order
TIMED_ROWS = (32, 64, 128, 256, 1024)


class MarlinWeight(base.Weight):
    """A weight in the order ``marlin.v1``."""

    layout_tag = MARLIN

    def __init__(
        self, N: int, K: int, group_size: int, scale_dtype: torch.dtype, zero: str, seed: int = 0
    ) -> None:
        """Fresh codes, scales and zero points, packed."""
        super().__init__(N, K, group_size, scale_dtype, zero, seed)
        self.pack()

    def canonical(self) -> CanonicalInt4:
        """As drawn."""
        return CanonicalInt4(self.qdata, self.scale, self.zero_point, self.group_size)

    def pack(self) -> None:
        """Parts in the order of the layout."""
        packed = MarlinInt4.pack(self.canonical())
        self.qdata, self.scale, self.zero_point = packed.qdata, packed.scale, packed.zero_point

    @classmethod
    def random(
        cls, N: int, K: int, group_size: int, dtype: torch.dtype, zero_points: bool, seed: int
    ) -> base.Weight:
        """One to be timed: bytes as they come, and no ``exact``."""
        weight = cls(64, group_size, group_size, dtype, "none", seed)
        weight.N, weight.K = N, K
        shape = qdata_shape(cls.layout_tag, N, K)
        weight.qdata = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
        groups = (K // group_size, padded_n(N))
        weight.scale = torch.rand(groups, device="cuda").mul(0.01).to(dtype)
        if zero_points:
            weight.zero_point = torch.rand_like(weight.scale) * 15
        return weight


class Marlin24Weight(MarlinWeight):
    """A 2:4 weight in the order ``marlin24.v1``."""

    layout_tag = MARLIN24

    def pack(self) -> None:
        """Two of each four codes become 8, then as the layout has it."""
        generator = torch.Generator("cuda").manual_seed(self.N + self.K)
        keep = torch.rand(self.N, self.K // 4, 4, generator=generator, device="cuda")
        kept = (keep.argsort(-1).argsort(-1) >= 2).view(self.N, self.K)
        codes = torch.stack([self.qdata & 15, self.qdata >> 4], -1).view(self.N, self.K)
        codes = torch.where(kept, codes, torch.full_like(codes, 8))
        self.exact = torch.where(kept, self.exact, torch.zeros_like(self.exact))
        self.qdata = codes[:, ::2] | (codes[:, 1::2] << 4)
        packed = Marlin24Int4.pack(self.canonical())
        self.qdata, self.scale, self.meta = packed.qdata, packed.scale, packed.meta

    @classmethod
    def random(
        cls, N: int, K: int, group_size: int, dtype: torch.dtype, zero_points: bool, seed: int
    ) -> base.Weight:
        """One to be timed."""
        weight = super().random(N, K, group_size, dtype, zero_points, seed)
        places = torch.tensor(PLACES, dtype=torch.uint8, device="cuda")
        rows, columns = meta_shape(N, K)
        draw = torch.randint(0, len(PLACES), (rows, columns, 4), device="cuda", dtype=torch.int32)
        nibbles = places[draw]
        low, high = nibbles[..., ::2], nibbles[..., 1::2]
        weight.meta = (low | (high << 4)).view(torch.int16).view(rows, columns)
        return weight


def main() -> int:
    """Check, report, time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--time", action="store_true", help="time it beside cuBLAS")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "check_cuda_marlin_matmul: expected a CUDA GPU, torch sees none; run it where there "
            "is one"
        )
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    shapes = base.QUICK_SHAPES if options.quick else base.SHAPES
    rows = base.QUICK_ROWS if options.quick else base.ROWS
    n_wrong = 0
    for make, zero_points in ((MarlinWeight, base.ZERO_POINTS), (Marlin24Weight, ("none",))):
        checker = base.Checker()
        print(make.layout_tag)
        base.check_shapes(checker, shapes, rows, make, zero_points)
        base.check_special(checker, make, zero_points[-1])
        print(f"{checker.n_right} right, {checker.n_wrong} wrong", flush=True)
        n_wrong += checker.n_wrong
    if options.time and n_wrong == 0:
        for make in (MarlinWeight, Marlin24Weight):
            for dtype in base.DTYPES:
                base.time_all(base.TIMED_SHAPES, TIMED_ROWS, dtype=dtype, replays=9, make=make)
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
