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
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cuda_int4
from cuda_int4 import _native

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "export_examples" / "byte_llama")]

import export as byte_llama  # noqa: E402
import language_models as models  # noqa: E402
from conversations import Conversation, generate  # noqa: E402

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


# ---- the loop ----

PROMPT = list(b"class Stack:\n    def __init__(self, items=()):\n        self.items = list(")
FORMS = (
    (torch.float32, "none"), (torch.bfloat16, "none"), (torch.float16, "none"),
    (torch.bfloat16, "int8"),
)  # fmt: skip
DRAWN = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "seed": 11}


def byte_llama_file(folder: Path, dtype: torch.dtype, activation: str, n_rows: int = 1) -> Path:
    path = folder / f"byte_{str(dtype).removeprefix('torch.')}_{activation}_{n_rows}.pte"
    if not path.exists():
        byte_llama.build(
            path,
            dtype=dtype,
            method="min_max",
            max_context=1024,
            activation=activation,
            **({"max_sequences": n_rows} if n_rows > 1 else {}),
        )
    return path


def history_file(
    folder: Path, name: str, model: nn.Module | None = None, n_rows: int = 0, **methods: Any
) -> Path:
    """A HistoryModel, of ``n_rows`` if that is not 0, in one delegate."""
    path = folder / f"{name}.pte"
    return path if path.exists() else models.export_delegated(path, model, n_rows, **methods)


def gpu(path: Path, **options: Any) -> cuda_int4.model.Model:
    return cuda_int4.load(path, device="cuda", **options)


def runs(model: cuda_int4.model.Model) -> tuple[int, int, int]:
    use = model.device_use()
    return use.eager_runs, use.captures, use.replays


def check_tokens(check: Checker, folder: Path) -> None:
    """The byte Llama: the same tokens whoever chooses them, in graphs and without."""
    n = 48 if check.quick else 300
    for dtype, activation in FORMS[: 1 if check.quick else None]:
        path = byte_llama_file(folder, dtype, activation)
        what = f"byte Llama {str(dtype).removeprefix('torch.')} {activation}"
        forms = {
            "loop": gpu(path),
            "loop without graphs": gpu(path, cuda_graph=False),
            "host": gpu(path, device_loop=False),
        }
        for config in ({}, DRAWN, {**DRAWN, "seed": 12, "top_k": 0}):
            found = {}
            for name, model in forms.items():
                times = [model.generate(PROMPT, max_new_tokens=n, **config) for _turn in range(2)]
                found[name] = times[1]
                check.note(times[0].tokens == times[1].tokens, f"{what} {name} {config}: again")
            for name, generation in found.items():
                same = generation.tokens == found["host"].tokens
                check.note(same, f"{what} {config}: {name} chose other tokens than the host")
            rates = ", ".join(
                f"{name} {1e6 / g.stats.decode_tokens_per_s:.1f}" for name, g in found.items()
            )
            print(f"  {what} {config or 'greedy'}: us a token: {rates}", flush=True)
        expected = (2, 1)
        model = gpu(path)
        model.generate(PROMPT, max_new_tokens=n)
        check.note(runs(model) == (*expected, n - 2), f"{what}: {runs(model)}")


def check_ways_to_end(check: Checker, folder: Path) -> None:
    """Stop tokens, callbacks, ends of context; how the conversation goes on behind each."""
    path = history_file(folder, "history")
    model, host = gpu(path), gpu(path, device_loop=False)
    prompt = [5, 6, 7]
    whole = cuda_int4.load(path, device="cpu").generate(prompt).tokens
    check.note(len(whole) == 64 - 3 + 1, f"to the end of the context: {len(whole)}")
    for loaded, name in ((model, "loop"), (host, "host")):
        full = loaded.generate(prompt)
        check.note(full.tokens == whole, f"{name}: other tokens")
        check.note(full.stats.stop_reason == "end_of_context", f"{name}: {full.stats.stop_reason}")
        for n in (1, 2, 3, 4, 5, 20, 61):
            for way in ("stop", "callback", "max"):
                seen: list[int] = []

                class Enough(Exception):
                    pass

                def stop_at(token: int, n: int = n, seen: list[int] = seen) -> None:
                    seen.append(token)
                    if len(seen) == n:
                        raise Enough

                first = whole.index(whole[n - 1]) + 1 if way == "stop" else n
                try:
                    options: dict[str, Any] = {
                        "stop": {"stop_tokens": [whole[n - 1]]},
                        "callback": {"on_token": stop_at},
                        "max": {"max_new_tokens": n},
                    }[way]
                    seen = loaded.generate(prompt, **options).tokens
                except Enough:
                    pass
                what = f"{name}, {way} after {n}"
                check.note(seen == whole[:first], f"{what}: {len(seen)} tokens")
                rest = loaded.generate(whole[first - 1 : first], start_pos=3 + first - 1).tokens
                check.note(rest == whole[first:], f"{what}: goes on with others")


class Breaks(models.HistoryModel):
    """Half of the rows of logits have a NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.table[::16, 3] = torch.nan


class Counts(models.HistoryModel):
    """Its state is how often it was called, too: a step too many would change the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        self.calls.add_(1)
        return super().forward(tokens, input_pos) * torch.cos(self.calls)


def check_errors(check: Checker, folder: Path) -> None:
    """Errors in the middle, and what goes on behind them; state that is no cache."""
    path = history_file(folder, "breaks", Breaks())
    for options in ({}, {"cuda_graph": False}, {"device_loop": False}):
        model = gpu(path, **options)
        for turn in range(8):
            outcomes = []
            for loaded in (cuda_int4.load(path, device="cpu"), model):
                seen: list[int] = []
                try:
                    loaded.generate([turn, 1], on_token=seen.append)
                    outcomes.append((seen, ""))
                except _native.CudaInt4Error as error:
                    outcomes.append((seen, str(error)))
            check.note(outcomes[0] == outcomes[1], f"NaN {options} {turn}: {outcomes}")
    path = history_file(folder, "longer", get_max_context_len=80)
    for options in ({}, {"cuda_graph": False}, {"device_loop": False}):
        model = gpu(path, **options)
        whole = model.generate([9], max_new_tokens=50).tokens
        for _turn in range(2):
            seen = []
            try:
                model.generate([9], on_token=seen.append)
                check.note(False, f"index {options}: no error")
            except _native.CudaInt4Error as error:
                right = "expected indices in 0..63, got 64" in str(error)
                check.note(right and len(seen) >= 63, f"index {options}: {len(seen)} {error}")
            check.note(
                model.generate([9], max_new_tokens=50).tokens == whole, f"after it {options}"
            )
    path = history_file(folder, "counts", Counts())
    cpu, model = cuda_int4.load(path, device="cpu"), gpu(path)
    for n in (5, 9, 1):
        stop = {"stop_tokens": [cpu.generate([1], max_new_tokens=30).tokens[n]]}
        for start in (0, n + 1):
            expected = cpu.generate([1], start_pos=start, max_new_tokens=30, **stop).tokens
            found = model.generate([1], start_pos=start, max_new_tokens=30, **stop).tokens
            check.note(found == expected, f"a state that counts, {n} {start}")


def check_callbacks(check: Checker, folder: Path) -> None:
    """Callbacks that use the model, and generations in two threads."""
    path = history_file(folder, "history")
    model = gpu(path)
    alone = model.generate([4, 2], max_new_tokens=40).tokens
    outputs: list[Tensor] = []

    def look(token: int) -> None:
        # Its own row of the cache, beyond those of the generation.
        outputs.extend(model.forward(torch.tensor([[token]]), torch.tensor([60])))

    for _turn in range(3):
        tokens = model.generate([4, 2], max_new_tokens=40, on_token=look).tokens
        check.note(tokens == alone, "a callback that calls forward: other tokens")
    check.note(len(outputs) == 120 and torch.isfinite(torch.cat(outputs)).all().item(), "outputs")

    paths = [byte_llama_file(folder, torch.float32, "none"), path]
    loaded = [gpu(paths[0]), gpu(paths[0]), gpu(paths[1]), gpu(paths[1], device_loop=False)]
    prompts = [PROMPT, PROMPT[:9], [1, 2, 3], [1, 2, 3]]
    expected = [
        gpu(p).generate(prompt, max_new_tokens=40, **DRAWN).tokens
        for p, prompt in zip((paths[0], paths[0], path, path), prompts, strict=True)
    ]
    found: dict[int, list[list[int]]] = {i: [] for i in range(len(loaded))}

    def talk(i: int) -> None:
        for _turn in range(5):
            found[i].append(loaded[i].generate(prompts[i], max_new_tokens=40, **DRAWN).tokens)

    threads = [threading.Thread(target=talk, args=(i,)) for i in range(len(loaded))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in found.items():
        check.note(results == [expected[i]] * 5, f"thread {i}")


def check_several(check: Checker, folder: Path) -> None:
    """16 conversations against each alone; ends at different times; in groups; drawn."""
    alone = cuda_int4.load(history_file(folder, "history"), device="cpu")
    path = history_file(folder, "rows", n_rows=16)
    rng = random.Random(3)
    for options in ({}, {"cuda_graph": False}, {"device_loop": False}):
        model = gpu(path, **options)
        for n in (16, 16, 5, 1, 16, 20):
            several = []
            for i in range(n):
                prompt = [rng.randrange(256) for _token in range(rng.randrange(1, 30))]
                config = dict(rng.choice([{}, {**DRAWN, "sequence": i}, {"temperature": 2.0}]))
                config["max_new_tokens"] = rng.choice([0, 1, 2, 10, 30, 30])
                one = Conversation(prompt, config, ends_after=rng.choice([3, 12, 10**9]))
                single = Conversation(prompt, config, ends_after=one.ends_after)
                generate(alone, [single])
                several.append((one, single))
            generate(model, [one for one, _single in several])
            for i, (one, single) in enumerate(several):
                same = one.tokens == single.tokens and one.stop_reason == single.stop_reason
                check.note(same, f"{options} {n} rows, row {i} {one.config}")
    if check.quick:
        return
    for dtype, activation in ((torch.float32, "none"), (torch.bfloat16, "none")):
        single = gpu(byte_llama_file(folder, dtype, activation))
        model = gpu(byte_llama_file(folder, dtype, activation, 16))
        host = gpu(byte_llama_file(folder, dtype, activation, 16), device_loop=False)
        prompts = [PROMPT[: 4 + 4 * i] for i in range(16)]
        expected = [single.generate(p, max_new_tokens=200).tokens for p in prompts]
        rates = []
        for loaded in (model, host):
            for _turn in range(2):
                several = [Conversation(p, {"max_new_tokens": 200}) for p in prompts]
                total = generate(loaded, several)
            rates.append((total.new_tokens - 16) / total.decode_s)
            if loaded is model:
                found = [one.tokens for one in several]
        check.note(found == [one.tokens for one in several], f"16 rows {dtype}: loop on and off")
        n_same = sum(a == b for a, b in zip(found, expected, strict=True))
        print(f"  16 byte Llamas {dtype}: {n_same} of 16 as alone; tokens/s in all {rates[0]:.0f}, "
              f"through the host {rates[1]:.0f}", flush=True)  # fmt: skip
        # In fp32 rounding is far below the differences of logits; in bf16 near ties fall otherwise.
        check.note(dtype != torch.float32 or n_same == 16, f"16 rows {dtype}: others than alone")


def export_files(folder: Path) -> None:
    """All files of the checks."""
    for dtype, activation in FORMS:
        byte_llama_file(folder, dtype, activation)
    for dtype in (torch.float32, torch.bfloat16):
        byte_llama_file(folder, dtype, "none", 16)
    history_file(folder, "history")
    history_file(folder, "breaks", Breaks())
    history_file(folder, "longer", get_max_context_len=80)
    history_file(folder, "counts", Counts())
    history_file(folder, "rows", n_rows=16)


PARTS: dict[str, Callable[[Checker, Path], None]] = {
    "sampler": check_sampler,
    "ends": check_ends,
    "times": check_sampler_times,
    "ways_to_end": check_ways_to_end,
    "errors": check_errors,
    "callbacks": check_callbacks,
    "several": check_several,
    "tokens": check_tokens,
}


def main() -> int:
    """Run the parts asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--export", action="store_true", help="write the files and end")
    args = parser.parse_args()
    check = Checker(args.quick)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if args.export:
            export_files(folder)
            return 0
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
