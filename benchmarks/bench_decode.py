"""Exports a decoder of real shapes with random int4 weights, and decodes from it in C++.

    cuda-int4 bench decode --model llama-3-8b
    cuda-int4 bench decode --model gemma-4-31b --context 128 2048 --out results.csv
    cuda-int4 bench decode --sequences 16 --context 128 2048

The model (decode_model.py) is exported on this machine, with the standard calls, and run by the
C++ decode loop: ``prefill`` rows are the tokens per second at which a prompt is read (the first
token is chosen from it), ``decode`` rows the tokens per second that follow a prompt of that many
tokens, ``generate`` rows those of whole generations behind a prompt, the median of several, and
``step of 16`` rows those of calls that take 16 tokens behind it, as speculative decoding
makes them (the linears then have 16 rows of x). Of each decode row the first tokens are not
counted: they make the CUDA graph. With ``--sequences`` as many prompts are read and continued
together, each in a row of the caches: times are then of a step, tokens per second of all together.
``floor_fraction`` is the share of the memory floor: the bytes that a token needs (the int4 weights,
the head's included, and the keys and values of the context, each once) over 4.3 TB/s, the bus of an
H200, over the time taken.

The program is run twice on the same prompt, with CUDA graphs and without, before anything is timed:
the tokens must be the same and the logits finite.

Behind a ``prefill`` row stands, on a GPU, how long the linears of that prompt take as bfloat16
matmuls of cuBLAS, in the same run and in turns with it. ``--profile`` takes a token apart, and a
prompt: profile_decode.py says how.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import cuda_int4
import decode_model
import linear_cuda
import profile_decode
from cuda_int4.batch import generate_token_batch
from cuda_int4.layouts import COALESCED
from cuda_int4.marlin_layouts import MARLIN, MARLIN24
from cuda_int4.model import Model, Profile
from machine import choose_device, command_line, commit_id, cpu_name, driver_version

COLUMNS = (
    "model,layers,dtype,layout,activation,group_size,zero_points,phase,context,us_p10,us_median,us_p90,"
    "tokens_per_s,floor_us,floor_fraction,peak_device_MB,machine,commit"
).split(",")
BUS_BYTES_PER_S = 4.3e12
LAYOUTS = {"coalesced": COALESCED, "marlin": MARLIN, "marlin24": MARLIN24}
STEP_TOKENS = 16
STEP_RUNS = 20
UNCOUNTED_TOKENS = 4
CHECKED_TOKENS = 8
PROFILE_ROUNDS = 7
MAX_SEQ_LEN = 2048  # tokens that one forward takes; longer prompts are read in parts
MAX_STEP_TOKENS = 8192  # the same of several sequences together
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclasses.dataclass
class Row:
    """One line of the table; times in microseconds, of a step or of the whole prompt."""

    phase: str
    context: int
    times_us: list[float]
    n_tokens: int  # per time
    floor_us: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """From the median."""
        return self.n_tokens / statistics.median(self.times_us) * 1e6

    def cells(self) -> list[str]:
        """From "phase" to "floor_fraction"."""
        median = statistics.median(self.times_us)
        tenths = statistics.quantiles(self.times_us, n=10) if len(self.times_us) > 1 else [median]
        times = [f"{us:.1f}" for us in (tenths[0], median, tenths[-1])]
        floor = ["", ""]
        if self.floor_us is not None:
            floor = [f"{self.floor_us:.1f}", f"{self.floor_us / median:.3f}"]
        return [self.phase, str(self.context), *times, f"{self.tokens_per_s:.1f}", *floor]


def export(config: decode_model.Config, options: argparse.Namespace, path: Path) -> None:
    """Write the ``.pte``."""
    start = time.perf_counter()
    fusions = options.fusions
    max_new_tokens = max(options.new_tokens, STEP_TOKENS)
    max_context = max(options.context + options.prefill) + max_new_tokens + CHECKED_TOKENS
    max_context = max(max_context, options.prompt + options.generate)
    model = decode_model.build(
        config,
        max_context=max_context,
        dtype=DTYPES[options.dtype],
        group_size=options.group_size,
        zero_points=options.zero_points,
        activation=options.activation,
        dense_head=options.dense_head,
        layout_tag=LAYOUTS[options.layout],
        max_sequences=options.sequences,
    )
    max_seq_len = min(MAX_SEQ_LEN, max_context)
    if options.sequences > 1:
        max_seq_len = min(MAX_STEP_TOKENS // options.sequences, max_context)
    example, dynamic_shapes = decode_model.example_call(max_seq_len, options.sequences)
    cuda_int4.export(
        model,
        example,
        path,
        dynamic_shapes=dynamic_shapes,
        activation=options.activation,
        constant_methods={
            "get_max_seq_len": max_seq_len,
            "get_max_context_len": max_context,
            "get_vocab_size": config.vocab_size,
            "get_eos_ids": [],
            "use_kv_cache": True,
            "enable_dynamic_shape": True,
            **({"get_max_batch": options.sequences} if options.sequences > 1 else {}),
        },
        devices=(options.device,),
        fusions=fusions if fusions in ("all", "none") else fusions.split(","),
        kv_cache=options.kv_cache,
    )
    print(
        f"exported {path.stat().st_size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s",
        file=sys.stderr,
    )


def cache_element_bytes(options: argparse.Namespace) -> int:
    """Of keys and values."""
    return 1 if options.kv_cache == "int8" else DTYPES[options.dtype].itemsize


def load(path: Path, device: str, cuda_graph: bool) -> Model:
    """Open it without the checksums over constants, which export has just made."""
    apart = path.with_suffix(".ptd")
    data_path = apart if apart.exists() else None
    return cuda_int4.load(path, data_path, device=device, verify=False, cuda_graph=cuda_graph)


def check(path: Path, prompt: Sequence[int], options: argparse.Namespace, model: Model) -> None:
    """Same tokens with and without CUDA graphs, and finite logits.

    Raises:
        RuntimeError: they are not.
    """
    tokens = torch.tensor([prompt]).expand(options.sequences, -1)
    places = torch.arange(len(prompt)).expand_as(tokens)
    logits = model.forward(tokens, places if options.sequences > 1 else places[0])[0]
    if not bool(logits.isfinite().all()) or float(logits.float().std()) == 0:
        raise RuntimeError("bench decode: expected finite logits that differ, got others")

    def generated(model: Model) -> list[list[int]]:
        ragged = [prompt[: len(prompt) - i % len(prompt)] for i in range(options.sequences)]
        batch = generate_token_batch(model, ragged, max_new_tokens=CHECKED_TOKENS)
        return [one.tokens for one in batch.generations]

    chosen = generated(model)
    if options.device == "cpu" or not options.check:
        return
    model.close()
    with load(path, options.device, not options.cuda_graph) as other:
        others = generated(other)
    if chosen != others:
        raise RuntimeError(
            f"bench decode: expected the same tokens with CUDA graphs and without, got {chosen} "
            f"and {others}"
        )


class CublasLinears:
    """The linears of a prompt as matmuls of cuBLAS in bfloat16, recorded in a CUDA graph.

    A prompt is read in parts of MAX_SEQ_LEN. Layers share weights, which together pass the L2.
    """

    def __init__(self, config: decode_model.Config, n_tokens: int) -> None:
        """Record it."""
        *linears, head = config.linears
        generator = torch.Generator("cuda").manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            values = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
            return values * shape[-1] ** -0.5

        weights = {shape: random(*shape) for shape in {*linears, head}}
        parts = {min(MAX_SEQ_LEN, n_tokens - at) for at in range(0, n_tokens, MAX_SEQ_LEN)}
        x = {(M, K): random(M, K) for M in {*parts, 1} for _, K in weights}

        def run() -> None:
            for at in range(0, n_tokens, MAX_SEQ_LEN):
                M = min(MAX_SEQ_LEN, n_tokens - at)
                for N, K in linears:
                    F.linear(x[M, K], weights[N, K])
                F.linear(x[1, head[1]], weights[head])

        run()
        self._kept = weights, x
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            run()

    def time_us(self) -> float:
        """Of one replay."""
        return linear_cuda.best_time_s(self._graph.replay, 1) * 1e6


def measure(
    model: Model, config: decode_model.Config, weight_bytes: int, options: argparse.Namespace
) -> list[Row]:
    """All rows."""
    generator = torch.Generator().manual_seed(0)
    longest = max([*options.context, *options.prefill, options.prompt])
    prompt = torch.randint(0, config.vocab_size, (longest,), generator=generator).tolist()
    rows = []
    for n in options.prefill:
        rival = CublasLinears(config, n) if options.device == "cuda" else None
        times, rival_times = [], []
        for turn in range(options.runs + 1):
            run = model.generate(prompt[:n], max_new_tokens=1)
            rival_us = rival.time_us() if rival else 0.0
            if turn:  # the first is eager
                times.append(run.stats.time_to_first_token_s * 1e6)
                rival_times.append(rival_us)
        rows.append(Row("prefill", n, times, n))
        print(f"prefill {n}: {rows[-1].tokens_per_s:.0f} tokens/s", file=sys.stderr)
        if rival:
            rows.append(Row("linears by cuBLAS", n, rival_times, n))
    element_bytes = cache_element_bytes(options)
    if options.generate:
        n = options.prompt
        times = []
        for turn in range(options.repeat + 1):
            run = model.generate(prompt[:n], max_new_tokens=options.generate)
            if turn:
                times.append(1e6 / run.stats.decode_tokens_per_s)
        needed = weight_bytes + config.cache_bytes_read(n + options.generate // 2, element_bytes)
        floor_us = needed / BUS_BYTES_PER_S * 1e6
        rows.append(Row(f"generate {options.generate}", n, times, 1, floor_us))
        print(f"generate behind {n}: {rows[-1].tokens_per_s:.1f} tokens/s", file=sys.stderr)
    for n in options.context:
        stamps: list[float] = []
        run = model.generate(
            prompt[:n],
            max_new_tokens=options.new_tokens,
            on_token=lambda _, stamps=stamps: stamps.append(time.perf_counter()),
        )
        if n >= MAX_SEQ_LEN and n not in options.prefill:
            rows.append(Row("prefill", n, [run.stats.prefill_s * 1e6], n))
        steps = [(b - a) * 1e6 for a, b in zip(stamps, stamps[1:], strict=False)]
        middle = n + (options.new_tokens + UNCOUNTED_TOKENS) // 2
        needed = weight_bytes + config.cache_bytes_read(middle, element_bytes)
        floor_us = needed / BUS_BYTES_PER_S * 1e6
        rows.append(Row("decode", n, steps[UNCOUNTED_TOKENS:], 1, floor_us))
        print(f"decode at {n}: {rows[-1].tokens_per_s:.1f} tokens/s", file=sys.stderr)
        tokens = torch.tensor([prompt[:STEP_TOKENS]])
        places = torch.arange(n, n + STEP_TOKENS)
        times = []
        for _ in range(UNCOUNTED_TOKENS + STEP_RUNS):
            start = time.perf_counter()
            model.forward(tokens, places)
            times.append((time.perf_counter() - start) * 1e6)
        needed = weight_bytes + config.cache_bytes_read(n + STEP_TOKENS, element_bytes)
        floor_us = needed / BUS_BYTES_PER_S * 1e6
        times = times[UNCOUNTED_TOKENS:]
        rows.append(Row(f"step of {STEP_TOKENS}", n, times, STEP_TOKENS, floor_us))
    return rows


def measure_several(
    model: Model, config: decode_model.Config, weight_bytes: int, options: argparse.Namespace
) -> list[Row]:
    """All rows of several sequences."""
    generator = torch.Generator().manual_seed(0)
    n_rows = options.sequences
    shape = (n_rows, max([*options.context, options.prompt]))
    prompts = torch.randint(0, config.vocab_size, shape, generator=generator)
    element_bytes = cache_element_bytes(options)

    def floor_us(context: int) -> float:
        needed = weight_bytes + n_rows * config.cache_bytes_read(context, element_bytes)
        return needed / BUS_BYTES_PER_S * 1e6

    rows = []
    if options.generate:
        n = options.prompt
        times = []
        for turn in range(options.repeat + 1):
            batch = generate_token_batch(
                model, prompts[:, :n].tolist(), max_new_tokens=options.generate
            )
            if turn:  # the first makes CUDA graphs
                times.append(n_rows / batch.stats.decode_tokens_per_s * 1e6)
        floor = floor_us(n + options.generate // 2)
        rows.append(Row(f"{n_rows} generate {options.generate}", n, times, n_rows, floor))
        print(f"{n_rows} behind {n}: {rows[-1].tokens_per_s:.1f} tokens/s", file=sys.stderr)
    for n in options.context:
        stamps: list[float] = []

        def stamp(index: int, _token: int, stamps: list[float] = stamps) -> None:
            if index == 0:
                stamps.append(time.perf_counter())

        batch = generate_token_batch(
            model, prompts[:, :n].tolist(), max_new_tokens=options.new_tokens, on_token=stamp
        )
        rows.append(Row(f"{n_rows} prefill", n, [batch.stats.prefill_s * 1e6], n_rows * n))
        steps = [(b - a) * 1e6 for a, b in zip(stamps, stamps[1:], strict=False)]
        floor = floor_us(n + (options.new_tokens + UNCOUNTED_TOKENS) // 2)
        rows.append(Row(f"{n_rows} sequences", n, steps[UNCOUNTED_TOKENS:], n_rows, floor))
        print(f"{n_rows} at {n}: {rows[-1].tokens_per_s:.1f} tokens/s", file=sys.stderr)
    return rows


def take_apart(
    model: Model, config: decode_model.Config, options: argparse.Namespace
) -> list[profile_decode.TokenProfile]:
    """Where a token goes at the shortest and the longest context, and a prompt."""
    on_gpu = options.device == "cuda"
    flops = linear_cuda.matmul_ceiling() if on_gpu else 0.0

    def measured(n_tokens: int, at: int, title: str) -> profile_decode.TokenProfile:
        form = profile_decode.Form(
            config, options.group_size, options.zero_points, LAYOUTS[options.layout],
            DTYPES[options.dtype].itemsize, n_tokens, at, flops, cache_element_bytes(options),
        )  # fmt: skip
        tokens = torch.arange(n_tokens).unsqueeze(0) % config.vocab_size
        return profile_decode.measure(
            model,
            (tokens, torch.arange(at, at + n_tokens)),
            title,
            form if on_gpu else None,
            rounds=PROFILE_ROUNDS,
            in_parts=on_gpu and n_tokens == 1,
        )

    ends = sorted({min(options.context), max(options.context)})
    profiles = [measured(1, n, f"a token behind {n}") for n in ends]
    n = min(MAX_SEQ_LEN, max(options.prefill))
    return [*profiles, measured(n, 0, f"a prompt of {n}")]


def profile(
    model: Model, config: decode_model.Config, options: argparse.Namespace
) -> dict[int, Profile]:
    """Where the time of one token goes, at the shortest and the longest context."""
    profiles = {}
    for n in sorted({min(options.context), max(options.context)}):
        model.reset()
        token = torch.full((options.sequences, 1), 1 % config.vocab_size)
        places = torch.full((options.sequences, 1), n)
        profiles[n] = model.profile(token, places if options.sequences > 1 else places[0])
    return profiles


def by_shape(profile: Profile) -> dict[str, tuple[int, float]]:
    """Calls and microseconds by op, linears by their N and K; dearest first."""
    sums: dict[str, tuple[int, float]] = {}
    for one in profile.instructions:
        sizes = re.search(r"N=\d+ K=\d+", one.detail)
        name = one.op.removeprefix("cuda_int4::") + (f" {sizes[0]}" if sizes else "")
        n, us = sums.get(name, (0, 0.0))
        sums[name] = (n + 1, us + one.us)
    return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def op_table(profiles: dict[int, Profile]) -> list[str]:
    """Microseconds of a token by op, as Markdown."""
    contexts = list(profiles)
    ops = {n: by_shape(profiles[n]) for n in contexts}
    last = ops[contexts[-1]]
    lines = [
        "",
        "Where the time of a token goes, microseconds by op. On a GPU each has a timestamp behind",
        "it, about a microsecond, so the sum is more than the call takes:",
        "",
        "| op | calls | " + " | ".join(f"context {n}" for n in contexts) + " |",
        "|---|---:|" + "---:|" * len(contexts),
    ]
    for name, (n_calls, _) in last.items():
        times = [f"{ops[n].get(name, (0, 0.0))[1]:.1f}" for n in contexts]
        lines.append(f"| {name} | {n_calls} | {' | '.join(times)} |")
    n_all = sum(n for n, _ in last.values())
    sums = [f"{sum(us for _, us in ops[n].values()):.1f}" for n in contexts]
    lines.append(f"| sum | {n_all} | {' | '.join(sums)} |")
    totals = [f"{profiles[n].total_us:.1f}" for n in contexts]
    return [*lines, f"| the call, without timestamps | | {' | '.join(totals)} |"]


def report(
    rows: Sequence[Row], config: decode_model.Config, notes: Sequence[str], peak_MB: float,
    options: argparse.Namespace,
) -> tuple[str, str]:  # fmt: skip
    """The table as CSV, and as Markdown."""
    machine = machine_name(options.device)
    case = [
        options.model, config.n_layers, options.dtype, options.layout, options.activation,
        options.group_size, int(options.zero_points),
    ]  # fmt: skip
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    text.writelines(f"# {note}\n" for note in notes)
    table.writerow(COLUMNS)
    for row in rows:
        table.writerow([*case, *row.cells(), f"{peak_MB:.0f}", machine, options.commit])
    kind = "w4a16" if options.activation == "none" else "w4a8"
    lines = [
        f"# {options.model}, {options.layout}, {kind}, group size {options.group_size}",
        "",
        *(f"- {note}" for note in notes),
        f"- peak device memory {peak_MB:.0f} MB",
        "",
        "| phase | context | ms | tokens/s | memory floor, ms | share of the floor |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ms = statistics.median(row.times_us) / 1e3
        floor = ["", ""]
        if row.floor_us is not None:
            floor = [f"{row.floor_us / 1e3:.3f}", f"{row.floor_us / 1e3 / ms:.2f}"]
        cells = [row.phase, str(row.context), f"{ms:.3f}", f"{row.tokens_per_s:.1f}", *floor]
        lines.append(f"| {' | '.join(cells)} |")
    return text.getvalue(), "\n".join(lines) + "\n"


def machine_name(device: str) -> str:
    """The GPU's or the CPU's."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def run(options: argparse.Namespace, folder: Path) -> None:
    """Export, check, measure, write."""
    config = decode_model.MODELS[options.model]
    if options.layers:
        config = dataclasses.replace(config, n_layers=options.layers)
    if options.separate:
        config = dataclasses.replace(config, separate=True)
    path = options.pte or folder / f"{options.model}.pte"
    found = path.exists()
    if not found:
        export(config, options, path)
    weight_bytes = decode_model.bytes_a_token_reads(
        config,
        options.group_size,
        options.zero_points,
        DTYPES[options.dtype].itemsize if options.dense_head else 0,
        LAYOUTS[options.layout],
    )
    start = time.perf_counter()
    model = load(path, options.device, options.cuda_graph)
    loaded_s = time.perf_counter() - start
    check(path, list(range(1, 13)), options, model)
    if options.check and options.device == "cuda":
        model = load(path, options.device, options.cuda_graph)
    with model:
        of_rows = measure if options.sequences == 1 else measure_several
        rows = of_rows(model, config, weight_bytes, options)
        profiles = {} if options.profile else profile(model, config, options)
        apart = take_apart(model, config, options) if options.profile else []
        use = model.device_use()
    where = machine_name(options.device)
    if options.device == "cuda":
        where += f", driver {driver_version()}, torch {torch.__version__}"
    notes = [
        f"{where}, commit {options.commit or 'unknown'}",
        f"command: {command_line()}",
        f"{config.n_layers} layers, {weight_bytes / 1e9:.3f} GB of weights in linears"
        f"{' (the head dense)' if options.dense_head else ''}, "
        f"loaded in {loaded_s:.1f} s"
        + (
            f" (upload {use.uploaded_bytes / 1e9 / use.upload_s:.1f} GB/s)"
            if use.upload_s > 0
            else ""
        ),
    ]
    if found:
        notes.append(f"the program, {path.name}, was exported before")
    as_csv, as_markdown = report(rows, config, notes, use.peak_device_bytes / 1e6, options)
    lines = op_table(profiles) if profiles else []
    lines += [line for one in apart for line in profile_decode.table(one)]
    if apart:
        lines += ["", *profile_decode.LEGEND]
        note = f"{options.model}, {options.layout}, {notes[0]}"
        profile_decode.write_and_draw(apart, note, options.out or Path("decode.csv"))
    as_markdown += "\n".join(lines) + "\n"
    print(as_markdown)
    if options.out is not None:
        options.out.write_text(as_csv)
        options.out.with_suffix(".md").write_text(as_markdown)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options; ``cuda-int4 bench decode`` has the same."""
    parser.add_argument("--model", choices=tuple(decode_model.MODELS), default="llama-3-8b")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--layers", type=int, default=0, help="fewer than the model has")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--layout", choices=tuple(LAYOUTS), default="coalesced")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--zero-points", action="store_true")
    parser.add_argument(
        "--activation", choices=("none", "int8"), default="none", help="w4a16 or w4a8"
    )
    parser.add_argument(
        "--fusions", default="all", help="all, none, or names of fusions with commas between them"
    )
    parser.add_argument(
        "--separate-linears",
        dest="separate",
        action="store_true",
        help="query, key and value as linears of their own, gate and up too: what the fusion "
        "`linears` merges",
    )
    parser.add_argument(
        "--dense-head", action="store_true", help="leave the head in --dtype, not in int4"
    )
    parser.add_argument(
        "--sequences", type=int, default=1, help="decoded together, each a row of the caches"
    )
    parser.add_argument(
        "--kv-cache", choices=("none", "int8"), default="none", help="how keys and values are kept"
    )
    parser.add_argument("--context", type=int, nargs="+", default=[128, 2048, 8192])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--new-tokens", type=int, default=64, help="per context")
    parser.add_argument("--runs", type=int, default=3, help="of each prefill")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before --generate")
    parser.add_argument(
        "--generate", type=int, default=512, help="tokens of whole generations; 0: none"
    )
    parser.add_argument("--repeat", type=int, default=5, help="of --generate")
    parser.add_argument(
        "--profile",
        action="store_true",
        help="take a token and a prompt apart; .profile.csv and .profile.png go beside --out",
    )
    parser.add_argument(
        "--no-cuda-graph", dest="cuda_graph", action="store_false", help="launch kernel by kernel"
    )
    parser.add_argument(
        "--no-check", dest="check", action="store_false",
        help="do not load it a second time to compare the tokens",
    )  # fmt: skip
    parser.add_argument(
        "--pte",
        type=Path,
        help="keep the program here, or run the one that is there (with the .ptd beside it)",
    )
    parser.add_argument("--commit", default="", help="to record, where git does not know it")
    parser.add_argument("--out", type=Path, help="CSV file; Markdown goes beside it")


def command(options: argparse.Namespace) -> int:
    """Run with parsed options."""
    options.device = choose_device(options.device)
    options.commit = options.commit or commit_id()
    if options.new_tokens <= UNCOUNTED_TOKENS + 1:
        raise ValueError(
            f"bench decode: expected --new-tokens of at least {UNCOUNTED_TOKENS + 2}, got "
            f"{options.new_tokens}; the first {UNCOUNTED_TOKENS} are not counted"
        )
    if options.generate == 1 or min(options.generate, options.repeat - 1, options.prompt - 1) < 0:
        raise ValueError(
            "bench decode: expected --generate of 0 or at least 2, --repeat and --prompt of at "
            f"least 1, got {options.generate}, {options.repeat} and {options.prompt}"
        )
    if options.sequences < 1 or (options.sequences > 1 and options.profile):
        raise ValueError(
            "bench decode: expected --sequences of at least 1, and of 1 with --profile, got "
            f"{options.sequences}"
        )
    if options.zero_points and options.layout == "marlin24":
        raise ValueError(
            "bench decode: expected --layout marlin24 without --zero-points, got both; 2:4 kernels "
            "know no zero points: leave one out"
        )
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser: Any = argparse.ArgumentParser(
        prog="bench_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return command(parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
