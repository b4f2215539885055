"""bench decode --profile: what is a part, what is measured of it, the table and the picture."""

from __future__ import annotations

import pytest
import torch
from expecttest import assert_expected_inline

from cuda_int4.commands.shipped import shipped_script
from cuda_int4.model import OpTime, Profile
from messages import folded, message

decode_model = shipped_script("benchmarks/decode_model")
profile_decode = shipped_script("benchmarks/profile_decode")

CONFIG = decode_model.MODELS["toy-llama"]
COSTS = {"embedding": 1, "rms_norm": 1, "add_rms_norm": 2, "linear": 8, "attention": 4, "le": 0.5}


def one(name: str, layer: int | None = None, N: int = 0, K: int = 0) -> OpTime:
    """An instruction as a profile has it."""
    weight = "output" if layer is None else f"layers.{layer}.w"
    detail = f"{weight}.weight N={N} K={K} w4a16" if N else ""
    return OpTime(f"cuda_int4::{name}", detail, 1.0)


def instructions() -> list[OpTime]:
    """Two layers: the norm of the first has no sum before it."""
    ones = [one("le.Tensor_out"), one("embedding.out"), one("rms_norm.out")]
    for layer in range(2):
        ones += [one("add_rms_norm.out")] if layer else []
        ones += [one("linear.out", layer, 512, 256), one("attention.out")]
        ones += [OpTime("executorch_prim::et_view.default", "", 0.1)]
        ones += [one("linear.out", layer, 256, 256), one("add_rms_norm.out")]
        ones += [one("linear.out", layer, 256, 512)]
    return [*ones, one("rms_norm.out"), one("linear.out", None, 512, 256)]


class Recorded:
    """A model whose kernels cost COSTS, and where a linear behind a linear begins 3 us earlier."""

    def profile(self, *inputs: torch.Tensor, rounds: int) -> Profile:
        return Profile(50.0, tuple(instructions()))

    def time_part(self, *inputs: torch.Tensor, kept: list[bool], rounds: int) -> float:
        names = [profile_decode.op_name(one) for one in instructions()]
        there = [name.split()[0] for name, keep in zip(names, kept, strict=True) if keep]
        overlaps = sum(a == b == "linear" for a, b in zip(there, there[1:], strict=False))
        return 3.5 + sum(COSTS[name] for name in there) - 3 * overlaps

    def reset(self) -> None:
        """No state."""


def measured(**options: object) -> object:
    """The profile of a token of the recorded model."""
    form = profile_decode.Form(CONFIG, 128, False, "coalesced.v1", 2, 1, 100, 0.0)
    given = {"form": form, "in_parts": True, "rounds": 1, **options}
    return profile_decode.measure(Recorded(), (), "a token", **given)


def test_parts_stand_in_the_order_of_a_layer():
    parts = profile_decode.find_parts(instructions())
    assert [(part.section, part.calls, part.name) for part in parts] == [
        ("before", 1, "le"),
        ("before", 1, "embedding"),
        ("before", 1, "rms_norm"),
        ("layer", 1, "add_rms_norm (1)"),
        ("layer", 2, "linear 512x256"),
        ("layer", 2, "attention"),
        ("layer", 2, "linear 256x256"),
        ("layer", 2, "add_rms_norm (2)"),
        ("layer", 2, "linear 256x512"),
        ("after", 1, "rms_norm"),
        ("after", 1, "linear 512x256"),
    ]
    found = sorted(i for part in parts for i in part.instructions)
    views = [i for i, one in enumerate(instructions()) if one.op.startswith("executorch_prim")]
    assert sorted(found + views) == list(range(len(instructions())))


def test_a_graph_without_layers_is_one_section():
    parts = profile_decode.find_parts([one("embedding.out"), one("linear.out", None, 64, 32)])
    assert [(part.section, part.name) for part in parts] == [
        ("after", "embedding"),
        ("after", "linear 64x32"),
    ]


def test_times_in_the_chain_add_up_to_the_call():
    profile = measured()
    assert profile.start_us == 3.5
    assert profile.start_us + sum(part.us for part in profile.parts) == profile.total_us
    everything = Recorded().time_part(kept=[one.op[0] == "c" for one in instructions()], rounds=1)
    assert profile.total_us == everything
    by_name = {(part.section, part.name): part for part in profile.parts}
    norm = by_name["layer", "add_rms_norm (2)"]
    # Each keeps two linears apart that would overlap by 3 us: without it the call saves that, too.
    assert (norm.us, norm.saved_us, norm.alone_us) == (4 + 0, 2 * (2 + 3), 2 * 2)
    stamped = measured(in_parts=False, form=None)
    assert all(part.us == part.calls and part.saved_us is None for part in stamped.parts)
    assert stamped.total_us == 50 and stamped.floor_us == 0


def test_a_table_and_a_file_that_gives_it_back(tmp_path):
    profile = measured()
    assert_expected_inline(
        "\n".join(profile_decode.table(profile)),
        """\

## a token

| op | calls | us | us a call | % of the call | floor, us | share of it | saved, us | alone, us |
|---|---:|---:|---:|---:|---:|---:|---:|---:|
| launch, inputs |  | 3.5 |  | 4.5 |  |  |  |  |
| le | 1 | 0.5 | 0.50 | 0.6 |  |  | 0.5 | 0.5 |
| embedding | 1 | 1.0 | 1.00 | 1.3 |  |  | 1.0 | 1.0 |
| rms_norm | 1 | 1.0 | 1.00 | 1.3 |  |  | 1.0 | 1.0 |
| add_rms_norm (1) | 1 | 2.0 | 2.00 | 2.6 | 0.0 | 0.00 | 5.0 | 2.0 |
| linear 512x256 | 2 | 16.0 | 8.00 | 20.8 | 0.0 | 0.00 | 16.0 | 13.0 |
| attention | 2 | 8.0 | 4.00 | 10.4 | 0.0 | 0.00 | 14.0 | 8.0 |
| linear 256x256 | 2 | 16.0 | 8.00 | 20.8 | 0.0 | 0.00 | 16.0 | 13.0 |
| add_rms_norm (2) | 2 | 4.0 | 2.00 | 5.2 | 0.0 | 0.00 | 10.0 | 4.0 |
| linear 256x512 | 2 | 16.0 | 8.00 | 20.8 | 0.0 | 0.00 | 16.0 | 13.0 |
| rms_norm | 1 | 1.0 | 1.00 | 1.3 |  |  | 4.0 | 1.0 |
| linear 512x256 | 1 | 8.0 | 8.00 | 10.4 | 0.0 | 0.00 | 8.0 | 8.0 |
| the call |  | 77.0 |  | 100 | 0.1 | 0.00 |  |  |""",
    )
    profile_decode.write(
        [profile, measured(in_parts=False)], "a machine", tmp_path / "x.profile.csv"
    )
    (found, short), note = profile_decode.read(tmp_path / "x.profile.csv")
    assert note == "a machine" and short.parts[0].alone_us is None
    assert profile_decode.table(found) == profile_decode.table(profile)


def test_a_picture_of_it(tmp_path):
    pytest.importorskip("matplotlib")
    profile_decode.write_and_draw([measured()], "a machine", tmp_path / "rows.csv")
    assert (tmp_path / "rows.profile.png").read_bytes().startswith(b"\x89PNG")


def test_another_table_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("kernel,M\nw4a16,1\n")
    assert_expected_inline(
        folded(message(profile_decode.read, tmp_path / "x.csv").replace(f"{tmp_path}/", "")),
        """\
x.csv: expected the .profile.csv of `cuda-int4 bench decode --profile`, got kernel, M; give
    another file""",
    )


def test_floors_count_bytes_or_operations():
    form = profile_decode.Form(CONFIG, 128, False, "coalesced.v1", 2, 16, 100, 1e12)
    # 256 x 512 codes, scales of 16 bits, x and y of 16 rows; the multiply-adds take longer here
    assert form.linear_floor_us(512, 256, 16) == pytest.approx(1e6 * 2 * 16 * 512 * 256 / 1e12)
    slow = profile_decode.Form(CONFIG, 128, False, "coalesced.v1", 2, 16, 100, 0.0)
    nbytes = 512 * 256 / 2 + 2 * 512 * 2 + 16 * (512 + 256) * 2
    assert slow.linear_floor_us(512, 256, 16) == pytest.approx(1e6 * nbytes / 4.3e12)
    # two layers, two heads of 64 for keys and as many for values, 116 tokens; q and y of four heads
    cache, heads = 2 * 2 * 64 * 116 * 2, 2 * 16 * 4 * 64 * 2
    assert slow.attention_floor_us() == pytest.approx(1e6 * 2 * (cache + heads) / 4.3e12)
    seen = sum(range(101, 117))
    operations = 2 * 4 * seen * 4 * 64
    assert form.attention_floor_us() == pytest.approx(1e6 * operations / 1e12)
