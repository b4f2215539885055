"""Checks the layouts of int4 weights around the kernels, on a GPU.

    python tests/gpu/check_cuda_layouts.py

Packing on the GPU gives the CPU's bytes; embeddings look up the same rows; ``quantize_`` with every
layout runs at once; a file in every layout, exported here, computes on the GPU what its CPU kernels
compute, up to the order of sums; metadata that is not 2:4 is refused at load. The numbers of each
kernel: check_cuda_linear.py, check_cuda_marlin.py, check_cuda_marlin24.py.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cuda_int4  # noqa: E402
import delegate_models as models  # noqa: E402
import forged  # noqa: E402
from cuda_int4 import Int4Config  # noqa: E402
from cuda_int4._native import CudaInt4Error  # noqa: E402
from cuda_int4.int4 import CanonicalInt4  # noqa: E402
from cuda_int4.packing import pack_nibbles  # noqa: E402
from cuda_int4.tensors import TENSORS  # noqa: E402

LAYOUTS = ("coalesced", "marlin", "marlin24")
SHAPES = ((1, 32, 32), (65, 96, 96), (100, 256, 64), (192, 1280, 256), (1000, 512, 32))


class Report:
    """Counts what was checked, and says what was wrong as it comes."""

    def __init__(self) -> None:
        self.n, self.wrong = 0, 0

    def expect(self, holds: bool, what: str) -> None:
        """One check."""
        self.n += 1
        if not holds:
            self.wrong += 1
            print(f"WRONG: {what}")


def weight(N: int, K: int, group_size: int, sparse: bool, zero_point: bool) -> CanonicalInt4:
    """Random codes; every scale and zero point its own."""
    generator = torch.Generator().manual_seed(N + K)
    q = torch.randint(0, 16, (N, K), dtype=torch.uint8, generator=generator)
    if sparse:
        q[(torch.rand(N, K // 4, 4, generator=generator).argsort(-1) < 2).view(N, K)] = 8
    groups = (N, K // group_size)
    scale = torch.rand(groups, generator=generator) * 0.02 + 0.01
    zero = torch.rand(groups, generator=generator) * 20 - 3 if zero_point else None
    return CanonicalInt4(pack_nibbles(q), scale.bfloat16(), zero, group_size)


def on_gpu(source: CanonicalInt4) -> CanonicalInt4:
    zero_point = None if source.zero_point is None else source.zero_point.cuda()
    return replace(
        source, qdata=source.qdata.cuda(), scale=source.scale.cuda(), zero_point=zero_point
    )


def check_packing(report: Report) -> None:
    """Bytes, unpacking, moving, and embeddings."""
    for shape in SHAPES:
        for tag, cls in TENSORS.items():
            for zero_point in (False, True):
                sparse = tag == "marlin24.v1"
                if sparse and zero_point:
                    continue
                source = weight(*shape, sparse, zero_point)
                cpu, gpu = cls.from_int4(source), cls.from_int4(on_gpu(source))
                what = f"{tag} {shape} zero_point={zero_point}"
                for name in cpu.__tensor_flatten__()[0]:
                    part = getattr(cpu, name)
                    report.expect(torch.equal(getattr(gpu, name).cpu(), part), f"{what}: {name}")
                    moved = getattr(cpu.cuda(), name).cpu()
                    report.expect(torch.equal(moved, part), f"{what}: {name} moved")
                back = gpu.unpack()
                report.expect(torch.equal(back.qdata.cpu(), source.qdata), f"{what}: unpacked")
                rows = torch.randint(0, shape[0], (3, 5))
                looked_up = F.embedding(rows.cuda(), gpu).cpu()
                report.expect(torch.equal(looked_up, F.embedding(rows, cpu)), f"{what}: embedding")


def make(layout: str, dtype: torch.dtype, activation: str, device: str) -> nn.Module:
    """A pruned model, quantised on ``device``."""
    torch.manual_seed(0)
    model = cuda_int4.prune_24_(models.TwoLinears(dtype).eval().requires_grad_(False)).to(device)
    config = Int4Config(group_size=32, layout=layout, activation=activation)
    return cuda_int4.quantize_(model, config)


def differs_by(y: Tensor, expected: Tensor) -> float:
    """Relative, Frobenius."""
    return float((y.double() - expected.double()).norm() / expected.double().norm())


def check_models(report: Report, folder: Path) -> None:
    """Eager on the GPU, and a file on the GPU, against the file on the CPU."""
    bounds = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
    rows = torch.export.Dim("rows", min=1, max=512)
    for layout in LAYOUTS:
        for dtype, bound in bounds.items():
            for activation in ("none", "int8"):
                # w4a8 rounds the activations between the linears: an ulp may move one int8 value
                limit = bound if activation == "none" else max(bound, 2e-2)
                model = make(layout, dtype, activation, "cuda")
                path = folder / "model.pte"
                x = torch.randn(3, 64).to(dtype)
                on_cpu = make(layout, dtype, activation, "cpu")
                cuda_int4.export(on_cpu, (x,), path, dynamic_shapes=({0: rows},), layout=layout)
                cpu = cuda_int4.load(path, device="cpu")
                gpu = cuda_int4.load(path, device="cuda")
                for M in (1, 3, 16, 17, 64, 300):
                    x = torch.randn(M, 64).to(dtype)
                    expected = cpu.forward(x)[0]
                    what = f"{layout} {dtype} {activation} M={M}"
                    for _ in range(3):  # eager, captured, replayed
                        difference = differs_by(gpu.forward(x)[0], expected)
                        report.expect(difference <= limit, f"{what}: file {difference:.2g}")
                    difference = differs_by(model(x.cuda()).cpu(), expected)
                    report.expect(difference <= limit, f"{what}: eager {difference:.2g}")


def check_metadata(report: Report, folder: Path) -> None:
    """Refused as on the CPU, and with nothing left on the device."""
    torch.manual_seed(0)
    model = cuda_int4.prune_24_(models.Linear(N=70)).eval().requires_grad_(False)
    cuda_int4.quantize_(model, Int4Config(group_size=32, layout="marlin24"))
    forge = forged.Forge(folder / "forge", model, (torch.randn(3, 64),))
    cuda_int4.load(forge.path, device="cuda")
    for value in (0, 3, 5, 15):
        for n, k in ((0, 0), (69, 60)):
            path = forged.with_metadata(forge, n, k, value)
            for verify in (True, False):
                try:
                    cuda_int4.load(path, device="cuda", verify=verify)
                    said = "nothing"
                except CudaInt4Error as error:
                    said = str(error)
                report.expect(f"row {n}, columns {k}..{k + 3};" in said, f"{value}: {said}")


def main() -> int:
    """Run all; the exit code says whether all held."""
    if not torch.cuda.is_available():
        print("check_cuda_layouts: expected a CUDA GPU, torch sees none; run it where there is one")
        return 2
    report = Report()
    with tempfile.TemporaryDirectory() as folder:
        check_packing(report)
        check_metadata(report, Path(folder))
        check_models(report, Path(folder))
    print(f"{report.n} checks, {report.wrong} wrong, on {torch.cuda.get_device_name()}")
    return int(report.wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
