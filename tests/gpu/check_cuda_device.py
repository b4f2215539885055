"""Checks whole .pte files on a GPU against the CPU: memory, graphs, streams, threads, errors.

    python tests/gpu/check_cuda_device.py [--folder DIR] [--big-gb N] [--only PART ...]
    python tests/gpu/check_cuda_device.py --folder DIR --export      # on any machine, beforehand
    python tests/gpu/check_cuda_device.py --folder DIR --export --only big

Needs the package, built with nvcc, and torch with CUDA. Exports its files into a folder (a
temporary one if none is given; what is there already is used), runs each on the CPU and on the GPU,
prints a line per part and one for each check that failed, and a summary; the exit status is 0 if
all are right.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cuda_int4
from cuda_int4 import _native
from cuda_int4.tensors import CudaCoalescedInt4Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "export_examples" / "byte_llama")]

import delegate_models as models  # noqa: E402
import export as byte_llama  # noqa: E402
import forged  # noqa: E402

PROMPT = list(b"class Stack:\n    def __init__(self, items=()):\n        self.items = list(")
HALF_PRECISION = (
    (torch.bfloat16, "none"), (torch.float16, "none"), (torch.bfloat16, "int8"),
)  # fmt: skip
LEAST_SHARE = 0.6  # of the host-to-device rate, for the upload of constants


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

    def same(self, found: list[Tensor], expected: list[Tensor], what: str) -> None:
        """Every bit is the same."""
        equal = len(found) == len(expected) and all(map(torch.equal, found, expected))
        self.note(equal, f"{what}: other bits")

    def near(self, found: list[Tensor], expected: list[Tensor], what: str) -> None:
        """Shapes and dtypes are the same, values but for the order of summation."""
        self.note(len(found) == len(expected), f"{what}: {len(found)} outputs")
        for i, (y, z) in enumerate(zip(found, expected, strict=False)):
            if y.shape != z.shape or y.dtype != z.dtype:
                self.note(False, f"{what}: output {i}: {y.dtype} {tuple(y.shape)}")
                continue
            scale = float(z.double().abs().max()) if z.numel() else 0.0
            error = float((y.double() - z.double()).abs().max()) if z.numel() else 0.0
            step = torch.finfo(z.dtype).eps if z.is_floating_point() else 0.0
            bound = max(2e-5, 4 * step) * scale if step else 0.0
            self.note(error <= bound, f"{what}: output {i}: error {error:.2e} of {scale:.2e}")

    def raises(self, call: Callable[[], object], words: tuple[str, ...], what: str) -> None:
        """The call fails with a message that has all the words."""
        try:
            call()
        except (ValueError, RuntimeError) as error:
            missing = [word for word in words if word not in str(error)]
            self.note(not missing, f"{what}: expected {missing} in: {error}")
        else:
            self.note(False, f"{what}: not refused")


def linear_file(folder: Path) -> Path:
    path, model = folder / "linear.pte", models.Linear()
    if not path.exists():
        models.write(models.make(model), path, (models.rows(3),), ({0: models.dim()},))
    return path


def many_outputs_file(folder: Path) -> Path:
    path, model = folder / "many.pte", models.ManyOutputs()
    if not path.exists():
        models.write(models.make(model), path, (models.rows(3),), ({0: models.dim()},))
    return path


def takes_int_file(folder: Path) -> Path:
    path, model = folder / "int.pte", models.TakesInt()
    if not path.exists():
        shapes = ({0: models.dim("A")}, {0: models.dim("B")})
        models.write(models.make(model), path, (models.rows(8), models.rows(3)), shapes)
    return path


def cache_file(folder: Path) -> Path:
    path, model = folder / "cache.pte", models.Cache()
    if not path.exists():
        shapes = ({0: models.dim()}, {0: models.dim()})
        models.write(models.make(model), path, (models.rows(3), torch.arange(3)), shapes)
    return path


class WritesBetween(models.Cache):
    """Two w4a8 linears share a buffer; it is written in place; a third one reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(models.K, 32)
        self.after = nn.Linear(models.K, 32)

    def forward(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        first, before = self.proj(self.seen), self.before(self.seen)
        self.seen.index_copy_(0, pos, x)
        return first, before, self.after(self.seen)


def writes_between_file(folder: Path) -> Path:
    path, model = folder / "between.pte", WritesBetween()
    if not path.exists():
        shapes = ({0: models.dim()}, {0: models.dim()})
        inputs = (models.rows(3), torch.arange(3))
        models.write(models.make(model), path, inputs, shapes, activation="int8")
    return path


def byte_llama_file(folder: Path, dtype: torch.dtype, activation: str = "none") -> Path:
    path = folder / f"byte_{str(dtype).removeprefix('torch.')}_{activation}.pte"
    if not path.exists():
        byte_llama.build(
            path, dtype=dtype, method="min_max", max_context=1024, activation=activation
        )
    return path


def export_files(folder: Path) -> None:
    """All but those that take no time, and the one of gigabytes."""
    for export in (
        linear_file, many_outputs_file, takes_int_file, cache_file, writes_between_file,
    ):  # fmt: skip
        export(folder)
    for dtype, activation in ((torch.float32, "none"), *HALF_PRECISION):
        byte_llama_file(folder, dtype, activation)


def gpu(path: Path, **options: Any) -> cuda_int4.model.Model:
    return cuda_int4.load(path, device="cuda", **options)


def runs(model: cuda_int4.model.Model) -> tuple[int, int, int]:
    use = model.device_use()
    return use.eager_runs, use.captures, use.replays


def check_devices(check: Checker, folder: Path) -> None:
    """Which device is chosen, and which are refused."""
    path = linear_file(folder)
    check.note(gpu(path).device_use().device == "cuda:0", "cuda is not cuda:0")
    check.note(cuda_int4.load(path).device_use().device == "cuda:0", "auto is not the GPU")
    check.note(cuda_int4.load(path, device="cpu").device_use().device == "cpu", "cpu is not")
    n = torch.cuda.device_count()
    check.raises(lambda: cuda_int4.load(path, device=f"cuda:{n}"), (f"below {n}",), "no such GPU")
    code = (
        "import sys, cuda_int4, torch\n"
        "m = cuda_int4.load(sys.argv[1]); m.forward(torch.randn(3, 64))\n"
        "m = cuda_int4.load(sys.argv[1])\n"
        "print(m.device_use().device)\n"
        "cuda_int4.load(sys.argv[1], device='cuda')\n"
    )
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=hidden, capture_output=True, text=True
    )
    check.note(ran.stdout.split() == ["cpu"], f"without a GPU: {ran.stdout}{ran.stderr}")
    check.note(ran.stderr.count("device auto: the CPU, because") == 1, f"said once: {ran.stderr}")
    check.note("none answers here" in ran.stderr, f"cuda without a GPU: {ran.stderr}")


def check_shapes(check: Checker, folder: Path) -> None:
    """Lengths up and down, eagerly and in graphs; what graphs were made."""
    path = linear_file(folder)
    cpu, eager, graph = cuda_int4.load(path, device="cpu"), gpu(path, cuda_graph=False), gpu(path)
    for n in (3, 16, 1, 7, 16, 3, 1, 1, 16, 3, 7, 7):
        x = models.rows(n, seed=n)
        found = graph.forward(x)
        check.near(found, cpu.forward(x), f"{n} rows")
        check.same(found, eager.forward(x), f"{n} rows in a graph")
    check.note(runs(eager) == (12, 0, 0), f"without graphs: {runs(eager)}")
    check.note(runs(graph) == (4, 4, 8), f"4 shapes: {runs(graph)}")
    for n in range(1, 17):  # more shapes than are kept: the oldest are dropped, and made again
        graph.forward(models.rows(n))
    before = runs(graph)
    graph.forward(models.rows(1))
    check.note(runs(graph)[0] == before[0] + 1, f"a dropped shape: {before} {runs(graph)}")
    check.near(graph.forward(models.rows(16)), cpu.forward(models.rows(16)), "after many shapes")
    check.raises(lambda: graph.forward(models.rows(17)), ("at most [16, 64]",), "too many rows")
    check.raises(lambda: graph.forward(models.rows(2).half()), ("float32",), "another dtype")
    check.near(graph.forward(models.rows(5)), cpu.forward(models.rows(5)), "after an error")
    use = graph.device_use()
    n_constants = 48 * 32 + 48 * 2 * 4 * 2 + 48 * 4
    check.note(use.uploaded_bytes == n_constants, f"uploaded {use.uploaded_bytes} bytes")
    check.note(use.peak_device_bytes >= use.device_bytes > n_constants, f"device bytes: {use}")


def check_outputs(check: Checker, folder: Path) -> None:
    """Inputs handed through, views, constants, ints, caches as outputs; ints as inputs."""
    path = many_outputs_file(folder)
    cpu, model = cuda_int4.load(path, device="cpu"), gpu(path)
    for n in (3, 5, 3, 5, 3, 16, 1):
        x = models.rows(n, seed=n)
        check.near(model.forward(x), cpu.forward(x), f"many outputs, {n} rows")
    path = takes_int_file(folder)
    cpu, model = cuda_int4.load(path, device="cpu"), gpu(path)
    for n in (3, 2, 3, 3, 2, 2):
        inputs = (models.rows(8, seed=n), models.rows(n))
        check.near(model.forward(*inputs), cpu.forward(*inputs), f"takes int {n}")


def check_cache(check: Checker, folder: Path) -> None:
    """A mutable buffer that a graph writes in place; reset; indices out of range."""
    path = cache_file(folder)
    cpu, model = cuda_int4.load(path, device="cpu"), gpu(path)
    for turn in range(2):
        for start in range(0, 12):
            inputs = (models.rows(2, seed=start), torch.arange(start, start + 2))
            check.near(model.forward(*inputs), cpu.forward(*inputs), f"cache {turn} {start}")
        for loaded in (cpu, model):
            loaded.reset()
    for bad in (16, 1 << 40, -1000):
        inputs = (models.rows(2), torch.tensor([3, bad]))
        words = ("index_put_", "0..15", str(bad))
        check.raises(partial(model.forward, *inputs), words, f"index {bad}")
    for loaded in (cpu, model):
        loaded.reset()
    inputs = (models.rows(2, seed=9), torch.arange(2))
    check.near(model.forward(*inputs), cpu.forward(*inputs), "after bad indices")


def check_shared_activation(check: Checker, folder: Path) -> None:
    """What w4a8 linears share is made again once it has been written to."""
    path = writes_between_file(folder)
    cpu, model = cuda_int4.load(path, device="cpu"), gpu(path)
    for turn in range(4):  # eager, captured, replayed
        inputs = (10 * models.rows(2, seed=turn), torch.arange(turn, turn + 2))
        check.near(model.forward(*inputs), cpu.forward(*inputs), f"shared activation {turn}")
    check.note(runs(model) == (1, 1, 3), f"shared activation: {runs(model)}")


def check_streams(check: Checker, folder: Path) -> None:
    """The caller's streams, the legacy one too; the caller's current device stays."""
    path = linear_file(folder)
    expected = gpu(path).forward(models.rows(3))
    stream = torch.cuda.Stream()
    for number in (0, stream.cuda_stream):
        model = gpu(path, cuda_stream=number)
        for turn in range(3):
            check.same(model.forward(models.rows(3)), expected, f"stream {number}, {turn}")
        check.note(runs(model) == (1, 1, 2), f"stream {number}: {runs(model)}")
    check.note(torch.cuda.current_device() == 0, "current device")
    ran = subprocess.run(
        [sys.executable, "-c", "import sys, cuda_int4, torch; m = cuda_int4.load(sys.argv[1]);"
         "[m.forward(torch.randn(3, 64)) for _ in range(3)]; u = m.device_use();"
         "print(u.eager_runs, u.captures, u.replays)", str(path)],
        env={**os.environ, "CUDA_INT4_CUDA_GRAPH": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    check.note(ran.stdout.split() == ["3", "0", "0"], f"no graphs by environment: {ran}")


def check_language_model(check: Checker, folder: Path) -> None:
    """The byte Llama: the same file, the same tokens; graphs, chunks, threads, errors."""
    path = byte_llama_file(folder, torch.float32)
    cpu = cuda_int4.load(path, device="cpu")
    model, eager = gpu(path), gpu(path, cuda_graph=False)
    expected = cpu.generate(PROMPT, max_new_tokens=512)
    found = model.generate(PROMPT, max_new_tokens=512)
    check.note(len(found.tokens) >= 256, f"only {len(found.tokens)} tokens")
    check.note(found.tokens == expected.tokens, "the GPU chose other tokens than the CPU")
    check.note(
        eager.generate(PROMPT, max_new_tokens=512).tokens == found.tokens,
        "without graphs other tokens",
    )
    n_new = len(found.tokens)
    check.note(runs(model) == (2, 1, n_new - 2), f"{n_new} tokens: {runs(model)}")
    times = (expected, found, eager.generate(PROMPT, max_new_tokens=256))
    rates = ", ".join(f"{g.stats.decode_tokens_per_s:.0f}" for g in times)
    print(f"  byte Llama fp32, {n_new} tokens; tokens/s on cpu, gpu, gpu without graphs: {rates}")
    for chunk in (1, 7, 16, 33):
        tokens = model.generate(PROMPT, max_new_tokens=256, prefill_chunk=chunk).tokens
        check.note(tokens == found.tokens[:256], f"prefill in chunks of {chunk}: other tokens")

    def logits(loaded: cuda_int4.model.Model) -> list[Tensor]:
        """Of every position: a prefill, then one by one; the first calls are eager."""
        loaded.reset()
        ids = torch.tensor([PROMPT])
        out = loaded.forward(ids, torch.arange(ids.shape[1]))
        for i in range(40):
            out += loaded.forward(
                torch.tensor([[found.tokens[i]]]), torch.tensor([len(PROMPT) + i])
            )
        return out

    first = logits(model)
    check.same(logits(model), first, "the same again, in graphs")
    check.same(logits(eager), first, "the same without graphs")
    check.near(first, logits(cpu), "logits")

    # A token that is none: an error that says so, and the model goes on.
    model.reset()
    for turn in range(3):  # eager, then captured, then replayed
        call = (torch.tensor([[300]]), torch.tensor([0]))
        words = ("embedding", "0..255", "300")
        check.raises(partial(model.forward, *call), words, f"token 300, turn {turn}")
    tokens = model.generate(PROMPT, max_new_tokens=256).tokens
    check.note(tokens == found.tokens[:256], "after a token out of range: other tokens")

    # Two methods in two threads, each in the way of the other.
    other = gpu(path)
    results: dict[int, list[list[int]]] = {0: [], 1: []}

    def talk(index: int, loaded: cuda_int4.model.Model) -> None:
        for turn in range(4):
            chunk = (7, 64)[(index + turn) % 2]
            results[index].append(
                loaded.generate(PROMPT, max_new_tokens=200, prefill_chunk=chunk).tokens
            )

    threads = [threading.Thread(target=talk, args=(i, m)) for i, m in enumerate((model, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, runs_of_thread in results.items():
        same = [tokens == found.tokens[:200] for tokens in runs_of_thread]
        check.note(same == [True] * 4, f"thread {index}: {same}")

    program = _native.package_dir() / "bin" / "cuda-int4-decode"
    ids = ",".join(map(str, PROMPT))
    for extra in ([], ["--no-cuda-graph"]):
        ran = subprocess.run(
            [program, path, "--tokens", ids, "--max-new", "256", "--device", "cuda:0", *extra],
            capture_output=True, text=True,
        )  # fmt: skip
        check.note(
            [int(token) for token in ran.stdout.split()] == found.tokens[:256],
            f"cuda-int4-decode {extra}: {ran.stderr}",
        )


def check_half_precision(check: Checker, folder: Path) -> None:
    """bf16 and fp16, w4a16 and w4a8: logits as near as their own rounding."""
    for dtype, activation in HALF_PRECISION:
        what = f"{str(dtype).removeprefix('torch.')} {'w4a8' if activation == 'int8' else 'w4a16'}"
        path = byte_llama_file(folder, dtype, activation)
        cpu, model = cuda_int4.load(path, device="cpu"), gpu(path)
        ids = torch.tensor([PROMPT])
        expected = cpu.forward(ids, torch.arange(ids.shape[1]))[0].float()
        found = model.forward(ids, torch.arange(ids.shape[1]))[0].float()
        error = float((found - expected).abs().max() / expected.abs().max())
        agree = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
        print(f"  {what}: greatest difference {error:.1e} of the greatest logit, "
              f"{agree:.1%} of the positions agree")  # fmt: skip
        bound = 8 * torch.finfo(dtype).eps * (4 if activation == "int8" else 1)
        check.note(error <= bound, f"{what}: logits differ by {error:.1e} of the greatest")
        expected_tokens = cpu.generate(PROMPT, max_new_tokens=256).tokens
        generation = model.generate(PROMPT, max_new_tokens=256)
        eager = gpu(byte_llama_file(folder, dtype, activation), cuda_graph=False)
        eagerly = eager.generate(PROMPT, max_new_tokens=256)
        tokens = generation.tokens
        check.note(eagerly.tokens == tokens, f"{what}: without graphs other tokens")
        n_same = next(
            (i for i, (a, b) in enumerate(zip(tokens, expected_tokens, strict=False)) if a != b),
            len(tokens),
        )
        rates = [g.stats.decode_tokens_per_s for g in (generation, eagerly)]
        print(f"  {what}: the first {n_same} of {len(tokens)} greedy tokens are the CPU's; "
              f"{rates[0]:.0f} tokens/s, without graphs {rates[1]:.0f}")  # fmt: skip


def check_profile(check: Checker, folder: Path) -> None:
    """Times by op, of a call that has a graph and of one that has none."""
    for dtype, activation in ((torch.float32, "none"), *HALF_PRECISION):
        what = f"{str(dtype).removeprefix('torch.')} {activation}"
        model = gpu(byte_llama_file(folder, dtype, activation))
        expected = model.generate(PROMPT, max_new_tokens=64)
        call = (torch.tensor([[expected.tokens[-1]]]), torch.tensor([len(PROMPT) + 63]))
        logits = model.forward(*call)
        for graphs in (True, False):
            other = gpu(byte_llama_file(folder, dtype, activation), cuda_graph=graphs)
            other.generate(PROMPT, max_new_tokens=64)
            profile = other.profile(*call)
            check.note(all(one.us >= 0 for one in profile.instructions), f"{what}: no time")
            total = sum(one.us for one in profile.instructions)
            check.note(
                0 < profile.total_us <= 1.2 * total, f"{what}: {profile.total_us} of {total}"
            )
            check.same(other.forward(*call), logits, f"{what}: after a profile")
        per_token = 1e6 / expected.stats.decode_tokens_per_s
        kinds = ", ".join(f"{op.split('::')[1]} {n} x {us / n:.1f}"
                          for op, (n, us) in list(profile.by_op().items())[:7])  # fmt: skip
        print(f"  {what}: {per_token:.0f} us a token, of which {profile.total_us:.0f} on the GPU; "
              f"{len(profile.instructions)} instructions: {kinds}")  # fmt: skip


def check_files(check: Checker, folder: Path) -> None:
    """Old layouts and damage are refused, and nothing is uploaded or left behind."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    forge = forged.Forge(folder / "forged", models.make(models.Linear()), (models.rows(3),))
    gpu(forge.path).close()  # what the driver allocates with a first model
    torch.cuda.synchronize()
    free = torch.cuda.mem_get_info()[0]
    for refusal in forged.REFUSALS:
        path = forge.change(refusal.changed)
        if refusal.name == "an address that is not aligned":  # it is, once it is uploaded
            gpu(path).close()
            continue
        words = tuple(word.replace("device cpu", "device cuda:0") for word in refusal.words)
        check.raises(partial(gpu, path), words, refusal.name)
    data = bytearray(forge.path.read_bytes()[: -forged.SEAL_NBYTES])
    store = data.rindex(bytes(4096))  # the constants lie behind the room of the blob
    for at in range(len(data) - 1, store, -1):
        if data[at] != 0:
            data[at] ^= 1
            break
    damaged = forge.with_bytes(data, sealed=False)
    words = ("constant proj.", "expected checksum", "damaged")
    check.raises(lambda: gpu(damaged), words, "a damaged constant")
    check.note(torch.cuda.mem_get_info()[0] == free, "memory is left behind after refusals")


class Wide(nn.Module):
    """int4 linears of random bytes side by side, as many as fill the gigabytes asked for."""

    N, K = 16384, 16384

    def __init__(self, n: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(n))
        generator = torch.Generator().manual_seed(0)
        shape = (self.N, self.K // 2)
        qdata = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        for i, layer in enumerate(self.layers):
            weight = CudaCoalescedInt4Tensor(
                qdata.roll((i, 977 * i), (0, 1)),
                torch.rand(self.N, self.K // 128, generator=generator).half(),
                128, "coalesced.v1", "none", (self.N, self.K), torch.float16,
            )  # fmt: skip
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]


def pinned_rate() -> float:
    """Host to device, GB/s, from page-locked memory."""
    host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        device.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return host.numel() / min(times) / 1e9


def wide_file(folder: Path, gigabytes: float) -> tuple[Path, Wide, Tensor]:
    """A file without a seal, what it was exported from, and an input."""
    n = max(1, round(gigabytes * 1e9 / (Wide.N * Wide.K / 2)))
    model = Wide(n)
    x = torch.randn(1, Wide.K, generator=torch.Generator().manual_seed(1)).half()
    path, unsealed = folder / "wide.pte", folder / f"unsealed_{n}.pte"
    if not unsealed.exists():
        models.write(model, path, (x,))
        with open(path, "rb+") as file:
            file.truncate(path.stat().st_size - forged.SEAL_NBYTES)
        path.rename(unsealed)
    return unsealed, model, x


def check_big(check: Checker, folder: Path, gigabytes: float) -> None:
    """The rate of an upload, verified and not; memory that will not do; nothing left behind."""
    unsealed, model, x = wide_file(folder, gigabytes)
    rate = pinned_rate()
    free = torch.cuda.mem_get_info()[0]
    for verify in (True, False, True, False):
        start = time.perf_counter()
        loaded = gpu(unsealed, verify=verify)
        seconds = time.perf_counter() - start
        use = loaded.device_use()
        found = use.uploaded_bytes / use.upload_s / 1e9
        print(f"  {use.uploaded_bytes / 1e9:.2f} GB uploaded at {found:.1f} GB/s "
              f"({'verified' if verify else 'not verified'}), {found / rate:.0%} of {rate:.1f}; "
              f"load {seconds:.2f} s")  # fmt: skip
        loaded.close()
        check.note(torch.cuda.mem_get_info()[0] == free, "memory is left behind after close")
        check.note(found >= LEAST_SHARE * rate, f"upload at {found:.1f} GB/s, bus {rate:.1f}")
    loaded = gpu(unsealed)
    y = loaded.forward(x)
    for layer, found_y in zip(model.layers, y, strict=True):
        weight = layer.weight
        q = torch.stack([weight.qdata & 15, weight.qdata >> 4], -1).view(Wide.N, Wide.K).cuda()
        w = (q.float() - 8) * weight.scale.cuda().float().repeat_interleave(128, 1)
        exact = (w.double() @ x.cuda().double().T).T.cpu()
        error = float((found_y.double() - exact).abs().max() / exact.abs().max())
        check.note(error < 2e-3, f"a wide linear: error {error:.1e}")
    loaded.close()

    free = torch.cuda.mem_get_info()[0]
    taken = torch.empty(free - (1 << 28), dtype=torch.uint8, device="cuda")
    left = torch.cuda.mem_get_info()[0]
    words = ("bytes of free memory", "of constants", f"it has {left}")
    check.raises(lambda: gpu(unsealed), words, "too little memory")
    check.note(torch.cuda.mem_get_info()[0] == left, "memory is left behind after too little")
    del taken
    torch.cuda.empty_cache()
    gpu(unsealed).close()


def main() -> int:
    """Run every part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--big-gb", type=float, default=2.5, help="of the file of the upload's rate"
    )
    parser.add_argument("--only", nargs="*", help="names of parts")
    parser.add_argument("--folder", type=Path, help="for the exported files")
    parser.add_argument("--export", action="store_true", help="only write them")
    args = parser.parse_args()
    check = Checker()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        if args.export:
            if args.only == ["big"]:
                wide_file(folder, args.big_gb)
            else:
                export_files(folder)
            return 0
        parts: dict[str, Callable[[], None]] = {
            "devices": lambda: check_devices(check, folder),
            "shapes": lambda: check_shapes(check, folder),
            "outputs": lambda: check_outputs(check, folder),
            "cache": lambda: check_cache(check, folder),
            "shared activation": lambda: check_shared_activation(check, folder),
            "streams": lambda: check_streams(check, folder),
            "language model": lambda: check_language_model(check, folder),
            "half precision": lambda: check_half_precision(check, folder),
            "profile": lambda: check_profile(check, folder),
            "files": lambda: check_files(check, folder),
            "big": lambda: check_big(check, folder, args.big_gb),
        }
        for name_of_part, part in parts.items():
            if args.only and name_of_part not in args.only:
                continue
            start, n_wrong = time.perf_counter(), check.n_wrong
            try:
                part()
            except Exception as error:  # the other parts still say what they have to
                check.note(False, f"{name_of_part}: {type(error).__name__}: {error}")
            gc.collect()
            wrong = check.n_wrong - n_wrong
            print(f"{name_of_part}: {wrong} wrong, {time.perf_counter() - start:.1f} s", flush=True)
    print(f"{check.n_right} right, {check.n_wrong} wrong")
    return 1 if check.n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
