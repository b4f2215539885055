"""Where a token goes: the ops of a decoder in the order of a layer, each against its floor.

On a GPU a kernel begins while the one before it ends, so a timestamp between two ops changes what
it times. Instead whole calls are timed, each a CUDA graph that is launched several times in a row,
with and without some of the ops (``Model.time_part``):

    in the chain   what a call takes longer when this op joins those before it, in the order of
                   the graph: these add up to the call, gaps between kernels included
    saved          what the whole call takes less without this op: the most that removing it wins
    alone          a call of nothing but this op, in all layers: above what it adds in the chain
                   where kernels overlap, below where it begins late

The ops that are there read what is in memory where an op before them is missing; times do not hang
on values. The first row is the launch of a graph with the inputs' upload and no op. The ops of a
prompt are long, and the clock falls while it is measured in parts: there, and on the CPU, each op
is timed where it stands, between two timestamps of one run ("in the chain" alone).

Floors, on a GPU, are bytes over 4.3 TB/s (weights, keys and values, activations read and written,
each once), or multiply-adds over the rate of a large product by cuBLAS in the same run, where that
is longer. An op without a floor could be part of its neighbours.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import plot_linear
from cuda_int4.model import Model, OpTime
from decode_model import Config, weight_bytes

BUS_BYTES_PER_S = 4.3e12
ON_THE_HOST = ("executorch_prim::", "aten::sym_")  # they queue nothing
COLOURS = {"linear": "#1f6fb4", "attention": "#c23b22", "head": "#7b3fa0"}
OTHER_COLOUR = "#f28e2b"
GAP_COLOUR = "#999999"


@dataclasses.dataclass(frozen=True)
class Form:
    """What the floors of a call hang on."""

    config: Config
    group_size: int
    zero_points: bool
    layout_tag: str
    element_bytes: int  # of activations
    tokens: int  # of this call
    context: int  # tokens before them
    flops: float  # multiply-adds times two, a second; 0: not compared
    cache_element_bytes: int = 0  # 0: those of activations

    def linear_floor_us(self, N: int, K: int, rows: int) -> float:
        """Of one int4 linear."""
        nbytes = weight_bytes(N, K, self.group_size, self.zero_points, self.layout_tag)
        nbytes += rows * (N + K) * self.element_bytes
        return self._longer_us(nbytes, 2 * rows * N * K)

    def attention_floor_us(self) -> float:
        """Of all layers."""
        nbytes = operations = 0
        cache_bytes = self.cache_element_bytes or self.element_bytes
        for layer in range(self.config.n_layers):
            kind = self.config.kinds[layer % len(self.config.kinds)]
            width = kind.n_heads * kind.head_dim
            seen = sum(
                min(before + 1, kind.window or before + 1)
                for before in range(self.context, self.context + self.tokens)
            )
            nbytes += kind.cache_bytes_read(self.context + self.tokens, cache_bytes)
            nbytes += 2 * self.tokens * width * self.element_bytes
            operations += 4 * seen * width
        return self._longer_us(nbytes, operations)

    def passes_floor_us(self, width: float) -> float:
        """Of ops that together read or write ``width`` values for each token."""
        return self._longer_us(width * self.tokens * self.element_bytes, 0)

    def _longer_us(self, nbytes: float, operations: float) -> float:
        seconds = nbytes / BUS_BYTES_PER_S
        return 1e6 * max(seconds, operations / self.flops if self.flops else 0)


@dataclasses.dataclass
class Part:
    """The instructions of one kind at one place of a layer, in all layers."""

    name: str
    section: str  # "before", "layer" or "after"
    instructions: list[int]
    us: float = 0.0  # in the chain, of all of them
    saved_us: float | None = None
    alone_us: float | None = None
    floor_us: float | None = None

    @property
    def calls(self) -> int:
        """How many there are in a call of the model."""
        return len(self.instructions)


@dataclasses.dataclass
class TokenProfile:
    """A call of the model, taken apart."""

    title: str
    parts: list[Part]
    start_us: float  # of a call without any op
    total_us: float

    @property
    def floor_us(self) -> float:
        """Of all parts that have one."""
        return sum(part.floor_us or 0.0 for part in self.parts)


def op_name(one: OpTime) -> str:
    """Such as "linear 6144x4096" or "add_rms_norm"."""
    name = one.op.split("::")[-1].removesuffix(".out")
    name = re.sub(r"\.\w+_out$", "", name)
    sizes = re.search(r"N=(\d+) K=(\d+)", one.detail)
    return f"{name} {sizes[1]}x{sizes[2]}" if sizes else name


def find_parts(instructions: Sequence[OpTime]) -> list[Part]:
    """The parts, in the order of the graph; what queues nothing is of none.

    A layer ends with its last linear. What the first layer does before that the second does not is
    "before" the layers.
    """
    layers = _layers(instructions)
    ends = [max(ones) for _, ones in sorted(layers.items())]
    spans = [
        [i for i in range(begin + 1, end + 1) if not instructions[i].op.startswith(ON_THE_HOST)]
        for begin, end in itertools.pairwise([-1, *ends, len(instructions) - 1])
    ]
    *in_layers, after = spans
    before: Sequence[int] = []
    if len(in_layers) > 1:
        first, second = ([instructions[i].op for i in span] for span in in_layers[:2])
        n_before = len(first) - _common_end(first, second)
        before, in_layers[0] = in_layers[0][:n_before], in_layers[0][n_before:]
    parts = _merged("before", [before], instructions)
    parts += _merged("layer", in_layers, instructions)
    return parts + _merged("after", [after], instructions)


def _layers(instructions: Sequence[OpTime]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for i, one in enumerate(instructions):
        number = re.match(r"layers\.(\d+)\.", one.detail)
        if number:
            found.setdefault(int(number[1]), []).append(i)
    return found


def _common_end(a: Sequence[str], b: Sequence[str]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[-1 - n] == b[-1 - n]:
        n += 1
    return n


def _merged(
    section: str, spans: Sequence[Sequence[int]], instructions: Sequence[OpTime]
) -> list[Part]:
    """One part for each name and how often it comes again in its span."""
    order: list[tuple[str, int]] = []
    found: dict[tuple[str, int], list[int]] = {}
    for span in spans:
        names = [op_name(instructions[i]) for i in span]
        place = 0
        for n, (i, name) in enumerate(zip(span, names, strict=True)):
            key = (name, names[n + 1 :].count(name))
            if key not in found:
                order.insert(place, key)
            place = order.index(key) + 1
            found.setdefault(key, []).append(i)
    seen: list[str] = []
    parts = []
    for key in order:
        seen.append(key[0])
        again = any(name == key[0] for name, left in order if (name, left) != key)
        label = f"{key[0]} ({seen.count(key[0])})" if again else key[0]
        parts.append(Part(label, section, found[key]))
    return parts


def set_floors(parts: Sequence[Part], form: Form) -> None:
    """Of linears, attention and our own ops around them."""
    config = form.config
    projected = sum(
        config.kinds[layer % len(config.kinds)].projected for layer in range(config.n_layers)
    )
    attention = [part for part in parts if part.name.startswith("attention")]
    for part in parts:
        name = part.name.split(" ")[0]
        sizes = re.search(r"linear (\d+)x(\d+)", part.name)
        if sizes:
            rows = 1 if part.section == "after" else form.tokens  # the head reads one row
            one = form.linear_floor_us(int(sizes[1]), int(sizes[2]), rows)
            part.floor_us = one * part.calls
        elif name == "attention" and len(attention) == 1:
            part.floor_us = form.attention_floor_us()
        elif name == "add_rms_norm":
            part.floor_us = form.passes_floor_us(4 * config.dim * part.calls)
        elif name == "gate_mul":
            part.floor_us = form.passes_floor_us(3 * config.hidden_dim * part.calls)
        elif name == "rope_append":
            part.floor_us = form.passes_floor_us(2 * projected / config.n_layers * part.calls)


def measure(
    model: Model,
    inputs: tuple[torch.Tensor, ...],
    title: str,
    form: Form | None,
    *,
    rounds: int,
    in_parts: bool,
) -> TokenProfile:
    """Take a call apart; ``in_parts``, on a GPU alone: else by timestamps. No form: no floors."""
    profile = model.profile(*inputs, rounds=1 if in_parts else rounds)
    parts = find_parts(profile.instructions)
    if form is not None:
        set_floors(parts, form)
    if not in_parts:
        for part in parts:
            part.us = sum(profile.instructions[i].us for i in part.instructions)
        return TokenProfile(title, parts, 0.0, profile.total_us)

    def time_of(kept_parts: Sequence[Part]) -> float:
        kept = set().union(*(part.instructions for part in kept_parts))
        mask = [i in kept for i in range(len(profile.instructions))]
        return model.time_part(*inputs, kept=mask, rounds=rounds)

    start_us = total_us = time_of([])
    for n, part in enumerate(parts):
        longer = time_of(parts[: n + 1])
        part.us, total_us = longer - total_us, longer
    for n, part in enumerate(parts):
        part.saved_us = total_us - time_of([*parts[:n], *parts[n + 1 :]])
        part.alone_us = time_of([part]) - start_us
    model.reset()
    return TokenProfile(title, parts, start_us, total_us)


# Of the row that begins a call, saved_us is the time of all of it.
COLUMNS = "call,section,op,calls,us,saved_us,alone_us,floor_us".split(",")
LAUNCH = "launch, inputs"
LEGEND = (
    "us of a token: what the call takes longer when the op joins those before it in the graph;",
    "of a prompt: by timestamps, about a microsecond each. Saved: what the call takes less without",
    "the op. Alone: a call of nothing but it. Floors are bytes over 4.3 TB/s, or operations at the",
    "rate of a large product by cuBLAS.",
)


def write(profiles: Sequence[TokenProfile], note: str, to: Path) -> None:
    """As CSV; ``read`` gives it back."""
    with to.open("w", newline="") as file:
        file.write(f"# {note}\n")
        out = csv.writer(file, lineterminator="\n")
        out.writerow(COLUMNS)
        for one in profiles:
            cells = [f"{us:.2f}" for us in (one.start_us, one.total_us)]
            out.writerow([one.title, "start", LAUNCH, 1, *cells, "", ""])
            for part in one.parts:
                times = (part.us, part.saved_us, part.alone_us, part.floor_us)
                cells = ["" if us is None else f"{us:.2f}" for us in times]
                out.writerow([one.title, part.section, part.name, part.calls, *cells])


def read(table: Path) -> tuple[list[TokenProfile], str]:
    """Profiles and their note.

    Raises:
        ValueError: it is not a table of ``write``.
    """
    lines = table.read_text().splitlines()
    note = next((line[2:] for line in lines if line.startswith("# ")), "")
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    if not rows or list(rows[0]) != COLUMNS:
        raise ValueError(
            f"{table}: expected the .profile.csv of `cuda-int4 bench decode --profile`, got "
            f"{', '.join(rows[0]) if rows else 'no rows'}; give another file"
        )
    profiles: list[TokenProfile] = []
    for row in rows:
        if row["section"] == "start":
            times = float(row["us"]), float(row["saved_us"])
            profiles.append(TokenProfile(row["call"], [], *times))
            continue
        saved, alone, floor = (
            float(row[name]) if row[name] else None for name in ("saved_us", "alone_us", "floor_us")
        )
        instructions = list(range(int(row["calls"])))
        part = Part(row["op"], row["section"], instructions, float(row["us"]), saved, alone, floor)
        profiles[-1].parts.append(part)
    return profiles, note


def table(profile: TokenProfile) -> list[str]:
    """As Markdown."""
    in_parts = any(part.saved_us is not None for part in profile.parts)
    total = profile.total_us
    head = ["op", "calls", "us", "us a call", "% of the call", "floor, us", "share of it"]
    head += ["saved, us", "alone, us"] if in_parts else []
    lines = ["", f"## {profile.title}", "", f"| {' | '.join(head)} |"]
    lines.append("|---|" + "---:|" * (len(head) - 1))
    if profile.start_us:
        cells = [LAUNCH, "", f"{profile.start_us:.1f}", "", _percent(profile.start_us, total)]
        lines.append(f"| {' | '.join([*cells, *[''] * (len(head) - len(cells))])} |")
    for part in profile.parts:
        floor = ["", ""]
        if part.floor_us is not None:
            share = f"{part.floor_us / part.us:.2f}" if part.us > 0 else ""
            floor = [f"{part.floor_us:.1f}", share]
        cells = [part.name, str(part.calls), f"{part.us:.1f}", f"{part.us / part.calls:.2f}"]
        cells += [_percent(part.us, total), *floor]
        if in_parts:
            cells += [
                f"{us:.1f}" if us is not None else "" for us in (part.saved_us, part.alone_us)
            ]
        lines.append(f"| {' | '.join(cells)} |")
    cells = ["the call", "", f"{total:.1f}", "", "100"]
    if profile.floor_us:
        cells += [f"{profile.floor_us:.1f}", f"{profile.floor_us / total:.2f}"]
    lines.append(f"| {' | '.join([*cells, *[''] * (len(head) - len(cells))])} |")
    return lines


def _percent(us: float, total_us: float) -> str:
    return f"{100 * us / total_us:.1f}" if total_us > 0 else ""


def write_and_draw(profiles: Sequence[TokenProfile], note: str, beside: Path) -> None:
    """The table, and the picture where matplotlib is installed."""
    to = beside.with_suffix(".profile.csv")
    write(profiles, note, to)
    try:
        draw(profiles, note, to.with_suffix(".png"))
    except ImportError as error:
        print(
            f"{error}; then: python benchmarks/profile_decode.py {to} -o {to.with_suffix('.png')}",
            file=sys.stderr,
        )


def draw(profiles: Sequence[TokenProfile], note: str, to: Path) -> None:
    """Write the picture: a waterfall for each profile, ops in order, floors dark.

    Raises:
        ImportError: matplotlib is not installed.
    """
    plot_linear.require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    heights = [len(profile.parts) + 2 for profile in profiles]
    figure, panels = plt.subplots(
        len(profiles), 1, figsize=(11, 0.27 * sum(heights) + 1.0 * len(profiles) + 0.9),
        height_ratios=heights, squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, profile in zip(panels.flat, profiles, strict=True):
        _waterfall(panel, profile)
    figure.suptitle(
        "Where a call goes: each bar begins where the one above it ended; dark: the floor "
        "(bytes / 4.3 TB/s, or operations)\n" + note,
        fontsize=10,
    )
    figure.savefig(to, dpi=110)
    plt.close(figure)


def _waterfall(axes: Any, profile: TokenProfile) -> None:
    total = profile.total_us
    scale, unit = (1.0, "us") if total < 20_000 else (1e-3, "ms")
    rows: list[tuple[str, float, float | None, str, str]] = []
    if profile.start_us:
        rows.append((LAUNCH, profile.start_us, None, GAP_COLOUR, ""))
    for part in profile.parts:
        kind = "head" if part.section == "after" and "linear" in part.name else part.name.split()[0]
        label = part.name if part.calls == 1 else f"{part.calls} x {part.name}"
        text = f"{part.us * scale:.1f} {unit}, {_percent(part.us, total)} %"
        if part.calls > 1:
            text += f"; {part.us / part.calls:.2f} us each"
        if part.floor_us is not None and part.us > 0:
            text += f"; floor {part.floor_us / part.us:.2f} of it"
        rows.append((label, part.us, part.floor_us, COLOURS.get(kind, OTHER_COLOUR), text))
    at = 0.0
    for y, (_, us, floor_us, colour, text) in enumerate(rows):
        left, width = min(at, at + us) * scale, abs(us) * scale
        axes.barh(y, width, left=left, color=colour, alpha=0.45, height=0.8)
        if floor_us is not None:
            axes.barh(y, min(floor_us, max(us, 0)) * scale, left=left, color=colour, height=0.8)
        beyond = (at + us) * scale < 0.6 * total * scale
        axes.annotate(
            text, ((left + width) if beyond else left, y), xytext=(4 if beyond else -4, 0),
            textcoords="offset points", va="center", ha="left" if beyond else "right", fontsize=8,
        )  # fmt: skip
        at += us
    y = len(rows)
    axes.barh(y, total * scale, color="#bbbbbb", height=0.8)
    axes.barh(y, profile.floor_us * scale, color="#555555", height=0.8)
    text = f"{total * scale:.1f} {unit}"
    if profile.floor_us:
        text += f"; floor {profile.floor_us * scale:.1f}, {profile.floor_us / total:.2f} of it"
    axes.annotate(
        text,
        (profile.floor_us * scale, y), xytext=(4, 0), textcoords="offset points", va="center",
        fontsize=8,
    )  # fmt: skip
    axes.set_yticks(range(len(rows) + 1), [row[0] for row in rows] + ["the call"], fontsize=8)
    axes.set_ylim(len(rows) + 0.6, -0.6)
    axes.set_xlim(0, total * scale * 1.02)
    axes.set_xlabel(unit, fontsize=8)
    axes.set_title(profile.title, fontsize=10)
    axes.grid(True, axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw a table that was written before."""
    parser = argparse.ArgumentParser(
        prog="profile_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("table", type=Path, help=".profile.csv of bench decode --profile")
    parser.add_argument("-o", "--out", type=Path, required=True, help="picture to write")
    args = parser.parse_args(argv)
    draw(*read(args.table), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
