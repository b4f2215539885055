"""Checks the decode loop that stays on the GPU: its sampler and its tokens against the host's.

    python tests/gpu/check_cuda_loop.py [--folder DIR] [--only PART ...] [--quick]
    python tests/gpu/check_cuda_loop.py --folder DIR --export      # on any machine, beforehand

Needs the package, built with nvcc, and torch with CUDA. Prints a line per part, one for each check
that failed, and a summary; the exit status is 0 if all are right. ``--quick`` leaves most cases
out, for compute-sanitizer.
"""

from __future__ import annotations

import argparse
import ctypes
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from cuda_int4 import _native

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
N_SLOTS = 4
UNTOUCHED = -7


class Checker:
    """Counts what was right and prints what was not."""

    def __init__(self, quick: bool) -> None:
        self.n_right = self.n_wrong = 0
        self.quick = quick

    def note(self, right: bool, what: str) -> None:
        """Count one check."""
        self.n_right += right
        self.n_wrong += not right
        if not right:
            print("WRONG", what, flush=True)


# ---- the sampler ----


class Rows:
    """What the sampler reads and writes, for rows of ``configs``."""

    def __init__(self, configs: list[dict], positions: list[int], end: int = 2**62) -> None:
        self.n = len(configs)
        rows = (_native.SampleRow * self.n)()
        for row, config in zip(rows, configs, strict=True):
            native = _native.GenerateConfig(**{"top_p": 1.0, **config})
            _native.check(
                _native.library().sample_rule(_native.byref(native), _native.byref(row.rule))
            )
            row.end_position = end
        data = bytearray(bytes(rows))
        self.rows = torch.frombuffer(data, dtype=torch.uint8).cuda()
        self.tokens = torch.full((self.n,), UNTOUCHED, device="cuda")
        self.positions = torch.tensor(positions, device="cuda")
        self.words = torch.zeros(N_SLOTS, self.n, dtype=torch.int64).pin_memory()
        self.is_greedy = all(row.rule.scale == 0 for row in rows)
        self.step = 0

    def arguments(self, logits: Tensor, vocab_size: int) -> _native.SampleArgs:
        """For logits [n, row_stride]."""
        return _native.SampleArgs(
            logits=logits.data_ptr(),
            n_rows=self.n,
            vocab_size=vocab_size,
            row_stride=logits.shape[1],
            dtype=_native.tensor_view(torch.empty(1, dtype=logits.dtype)).dtype,
            is_greedy=self.is_greedy,
            rows=self.rows.data_ptr(),
            tokens=self.tokens.data_ptr(),
            positions=self.positions.data_ptr(),
            words=self.words.data_ptr(),
            n_slots=N_SLOTS,
        )

    def sample(self, logits: Tensor, vocab_size: int) -> list[tuple[int, int]]:
        """Token and status of each row."""
        args = self.arguments(logits, vocab_size)
        stream = torch.cuda.current_stream().cuda_stream
        _native.check(_native.library().sample_rows(_native.byref(args), stream))
        torch.cuda.synchronize()
        words = self.words[self.step % N_SLOTS].tolist()
        self.step += 1
        steps = {(word >> 40) & 0xFFFFFF for word in words}
        assert steps == {self.step}, f"steps {steps} for {self.step}"
        return [(word & 0xFFFFFFFF, (word >> 32) & 0xFF) for word in words]


def on_cpu(logits: Tensor, position: int, config: dict) -> int | str:
    """The CPU's token of one row, or what is wrong with it."""
    native = _native.GenerateConfig(**{"top_p": 1.0, **config})
    token = ctypes.c_int64(-1)
    view = _native.tensor_view(logits)
    code = _native.library().sample(
        _native.byref(view), _native.byref(native), position, _native.byref(token)
    )
    return token.value if code == 0 else _native.last_error()


def random_config(rng: random.Random, vocab_size: int) -> dict:
    """Any of all settings, edges among them."""
    if rng.random() < 0.15:
        return {}
    return {
        "temperature": rng.choice([1e-30, 0.1, 0.7, 1.0, 1.5, 30.0, 1e30]),
        "top_k": rng.choice([0, 0, 1, 2, 40, 1000, vocab_size - 1, vocab_size, 10**12]),
        "top_p": rng.choice([1.0, 1.0, 0.95, 0.5, 1e-9, 1 - 1e-9]),
        "min_p": rng.choice([0.0, 0.0, 0.05, 1e-9, 1.0]),
        "seed": rng.getrandbits(64),
        "sequence": rng.choice([0, 1, 2**40]),
    }


def random_logits(generator: torch.Generator, rng: random.Random, shape: tuple[int, int]) -> Tensor:
    """Of several spreads; with ties, with excluded tokens."""
    logits = torch.randn(shape, generator=generator) * rng.choice([1e-3, 1.0, 4.0, 20.0])
    form = rng.randrange(4)
    if form == 1:
        logits = (logits * 2).round() / 2
    if form == 2:
        logits[torch.rand(shape, generator=generator) < 0.5] = -torch.inf
        logits[:, 0] = 0.0
    if form == 3:
        logits = torch.zeros(shape)
    return logits


def check_sampler(check: Checker, _: Path) -> None:
    """The GPU's tokens are the CPU's, for rows of any size, dtype and configuration."""
    generator, rng = torch.Generator().manual_seed(1), random.Random(1)
    sizes = [1, 2, 7, 8, 33, 257, 1000, 4097, 32000, 50257, 128256, 151936, 262144, 300001]
    sizes = sizes if not check.quick else [1, 33, 4097, 300001]
    n = 0
    for vocab_size in sizes:
        for dtype in DTYPES:
            n_rounds = (12 if vocab_size < 5000 else 3) if not check.quick else 1
            for _round in range(n_rounds):
                n_rows = rng.choice([1, 3, 16]) if not check.quick else 2
                stride = vocab_size + rng.choice([0, 0, 5, 64])
                logits = random_logits(generator, rng, (n_rows, stride)).to(dtype)
                configs = [random_config(rng, vocab_size) for _row in range(n_rows)]
                if rng.random() < 0.2:
                    configs = [{} for _row in range(n_rows)]
                positions = [rng.choice([0, 17, 2**33]) + row for row in range(n_rows)]
                rows = Rows(configs, positions)
                found = rows.sample(logits.cuda(), vocab_size)
                for row, (token, status) in enumerate(found):
                    one = logits[row, :vocab_size].contiguous()
                    expected = on_cpu(one, positions[row] + 1, configs[row])
                    what = f"V={vocab_size} {dtype} {configs[row]} row {row}"
                    check.note(
                        token == expected and status == 0, f"{what}: {token} {status}, {expected}"
                    )
                    n += 1
                check.note(rows.tokens.tolist() == [t for t, _s in found], "tokens to read next")
                check.note(rows.positions.tolist() == [p + 1 for p in positions], "positions")
    print(f"  {n} rows")


def check_ends(check: Checker, _: Path) -> None:
    """Rows at their end, steps that follow each other, logits that no token can be chosen from."""
    logits = torch.randn(3, 1000).cuda()
    rows = Rows([{}, {"temperature": 1.0}, {}], [5, 6, 7], end=8)
    for step in range(6):
        rows.sample(logits, 1000)
        expected = [min(p + step + 1, 7) for p in (5, 6, 7)]
        check.note(rows.positions.tolist() == expected, f"end of rows, step {step}")
        check.note(rows.tokens[2].item() == UNTOUCHED, "a row at its end keeps its token")
    bad = {"NaN": (float("nan"), 1), "-NaN": (-float("nan"), 1), "+inf": (float("inf"), 2)}
    for dtype in DTYPES:
        for temperature in (0.0, 1.0):
            for name, (value, status) in bad.items():
                for at in (0, 500, 999):
                    logits = torch.randn(2, 1000, dtype=dtype)
                    logits[1, at] = value
                    logits[1, 999] = float("inf") if at < 999 else value
                    rows = Rows([{"temperature": temperature}] * 2, [3, 3])
                    found = rows.sample(logits.cuda(), 1000)
                    what = f"{name} at {at}, {dtype}, temperature {temperature}: {found}"
                    check.note(found[0][1] == 0 and found[1] == (at, status), what)
                    check.note(rows.positions.tolist() == [4, 3], what)
                    reason = on_cpu(logits[1].contiguous(), 4, {"temperature": temperature})
                    words = "NaN" if status == 1 else "+inf"
                    check.note(f"{words} as the logit of token {at} " in str(reason), str(reason))
            rows = Rows([{"temperature": temperature}], [3])
            found = rows.sample(torch.full((1, 9), -torch.inf, dtype=dtype).cuda(), 9)
            check.note(found[0][1] == 3, f"all excluded: {found}")


def check_sampler_times(_check: Checker, __: Path) -> None:
    """Microseconds a call, in a graph of 20 with 20 different logits."""
    settings: dict[str, dict] = {
        "greedy": {},
        "temperature": {"temperature": 1.0},
        "top-p": {"temperature": 1.0, "top_p": 0.95},
        "top-k, top-p": {"temperature": 1.0, "top_k": 50, "top_p": 0.95},
    }
    for dtype in (torch.bfloat16, torch.float32):
        for vocab_size in (256, 32000, 128256, 262144):
            for n_rows in (1, 16):
                logits = [
                    torch.randn(n_rows, vocab_size).mul(3).to(dtype).cuda() for _i in range(20)
                ]
                line = f"  V={vocab_size:6d} {n_rows:2d} rows {str(dtype)[6:]:8s}"
                for name, config in settings.items():
                    rows = Rows([config] * n_rows, [0] * n_rows)
                    line += f"  {name} {graph_us(rows, logits, vocab_size):.2f} us"
                print(line, flush=True)


def graph_us(rows: Rows, logits: list[Tensor], vocab_size: int) -> float:
    rows.sample(logits[0], vocab_size)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stream = torch.cuda.current_stream().cuda_stream
        for one in logits:
            args = rows.arguments(one, vocab_size)
            _native.check(_native.library().sample_rows(_native.byref(args), stream))
    times = []
    for _round in range(17):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(logits))
    return statistics.median(times)


PARTS: dict[str, Callable[[Checker, Path], None]] = {
    "sampler": check_sampler,
    "ends": check_ends,
    "times": check_sampler_times,
}


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    check = Checker(args.quick)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in args.only:
            before, start = check.n_wrong, time.time()
            print(f"{name} ...", flush=True)
            PARTS[name](check, folder)
            wrong = check.n_wrong - before
            print(f"{name}: {wrong} wrong ({time.time() - start:.1f} s)", flush=True)
    print(f"{check.n_right} right, {check.n_wrong} wrong")
    return int(check.n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
