"""Checks add_rms_norm, gate_mul and rope_append on a GPU: eager, and in .pte files.

    python tests/gpu/check_cuda_fused.py [--fused FILE.pte --plain FILE.pte [--tokens N]]

Needs the package, built with nvcc, and torch with CUDA. Every op is held against float64, and to
the bit against the ops that it stands for on the same GPU. With two exports of the byte Llama
(``fusions="all"`` and ``"none"``) both decode greedily and must choose the same bytes. Prints a
line for each check that failed and a summary; the exit status is 0 if all are right.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import cuda_int4
from cuda_int4 import _native
from cuda_int4 import ops as _ops  # noqa: F401

ops = torch.ops.cuda_int4
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
n_right = n_wrong = 0


def note(right: bool, what: str) -> None:
    """Count one check."""
    global n_right, n_wrong
    n_right += right
    n_wrong += not right
    if not right:
        print("WRONG", what, flush=True)


def near(
    found: Tensor, exact: Tensor, roundings: float, what: str, terms: Tensor | None = None
) -> None:
    """Within so many roundings of the largest value, or of the largest of ``terms``; no NaN."""
    step = max(torch.finfo(found.dtype).eps / 2, 2e-6)
    terms = exact if terms is None else terms
    scale = float(terms.abs().max()) if exact.numel() else 0.0
    error = float((found.double() - exact).abs().max()) if exact.numel() else 0.0
    note(error <= roundings * step * scale, f"{what}: error {error:.2e} of {scale:.2e}")


def same(found: Tensor, expected: Tensor, what: str) -> None:
    """Every bit, NaN aside."""
    differing = int((found != expected).sum())
    note(differing == 0, f"{what}: {differing} of {found.numel()} values differ")


def normal(*shape: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Random numbers whose memory begins ``offset`` elements behind an aligned address."""
    n = torch.Size(shape).numel()
    return torch.randn(n + offset, device="cuda").to(dtype)[offset:].view(shape)


def at_offset(x: Tensor, offset: int) -> Tensor:
    """A copy whose memory begins ``offset`` elements behind an aligned address, as normal()'s."""
    copy = torch.empty(x.numel() + offset, dtype=x.dtype, device=x.device)[offset:].view(x.shape)
    return copy.copy_(x)


def check_add_rms_norm() -> None:
    """Rows that a warp takes, that a block holds, that are longer than it holds, unaligned ones."""
    sizes = ((1, 4096), (1, 5376), (3, 8192), (7, 64), (5, 33), (130, 256), (2, 40000), (4, 1))
    for dtype, (rows, D), offset in itertools.product(DTYPES, sizes, (0, 1)):
        x, residual = (normal(rows, D, dtype=dtype, offset=offset) for _ in range(2))
        for weight in (None, normal(D), normal(D, dtype=dtype)):
            what = f"add_rms_norm {dtype} [{rows}, {D}] + {offset}, weight {weight is not None}"
            total, y = ops.add_rms_norm(x, residual, weight, None, 1e-5)
            same(total, x + residual, f"{what}: sum")
            # A norm's sums depend on what one load takes: the same where the addresses are alike.
            expected = ops.rms_norm(at_offset(total, offset), weight, 1e-5)
            same(y, expected, f"{what}: against rms_norm")
            w = None if weight is None else weight.double()
            near(y, F.rms_norm(total.double(), (D,), w, 1e-5), 2, f"{what}: against float64")
            x_norm = normal(D, dtype=dtype) if weight is None else weight.flip(0)
            what += ", x normed"
            total, y = ops.add_rms_norm(x, residual, weight, x_norm, 1e-5)
            normed = ops.rms_norm(x, x_norm, 1e-5)
            same(total, normed + residual, f"{what}: sum")
            expected = ops.rms_norm(at_offset(total, offset), weight, 1e-5)
            same(y, expected, f"{what}: against rms_norm")
            exact = F.rms_norm(x.double(), (D,), x_norm.double(), 1e-5)
            terms = exact.abs() + residual.double().abs()
            near(total, exact + residual.double(), 4, f"{what}: against float64", terms)
    x, weight = torch.empty(0, 16, device="cuda"), torch.ones(16, device="cuda")
    note(ops.add_rms_norm(x, x, None, weight, 1e-5)[1].shape == x.shape, "add_rms_norm, no rows")


def quantized(op: str, args: ctypes.Structure, y: Tensor) -> tuple[Tensor, Tensor]:
    """What the op writes beside ``y``, and what quantize_activation makes of ``y``."""
    library, stream = _native.library(), torch.cuda.current_stream().cuda_stream
    K = y.shape[-1]
    nbytes = library.quantized_activation_bytes(y.numel() // K, K)
    beside = torch.full((nbytes,), 0x55, dtype=torch.uint8, device="cuda")
    behind = torch.full_like(beside, 0x55)
    call = getattr(library, op)
    _native.check(call(args, _native.DEVICE_CUDA, stream, beside.data_ptr()))
    view = _native.tensor_view(y)
    _native.check(library.quantize_activation(view, stream, behind.data_ptr()))
    return beside, behind


def check_quantized() -> None:
    """A y as int8 is what quantize_activation makes of it, padding too; zeros, NaN, inf."""
    sizes = ((1, 4096), (2, 5376), (3, 64), (16, 8192), (9, 20480), (1, 32), (5, 96))
    for dtype, (M, K), offset in itertools.product(DTYPES, sizes, (0, 1)):
        what = f"{dtype} [{M}, {K}] + {offset}"
        x, residual = (normal(M, K, dtype=dtype, offset=offset) for _ in range(2))
        x[-1], residual[-1] = 0, 0
        if M > 2:
            x[0, 5], x[1, 7] = torch.nan, torch.inf
        weight, x_norm = normal(K, dtype=dtype), normal(K, dtype=dtype)
        total, y = torch.empty(2, M, K, dtype=dtype, device="cuda")
        views = [_native.tensor_view(t) for t in (x, weight, y)]
        found, expected = quantized("rms_norm", _native.RmsNormArgs(*views, 1e-5), y)
        same(found, expected, f"rms_norm as int8 {what}")
        for first in (None, x_norm):
            views = [_native.tensor_view(t) for t in (x, residual, weight, first, total, y)]
            args = _native.AddRmsNormArgs(*views, 1e-5)
            found, expected = quantized("add_rms_norm", args, y)
            same(found, expected, f"add_rms_norm as int8 {what}, x normed {first is not None}")
        gate_up = normal(M, 2 * K, dtype=dtype, offset=offset) * 4
        gate_up[-1] = 0
        for activation in (b"silu", b"gelu_tanh"):
            args = _native.GateMulArgs(*map(_native.tensor_view, (gate_up, y)), activation)
            found, expected = quantized("gate_mul", args, y)
            same(found, expected, f"gate_mul as int8 {activation!r} {what}")
    x = normal(2, 33)
    args = _native.RmsNormArgs(*map(_native.tensor_view, (x, None, x.clone())), 1e-5)
    code = _native.library().rms_norm(args, _native.DEVICE_CUDA, None, x.data_ptr())
    note(code != 0, "rms_norm wrote rows of 33 as int8")


def check_gate_mul() -> None:
    """Whole vectors and ragged rows, one row and many."""
    sizes = ((1, 14336), (1, 21504), (16, 28672), (3, 40), (5, 33), (1, 1), (700, 768))
    for dtype, (M, N), offset in itertools.product(DTYPES, sizes, (0, 1)):
        x = normal(M, 2 * N, dtype=dtype, offset=offset) * 4
        gate, up = x.split(N, dim=-1)
        for name, f in (
            ("silu", F.silu),
            ("gelu", F.gelu),
            ("gelu_tanh", lambda t: F.gelu(t, approximate="tanh")),
        ):
            what = f"gate_mul {name} {dtype} [{M}, {N}] + {offset}"
            y = ops.gate_mul(x, name)
            if name == "silu":
                same(y, ops.silu(gate.contiguous()) * up, f"{what}: against silu and mul")
            exact, terms = f(gate.double()) * up.double(), gate.double() * up.double()
            near(y, exact, 3, f"{what}: against float64", terms)  # 1 + tanh cancels


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """[B, H, S, D] turned by torch's ops, each of which rounds (or not, in float64)."""
    if cos.shape[1] != x.shape[3]:
        pair = torch.repeat_interleave if interleaved else lambda t, n, dim: t.repeat(1, n)
        cos, sin = pair(cos, 2, dim=1), pair(sin, 2, dim=1)
    if interleaved:
        other = torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        other = torch.cat((-b, a), dim=-1)
    return (x * cos + other * sin).to(x.dtype)


def check_rope_append() -> None:
    """Both orders of pairs, both widths and dtypes of tables, positions anywhere."""
    shapes = ((1, 1, 32, 8, 128), (1, 16, 32, 8, 128), (2, 5, 4, 2, 10), (1, 3, 8, 8, 64))
    flags = (False, True)
    for dtype, (B, S, Hq, Hkv, D), interleaved, whole, wide, as_int32 in itertools.product(
        DTYPES, shapes, flags, flags, flags, flags
    ):
        T = 40
        what = f"rope_append {dtype} {(B, S, Hq, Hkv, D)} {interleaved=} {whole=} {wide=}"
        qkv = normal(B, S, (Hq + 2 * Hkv) * D, dtype=dtype, offset=S % 2)
        cos, sin = normal(2, S, D if whole else D // 2).to(torch.float32 if wide else dtype)
        places = torch.randperm(T, device="cuda")[:S]
        given = torch.where(places % 3 == 0, places - T, places)
        caches = normal(2, B, Hkv, T, D, dtype=dtype)
        heads = qkv.view(B, S, -1, D).transpose(1, 2)
        q, k, v = heads.split([Hq, Hkv, Hkv], dim=1)
        expected = caches.clone()
        expected[0].index_copy_(2, places, turned(k, cos, sin, interleaved))
        expected[1].index_copy_(2, places, v)
        pos = given.int() if as_int32 else given
        found = ops.rope_append(*caches, qkv, cos, sin, pos, None, None, Hq, interleaved, 0.0)
        same(found, turned(q, cos, sin, interleaved), f"{what}: q")
        same(caches, expected, f"{what}: caches")
        exact = turned(q.double(), cos.double(), sin.double(), interleaved)
        near(found, exact, 4, f"{what}: q against float64")
    caches = torch.ones(2, 1, 2, 8, 64, device="cuda")
    tables = torch.zeros(2, 2, 32, device="cuda")
    operands = (normal(1, 2, 8 * 64), *tables, torch.tensor([3, 8], device="cuda"))
    ops.rope_append(*caches, *operands, None, None, 4, False, 0.0)
    untouched = torch.arange(8, device="cuda") != 3
    note(bool((caches[:, :, :, untouched] == 1).all()), "rope_append wrote at a position outside")
    note(not bool((caches[:, :, :, 3] == 1).any()), "rope_append left a position inside")


def check_rope_append_with_norms() -> None:
    """Norms of heads, of either or both, values that are keys; heads longer than a warp holds."""
    shapes = (
        (1, 1, 32, 4, 512), (1, 1, 32, 16, 256), (1, 16, 32, 8, 128), (2, 5, 4, 2, 10),
        (1, 3, 8, 8, 64), (1, 2, 2, 1, 1024),
    )  # fmt: skip
    flags = (False, True)
    for dtype, shape, interleaved, wide, shared, normed in itertools.product(
        DTYPES, shapes, flags, flags, flags, ((True, True), (True, False), (False, True))
    ):
        B, S, Hq, Hkv, D = shape
        T = 40
        what = f"rope_append {dtype} {shape} {interleaved=} {wide=} {shared=} {normed=}"
        qkv = normal(B, S, (Hq + (1 if shared else 2) * Hkv) * D, dtype=dtype) * 3
        cos, sin = normal(2, S, D, dtype=dtype)
        norms = [
            normal(D, dtype=torch.float32 if wide else dtype) if is_normed else None
            for is_normed in normed
        ]
        places = torch.randperm(T, device="cuda")[:S]
        caches = normal(2, B, Hkv, T, D, dtype=dtype)
        heads = qkv.view(B, S, -1, D).transpose(1, 2)
        q, k, v = heads[:, :Hq], heads[:, Hq : Hq + Hkv], heads[:, -Hkv:]

        def norm(x: Tensor, weight: Tensor | None) -> Tensor:
            return x if weight is None else ops.rms_norm(x.contiguous(), weight, 1e-3)

        expected = caches.clone()
        expected[0].index_copy_(2, places, turned(norm(k, norms[1]), cos, sin, interleaved))
        expected[1].index_copy_(2, places, v)
        found = ops.rope_append(*caches, qkv, cos, sin, places, *norms, Hq, interleaved, 1e-3)
        # Up to here a warp takes a row in rms_norm too, in the same order.
        vector = 16 // dtype.itemsize if D % (16 // dtype.itemsize) == 0 else 1
        if D // vector <= 64:
            same(found, turned(norm(q, norms[0]), cos, sin, interleaved), f"{what}: q")
            same(caches, expected, f"{what}: caches")
        same(caches[1], expected[1], f"{what}: values")
        w = None if norms[1] is None else norms[1].double()
        keys = k.double() if w is None else F.rms_norm(k.double(), (D,), w, 1e-3)
        exact = turned(keys, cos.double(), sin.double(), interleaved)
        near(caches[0][:, :, places], exact, 6, f"{what}: keys against float64")


def check_capture() -> None:
    """All three in one CUDA graph, replayed on other numbers."""
    x, residual, weight = normal(1, 256), normal(1, 256), normal(256)
    pos = torch.tensor([3], device="cuda")
    caches, tables = torch.zeros(2, 1, 1, 8, 64, device="cuda"), normal(2, 1, 32)
    norm = normal(64)

    def step() -> tuple[Tensor, ...]:
        total, y = ops.add_rms_norm(x, residual, weight, weight, 1e-5)
        operands = (y.view(1, 1, 256), *tables, pos, norm, norm)
        q = ops.rope_append(*caches, *operands, 2, False, 1e-5)
        return total, y, q, ops.gate_mul(y, "silu")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(normal(1, 256))
    pos.fill_(5)
    graph.replay()
    torch.cuda.synchronize()
    after = caches.clone()
    for found, expected in zip([t.clone() for t in captured], step(), strict=True):
        same(found, expected, "a replayed CUDA graph")
    same(after, caches, "caches after a replay")


def greedy(path: Path, n_tokens: int) -> tuple[list[int], Tensor]:
    """Bytes chosen by the largest logit, and all logits."""
    model = cuda_int4.load(path, device="cuda")
    tokens, position = torch.tensor([[0, *b"def main(args):\n"]]), 0
    chosen, rows = [], []
    while len(chosen) < n_tokens:
        input_pos = torch.arange(position, position + tokens.shape[1])
        logits = model.forward(tokens, input_pos)[0][0, -1].float().cpu()
        position += tokens.shape[1]
        chosen.append(int(logits.argmax()))
        rows.append(logits)
        tokens = torch.tensor([chosen[-1:]])
    return chosen, torch.stack(rows)


def check_programs(fused: Path, plain: Path, n_tokens: int) -> None:
    """Two exports of one model choose the same bytes; a first difference is shown."""
    (tokens, logits), (expected, exact) = greedy(fused, n_tokens), greedy(plain, n_tokens)
    first = next((i for i, (a, b) in enumerate(zip(tokens, expected)) if a != b), None)  # noqa: B905
    same_bits = sum(bool(torch.equal(a, b)) for a, b in zip(logits, exact, strict=True))
    print(f"fused and plain: {same_bits} of {n_tokens} rows of logits are the same to the bit")
    if first is not None:
        top = exact[first].topk(2).values
        margin = float(top[0] - top[1])
        difference = float((logits[first] - exact[first]).abs().max())
        print(f"  first other byte at {first}: plain's top two lie {margin:.3e} apart, the logits")
        print(f"  differ by up to {difference:.3e}")
    note(first is None, "fused and plain choose other bytes")


def main() -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fused", type=Path)
    parser.add_argument("--plain", type=Path)
    parser.add_argument("--tokens", type=int, default=2000)
    options = parser.parse_args()
    assert _native.library(), "the package is built"
    torch.manual_seed(0)
    for check in (
        check_add_rms_norm, check_gate_mul, check_quantized, check_rope_append,
        check_rope_append_with_norms, check_capture,
    ):  # fmt: skip
        before = n_right
        check()
        print(f"{check.__name__}: {n_right - before} right", flush=True)
    if options.fused is not None and options.plain is not None:
        check_programs(options.fused, options.plain, options.tokens)
    print(f"{n_right} right, {n_wrong} wrong")
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
