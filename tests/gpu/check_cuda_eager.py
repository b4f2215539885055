"""Checks torch.ops.cuda_int4 on CUDA tensors: numbers, streams, graphs, torch.compile, modules.

    python tests/gpu/check_cuda_eager.py [--only CHECK ...]

Needs the package, built with nvcc, and torch with CUDA. Prints a line for each check that fails and
a summary; the exit status is 0 if all are right. Inputs are signed and fresh for each case, every
scale and zero point differs, and what is compared against is computed in float64. A capture in a
CUDA graph fails if an op waits for the device, so those checks also show that none does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cuda_int4
from cuda_int4 import ops as _ops  # noqa: F401  registers torch.ops.cuda_int4
from cuda_int4.tensors import CudaCoalescedInt4Tensor

linear = torch.ops.cuda_int4.linear
attention = torch.ops.cuda_int4.attention
rms_norm = torch.ops.cuda_int4.rms_norm
silu = torch.ops.cuda_int4.silu
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Checker:
    """Counts what was right and prints what was not."""

    def __init__(self) -> None:
        self.n_right = self.n_wrong = 0

    def note(self, right: bool, what: str) -> None:
        """Count one check."""
        self.n_right += right
        self.n_wrong += not right
        if not right:
            print("WRONG", what, flush=True)

    def near(self, found: Tensor, exact: Tensor, what: str, roundings: float = 1.2) -> None:
        """Relative error at most ``roundings`` times that of rounding ``exact`` once, or 1e-5."""
        exact = exact.double().cpu()
        rounded = exact.to(found.dtype).double()
        bound = max(1e-5, roundings * error_of(rounded, exact))
        error = error_of(found, exact)
        self.note(error <= bound, f"{what}: error {error:.2e}, bound {bound:.2e}")

    def raises(self, call: Callable[[], object], words: tuple[str, ...], what: str) -> None:
        """The call fails with a message that has all the words."""
        try:
            call()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            missing = [word for word in words if word not in str(error)]
            self.note(not missing, f"{what}: expected {missing} in: {error}")
        else:
            self.note(False, f"{what}: expected an error, got none")


def error_of(found: Tensor, exact: Tensor) -> float:
    """Relative, Frobenius; ``exact`` is float64 on the CPU."""
    return float((found.double().cpu() - exact).norm() / exact.norm())


def make_weight(
    N: int, K: int, group_size: int, zero_points: bool, activation: str = "none"
) -> CudaCoalescedInt4Tensor:
    """A weight on the CPU; every scale and zero point differs."""
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8)
    shape = (N, K // group_size)
    scale = torch.rand(shape) * 0.03 + 0.002
    zero_point = torch.rand(shape) * 14 + 0.5 if zero_points else None
    return CudaCoalescedInt4Tensor(
        codes[:, ::2] | (codes[:, 1::2] << 4),
        scale,
        group_size,
        "coalesced.v1",
        activation,
        (N, K),
        torch.float32,
        zero_point,
    )


def int8_rounded(x: Tensor) -> Tensor:
    """X as w4a8 sees it: per 32 values, max|x| / 127 times an int8; float64 on the CPU."""
    groups = x.float().cpu().unflatten(-1, (-1, 32))
    step = groups.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, (groups / step).round().clamp(-127, 127), 0)
    return (codes.double() * step.double()).flatten(-2)


def call_linear(x: Tensor, weight: CudaCoalescedInt4Tensor, bias: Tensor | None = None) -> Tensor:
    """The op on the parts of a weight."""
    return linear(
        x,
        weight.qdata,
        weight.scale,
        weight.zero_point,
        None,
        bias,
        weight.group_size,
        weight.layout_tag,
        weight.activation,
    )


def exact_linear(x: Tensor, weight: CudaCoalescedInt4Tensor) -> Tensor:
    """In float64, with the activations that the kernel's arithmetic has."""
    rows = x.double().cpu() if weight.activation == "none" else int8_rounded(x)
    return rows @ weight.cpu().dequantize(torch.float64).T


def check_numbers(checker: Checker) -> None:
    """Every op against float64; no operand contiguous where the op takes that."""
    for dtype in DTYPES:
        for activation in ("none", "int8"):
            for N, K, group_size, zero_points in (
                (17, 96, 32, True),
                (1030, 1088, 64, False),
                (512, 4096, 128, True),
                (640, 512, 512, False),
            ):
                weight = make_weight(N, K, group_size, zero_points, activation)
                for rows in ((1,), (3,), (2, 4), (16,), (33,), (200,)):
                    x = torch.randn(*rows, K).to(dtype).cuda()
                    bias = torch.randn(N).to(dtype).cuda()
                    what = f"linear {activation} {dtype} {rows} {N}x{K} g{group_size}"
                    exact = exact_linear(x, weight)
                    roundings = 1.2
                    if activation == "none":  # twice the error of a plain matmul
                        dense = weight.dequantize().to(dtype).cuda()
                        roundings = 2 * error_of(F.linear(x, dense), exact)
                        roundings /= max(error_of(exact.to(dtype), exact), 1e-12)
                    checker.near(call_linear(x, weight.cuda()), exact, what, roundings)
                    with_bias = call_linear(x, weight.cuda(), bias)
                    exact = exact + bias.double().cpu()
                    checker.near(with_bias, exact, f"{what} + bias", roundings)
        for S, T in ((1, 1), (1, 333), (7, 7), (65, 130)):
            q, k, v = (torch.randn(2, h, n, 64).to(dtype) for h, n in ((8, S), (2, T), (2, T)))
            mask = torch.rand(S, T) > 0.3
            mask[:, 0] = True
            exact = F.scaled_dot_product_attention(
                *(t.double() for t in (q, k, v)), attn_mask=mask, enable_gqa=True, scale=0.2
            )
            on_gpu = [t.cuda() for t in (q, k, v, mask)]
            # The loops of a flash kernel round the weights to the dtype of v.
            checker.near(
                attention(*on_gpu, 0.2, False), exact, f"attention {dtype} {S} of {T}", 2.5
            )
            moved = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in on_gpu[:3]]
            checker.note(
                torch.equal(attention(*moved, on_gpu[3], 0.2, False),
                            attention(*on_gpu, 0.2, False)),
                f"attention {dtype} {S} of {T}: strides of q, k, v change the result",
            )  # fmt: skip
        x = torch.randn(5, 3, 4096, dtype=dtype) * 3
        weight_1d = torch.randn(4096, dtype=dtype)
        exact = F.rms_norm(x.double(), (4096,), weight_1d.double(), 1e-5)
        checker.near(rms_norm(x.cuda(), weight_1d.cuda(), 1e-5), exact, f"rms_norm {dtype}")
        strided = x.cuda().repeat_interleave(2, -1)[..., ::2]
        checker.near(rms_norm(strided, weight_1d.cuda(), 1e-5), exact, f"rms_norm {dtype} strided")
        checker.near(silu(x.cuda()), F.silu(x.double()), f"silu {dtype}")
        out = torch.full((5, 3, 4096), float("nan"), dtype=dtype, device="cuda")
        silu.out(x.cuda(), out=out)
        checker.near(out, F.silu(x.double()), f"silu.out {dtype}")


def block(weight: CudaCoalescedInt4Tensor) -> Callable[[Tensor], Tensor]:
    """A function of x that uses all four ops."""
    N = weight.shape[0]
    norm = torch.rand(weight.shape[1]).add_(0.5).half().cuda()

    def run(x: Tensor) -> Tensor:
        h = silu(call_linear(rms_norm(x, norm, 1e-5), weight))
        heads = h.view(1, x.shape[0], N // 64, 64).transpose(1, 2)
        return attention(heads, heads, heads, None, 0.125, True)

    return run


def check_graphs(checker: Checker) -> None:
    """Captured once, replayed on other inputs: what eager gives, bit by bit."""
    for activation in ("none", "int8"):
        for rows in (1, 4, 40):
            weight = make_weight(1024, 2048, 32, True, activation).cuda()
            run = block(weight)
            x = torch.randn(rows, 2048, dtype=torch.float16, device="cuda")
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run(x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = run(x)
            for seed in range(3):
                torch.manual_seed(seed)
                x.copy_(torch.randn(rows, 2048))
                y.fill_(float("nan"))
                graph.replay()
                what = f"graph {activation} M={rows}, input {seed}"
                checker.note(torch.equal(y, run(x)), f"{what}: replay is not what eager gives")
                checker.note(bool(y.isfinite().all()), f"{what}: not finite")


def check_streams(checker: Checker) -> None:
    """Ops wait for what is before them on their stream, and for nothing else.

    Each stream first sleeps, then fills x: an op on another stream would read zeros.
    """
    weight = make_weight(768, 1024, 64, False).cuda()
    rows = torch.randn(2, 1024, dtype=torch.float16, device="cuda")
    want = call_linear(rows, weight)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for index, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            x = torch.zeros_like(rows)
            torch.cuda._sleep(1_000_000_000)  # clocks
            x.copy_(rows * (index + 1))
            results.append(call_linear(x, weight))
    asleep = [not stream.query() for stream in streams]
    checker.note(all(asleep), f"four streams: an op waited while it was queued: {asleep}")
    torch.cuda.synchronize()
    for index, y in enumerate(results):
        checker.near(y, want.double() * (index + 1), f"stream {index}", 2.5)


def weight_on_gpu(N: int, K: int, activation: str) -> CudaCoalescedInt4Tensor:
    """Symmetric, groups of 128, fp16 scales that silu can make."""
    qdata = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device="cuda")
    scale = silu(silu_input(torch.rand(N, K // 128, device="cuda") * 0.03 + 0.002).half())
    return CudaCoalescedInt4Tensor(
        qdata, scale, 128, "coalesced.v1", activation, (N, K), torch.float16, None
    )


def silu_input(y: Tensor) -> Tensor:
    """A solution x of silu(x) = y, for small y above 0."""
    x = y
    for _ in range(60):
        x = y * (1 + (-x).exp())
    return x


def rewriting_calls(
    weights: list[CudaCoalescedInt4Tensor], rows: Tensor, turns: int
) -> Callable[[], Tensor]:
    """What counts the wrong results of ``turns`` linears, all operands made by the kernels ahead.

    Between those and the linear is nothing, or a decode step's attention, which lets the kernel
    behind it start before it waits itself.
    """
    made_of = [silu_input(weight.scale.float()).half() for weight in weights]
    sources = [
        CudaCoalescedInt4Tensor(
            w.qdata, silu(b), w.group_size, w.layout_tag, w.activation, w.shape, w.dtype, None
        )
        for w, b in zip(weights, made_of, strict=True)
    ]
    expected = [call_linear(rows, weight) for weight in sources]
    first = sources[0]
    now = CudaCoalescedInt4Tensor(
        first.qdata.clone(), first.scale.clone(), first.group_size, first.layout_tag,
        first.activation, first.shape, first.dtype, None,
    )  # fmt: skip
    x = torch.empty_like(rows)
    q = torch.randn(1, 8, 1, 64, dtype=torch.float16, device="cuda")
    kv = torch.randn(1, 2, 3000, 64, dtype=torch.float16, device="cuda")
    torch.cuda.synchronize()

    def run() -> Tensor:
        n_wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for turn in range(turns):
            i = turn % len(sources)
            silu.out(made_of[i], out=now.scale)
            torch.mul(rows, 1, out=x)
            torch.bitwise_xor(sources[i].qdata, 0, out=now.qdata)
            if turn % 3 == 1:
                attention(q, kv, kv, None, 0.125, False)
            elif turn % 3 == 2:
                now.scale.zero_()
                silu.out(made_of[i], out=now.scale)
            n_wrong += (call_linear(x, now) != expected[i]).any()
        return n_wrong

    return run


def check_rewritten(checker: Checker) -> None:
    """Weights and x that the kernels just ahead have written: launches that overlap see them."""
    for activation in ("none", "int8"):
        for N, K, M, turns in (
            (512, 1024, 1, 600), (4096, 4096, 1, 600), (4096, 4096, 5, 300), (1024, 2048, 16, 300),
            (2048, 2048, 70, 200), (8192, 8192, 1, 200),
        ):  # fmt: skip
            weights = [weight_on_gpu(N, K, activation) for _ in range(4)]
            rows = torch.randn(M, K, dtype=torch.float16, device="cuda")
            run = rewriting_calls(weights, rows, turns)
            what = f"rewritten {activation} M={M} {N}x{K}"
            n_wrong = int(run())
            checker.note(n_wrong == 0, f"{what}: {n_wrong} of {turns} calls wrong")
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                counted = run()
            n_wrong = 0
            for _ in range(5):
                graph.replay()
                n_wrong += int(counted)
            checker.note(n_wrong == 0, f"{what}: {n_wrong} of {5 * turns} calls in a graph wrong")


def launch_with(x: Tensor, weight: CudaCoalescedInt4Tensor, y: Tensor, fill: Tensor) -> None:
    """Queue a linear through the C interface, its scratch with the bytes of ``fill``."""
    library = cuda_int4._native.library()
    parts = (x, weight.qdata, weight.scale, weight.zero_point, None, None, y)
    args = cuda_int4._native.LinearArgs(
        *map(cuda_int4._native.tensor_view, parts), weight.group_size,
        weight.layout_tag.encode(), weight.activation.encode(), b"w",
    )  # fmt: skip
    size = cuda_int4._native.c_uint64()
    cuda_int4._native.check(library.linear_scratch_bytes(args, 1, size))
    scratch = fill[: size.value].clone()
    stream = torch.cuda.current_stream().cuda_stream
    cuda_int4._native.check(
        library.linear(args, 1, stream, scratch.data_ptr() or None, size.value, None)
    )


def ends_within(seconds: float) -> bool:
    """Whether what is queued ends; kernels that wait for one another in vain do not."""
    ended = torch.cuda.current_stream().record_event()
    deadline = time.perf_counter() + seconds
    while not ended.query():
        if time.perf_counter() > deadline:
            return False
        time.sleep(0.001)
    return True


def check_many_rows_at_once(checker: Checker) -> None:
    """Products of many rows on four streams at once, on a GPU that is busy, in any scratch.

    Blocks of such a product wait for one another (stream-K), through flags in scratch that nobody
    clears. Replayed from a graph, the launches do not wait for the host.
    """
    streams = [torch.cuda.Stream() for _ in range(5)]
    shape = (80 << 20,)
    fills = [
        torch.full(shape, 0xFF, dtype=torch.uint8, device="cuda"),
        torch.zeros(shape, dtype=torch.uint8, device="cuda"),
        torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda"),
    ]
    busy = torch.randn(4096, 4096, dtype=torch.float16, device="cuda")
    for activation in ("none", "int8"):
        cases = []
        for M, N, K in ((300, 4096, 4096), (33, 4096, 14336), (700, 1536, 2048), (64, 9000, 4096)):
            weight = weight_on_gpu(N, K, activation)
            x = torch.randn(M, K, dtype=torch.float16, device="cuda")
            y = torch.empty(M, N, dtype=torch.float16, device="cuda")
            launch_with(x, weight, y, fills[1])
            cases.append((x, weight, y))
        n_wrong = torch.zeros(4, 4, dtype=torch.int64, device="cuda")  # stream, case
        torch.cuda.synchronize()

        def run(cases: list = cases, n_wrong: Tensor = n_wrong) -> None:
            first = torch.cuda.current_stream()
            for stream in streams:
                stream.wait_stream(first)
            for turn in range(60):
                with torch.cuda.stream(streams[4]):
                    busy @ busy
                for i, stream in enumerate(streams[:4]):
                    case = (i + turn // 7) % 4
                    x, weight, expected = cases[case]
                    with torch.cuda.stream(stream):
                        y = torch.full_like(expected, float("nan"))
                        launch_with(x, weight, y, fills[turn % 3])
                        n_wrong[i, case] += (y != expected).any()
            for stream in streams:
                first.wait_stream(stream)

        run()
        ended = ends_within(20)
        if ended:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            for _ in range(20):
                graph.replay()
            ended = ends_within(20)
        if not ended:
            print("WRONG many rows at once: a kernel hangs", flush=True)
            os._exit(1)  # whatever waits for the GPU would hang, too
        for case, (x, weight, _) in enumerate(cases):
            wrong = int(n_wrong[:, case].sum())
            what = f"many rows at once, {activation} M={x.shape[0]} {tuple(weight.shape)}"
            checker.note(wrong == 0, f"{what}: {wrong} calls wrong")


def check_compile(checker: Checker) -> None:
    """torch.compile takes the ops whole, in one graph, dynamic shapes included."""
    weight = make_weight(512, 1024, 32, True).cuda()
    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()

        def function(x: Tensor) -> Tensor:
            return F.gelu(silu(call_linear(x * 2, weight))) + 1

        compiled = torch.compile(function, fullgraph=True, mode=mode)
        for rows in (1, 1, 1, 5, 9):
            x = torch.randn(rows, 1024, dtype=torch.float16, device="cuda")
            exact = F.gelu(F.silu(exact_linear(x * 2, weight))) + 1
            checker.near(compiled(x).clone(), exact, f"compile {mode} M={rows}", 3.0)


class Mlp(nn.Module):
    """A gated feed-forward layer with a norm and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(512)
        self.gate = nn.Linear(512, 1536, bias=False)
        self.up = nn.Linear(512, 1536)
        self.down = nn.Linear(1536, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., 512] to the same shape."""
        h = self.norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def check_modules(checker: Checker) -> None:
    """A quantised module moves to the GPU and back, keeps every bit, and computes the same."""
    for activation in ("none", "int8"):
        torch.manual_seed(0)
        model = Mlp().eval()
        cuda_int4.quantize_(model, cuda_int4.Int4Config(group_size=64, activation=activation))
        before = {name: p.qdata.clone() for name, p in model.named_parameters() if p.dim() == 2}
        x = torch.randn(6, 512)
        with torch.no_grad():
            want = model(x)
            for move in (lambda m: m.to("cuda"), lambda m: m.cpu().cuda()):
                model = move(model)
                parts = [p for p in model.parameters() if isinstance(p, CudaCoalescedInt4Tensor)]
                checker.note(
                    len(parts) == 3
                    and all(p.device.type == p.qdata.device.type == "cuda" for p in parts),
                    f"module {activation}: weights are not on the GPU",
                )
                # Two devices round intermediates of an int8 linear to other codes now and then.
                tolerance = 1e-5 if activation == "none" else 5e-3
                error = float((model(x.cuda()).cpu() - want).norm() / want.norm())
                checker.note(error <= tolerance, f"module {activation}: error {error:.2e}")
            for dtype in (torch.float16, torch.bfloat16):
                half = model.to(dtype)
                error = float((half(x.cuda().to(dtype)).cpu().float() - want).norm() / want.norm())
                checker.note(error < 0.02, f"module {activation} {dtype}: error {error:.2e}")
                compiled = torch.compile(half, fullgraph=True)
                error = float((compiled(x.cuda().to(dtype)).cpu() - want).norm() / want.norm())
                checker.note(error < 0.02, f"module {activation} {dtype}, compiled: {error:.2e}")
            same = all(
                torch.equal(p.qdata.cpu(), before[name])
                for name, p in model.named_parameters()
                if name in before
            )
            checker.note(same, f"module {activation}: moving changed codes")


def check_empty(checker: Checker) -> None:
    """Tensors without rows launch nothing and give results without rows."""
    for activation in ("none", "int8"):
        weight = make_weight(64, 128, 32, True, activation).cuda()
        for rows in ((0,), (2, 0), (0, 40)):
            y = call_linear(torch.empty(*rows, 128, dtype=torch.float16, device="cuda"), weight)
            checker.note(y.shape == (*rows, 64), f"linear {activation} {rows}: {y.shape}")
    for B, S, T in ((1, 0, 5), (0, 3, 5), (0, 40, 40)):
        q = torch.empty(B, 8, S, 64, dtype=torch.float16, device="cuda")
        kv = torch.zeros(B, 2, T, 64, dtype=torch.float16, device="cuda")
        y = attention(q, kv, kv, None, 0.125, False)
        checker.note(y.shape == q.shape, f"attention {B}, {S} of {T}: {y.shape}")
    x = torch.empty(0, 64, dtype=torch.float16, device="cuda")
    checker.note(rms_norm(x, None, 1e-5).shape == x.shape, "rms_norm without rows")
    checker.note(silu(x).shape == x.shape, "silu without rows")
    torch.cuda.synchronize()


def check_errors(checker: Checker) -> None:
    """Bad calls raise, with the reason."""
    weight = make_weight(64, 128, 32, True)
    on_gpu = weight.cuda()
    x = torch.randn(2, 128, dtype=torch.float16)
    checker.raises(
        lambda: call_linear(x.cuda(), weight), ("qdata", "cuda", "cpu", "move"), "CPU weight"
    )
    checker.raises(lambda: call_linear(x, on_gpu), ("qdata", "cpu", "cuda"), "CPU x")
    checker.raises(
        lambda: call_linear(x.cuda()[:, :96], on_gpu), ("x [..., K=128]", "96"), "x of another K"
    )
    checker.raises(lambda: call_linear(x.cuda().long(), on_gpu), ("x", "int64"), "x of int64")
    checker.raises(
        lambda: linear(
            x.cuda(), on_gpu.qdata, on_gpu.scale, None, None, None, 32, "coalesced.v9", "none"
        ),
        ("coalesced.v9", "update"),
        "unknown layout",
    )
    library = cuda_int4._native.library()
    views = [
        cuda_int4._native.tensor_view(t)
        for t in (x.cuda(), on_gpu.qdata, on_gpu.scale, on_gpu.zero_point, None, None)
    ]
    y = torch.empty(2, 64, dtype=torch.float16, device="cuda")
    args = cuda_int4._native.LinearArgs(
        *views, cuda_int4._native.tensor_view(y), 32, b"coalesced.v1", b"none", b"w"
    )
    checker.note(
        library.linear(args, 7, None, None, 0, None) != 0 and "7" in cuda_int4._native.last_error(),
        "device 7 is not refused",
    )
    torch.cuda.synchronize()
    checker.near(call_linear(x.cuda(), on_gpu), exact_linear(x, weight), "after the errors", 1.5)


def print_overhead() -> None:
    """Microseconds that a call takes on the host, which waits for nothing."""
    weight = make_weight(256, 256, 32, True).cuda()
    x = torch.randn(1, 256, dtype=torch.float16, device="cuda")
    calls: dict[str, Callable[[], Tensor]] = {
        "cuda_int4.linear": lambda: call_linear(x, weight),
        "cuda_int4.silu": lambda: silu(x),
        "aten.silu": lambda: F.silu(x),
    }
    for name, call in calls.items():
        best = float("inf")
        for _ in range(5):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(500):
                call()
            best = min(best, (time.perf_counter() - start) / 500)
        print(f"{name}: {best * 1e6:.1f} us a call on the host")


def main() -> int:
    """Run all checks; 1 if one failed."""
    if not torch.cuda.is_available() or not cuda_int4._native.library().cuda_available():
        print("expected a GPU, and libcuda_int4 built with nvcc; found "
              f"torch.cuda {torch.cuda.is_available()}, "
              f"cuda_int4 {cuda_int4._native.library().cuda_available()}")  # fmt: skip
        return 2
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="CHECK", help='such as "numbers", "compile"')
    only = parser.parse_args().only
    checker = Checker()
    for check in (
        check_numbers,
        check_graphs,
        check_streams,
        check_rewritten,
        check_many_rows_at_once,
        check_compile,
        check_modules,
        check_empty,
        check_errors,
    ):
        if only and check.__name__.removeprefix("check_") not in only:
            continue
        torch.manual_seed(1)
        right, wrong, start = checker.n_right, checker.n_wrong, time.perf_counter()
        check(checker)
        print(
            f"{check.__name__}: {checker.n_right - right} right, {checker.n_wrong - wrong} wrong "
            f"({time.perf_counter() - start:.1f} s)",
            flush=True,
        )
    print_overhead()
    print(f"{checker.n_right} right, {checker.n_wrong} wrong")
    return 1 if checker.n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
