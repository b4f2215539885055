"""Layout tags: what is read, what is refused and how; index maps that reach every bit once."""

import numpy as np
import pytest
from expecttest import assert_expected_inline

from cuda_int4 import layouts
from messages import folded, message


def test_a_tag_parses_into_name_and_version_and_prints_as_it_was():
    tag = layouts.LayoutTag.parse("marlin24.v12")
    assert (tag.name, tag.version, str(tag)) == ("marlin24", 12, "marlin24.v12")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "coalesced",
        "coalesced.1",
        "coalesced.v",
        "Coalesced.v1",
        "coalesced.v01",
        "coalesced.v-1",
    ]
    + ["coalesced.v1 ", "coalesced.v1\n", " coalesced.v1", "a.b.v1", None, 1, b"coalesced.v1"],
)
def test_a_malformed_tag_is_refused(text):
    assert "of the form 'name.vN'" in message(layouts.check_tag, text)


def test_messages_name_the_weight_what_was_found_and_the_cure():
    tags = ("coalesced", "plain.v1", "zigzag.v1", "coalesced.v0", "coalesced.v2")
    found = [message(layouts.check_tag, tag, who="layers.0.wq.weight") for tag in tags]
    assert_expected_inline(
        folded(*found),
        """\
layers.0.wq.weight: expected a layout tag of the form 'name.vN', such as 'coalesced.v1', got
    'coalesced'; state the name and the version
layers.0.wq.weight: expected one of coalesced.v1, marlin.v1, marlin24.v1, got plain.v1, an
    interchange format that no kernel reads; pack it with CudaCoalescedInt4Tensor.from_int4, or
    lower through CudaInt4Partitioner, which does
layers.0.wq.weight: expected one of coalesced.v1, marlin.v1, marlin24.v1, got zigzag.v1, a
    layout unknown to this build; install the version of cuda_int4 that wrote it, or pack the
    weight again
layers.0.wq.weight: expected coalesced.v1, got coalesced.v0, older than the one this build
    reads; pack the weight again, from its source, with this version
layers.0.wq.weight: expected coalesced.v1, got coalesced.v2, newer than the one this build
    reads; update cuda_int4, or pack the weight again with this version""",
    )


def test_plain_is_accepted_where_interchange_is_meant():
    assert layouts.check_tag("plain.v1", interchange=True).tag == layouts.PLAIN
    # Its other versions are not.
    assert "newer" in message(layouts.check_tag, "plain.v2", interchange=True)


def test_a_runnable_tag_is_its_layout():
    layout = layouts.check_tag("coalesced.v1")
    assert layout.tag == layouts.COALESCED and layout.runs


def form(**changes) -> layouts.WeightForm:
    fields = dict(N=3, K=96, group_size=32, is_symmetric=True, is_24=False)
    return layouts.WeightForm(**fields | changes)


@pytest.mark.parametrize("name", ["coalesced", "marlin", "marlin24"])
def test_an_option_is_a_name_or_a_tag(name):
    for option in (name, f"{name}.v1"):
        assert layouts.check_layout(option) == f"{name}.v1"
        assert layouts.choose_layout(option, form()) == f"{name}.v1"
    assert layouts.check_layout("auto") == "auto"


def test_auto_picks_marlin24_for_symmetric_weights_that_are_24():
    assert layouts.choose_layout("auto", form()) == "coalesced.v1"
    assert layouts.choose_layout("auto", form(is_24=True)) == "marlin24.v1"
    assert layouts.choose_layout("auto", form(is_24=lambda: True)) == "marlin24.v1"

    def is_24():
        raise AssertionError("asked for what does not matter")

    assert layouts.choose_layout("auto", form(is_symmetric=False, is_24=is_24)) == "coalesced.v1"


def test_zero_points_are_refused_for_a_sparse_layout():
    found = message(layouts.choose_layout, "marlin24", form(is_symmetric=False), who="wq.weight")
    assert_expected_inline(
        folded(found),
        """\
wq.weight: expected a symmetric weight for marlin24.v1, got one with zero points; 2:4 kernels
    know none: quantise with Int4Config(symmetric=True), or choose another layout""",
    )


def test_options_that_are_refused():
    options = ("fast", "plain", "plain.v1", "coalesced.v7")
    found = [message(layouts.choose_layout, option, form()) for option in options]
    assert_expected_inline(
        folded(*found),
        """\
layout: expected 'auto' or one of 'coalesced', 'marlin', 'marlin24', got 'fast'; 'auto' picks
    for each weight
layout: expected 'auto' or one of 'coalesced', 'marlin', 'marlin24', got 'plain'; 'auto' picks
    for each weight
layout: expected one of coalesced.v1, marlin.v1, marlin24.v1, got plain.v1, an interchange
    format that no kernel reads; pack it with CudaCoalescedInt4Tensor.from_int4, or lower
    through CudaInt4Partitioner, which does
layout: expected coalesced.v1, got coalesced.v7, newer than the one this build reads; update
    cuda_int4, or pack the weight again with this version""",
    )


@pytest.mark.parametrize("group_size", layouts.GROUP_SIZES)
def test_group_sizes_are_accepted(group_size):
    layouts.check_shape(1, 2 * group_size, group_size, who="w")


@pytest.mark.parametrize("K", [32, 96, 1120])
def test_one_group_per_row_is_accepted_for_any_k_of_32(K):
    layouts.check_shape(5, K, K, who="w")


def test_shapes_that_are_refused():
    shapes = [(0, 64, 32), (4, 96, 64), (4, 100, 100), (4, 64, 16), (4, 100, 64)]
    found = [message(layouts.check_shape, *shape, who="w") for shape in shapes]
    assert_expected_inline(
        folded(*found),
        """\
w: expected N >= 1 and K >= 1, got N=0, K=64; drop the layer
w: expected K % 64 == 0, got K=96, group_size=64; pick group_size 32, or pad K to 128
w: expected K % 32 == 0, got K=100, group_size=100; pad K to 128
w: expected group_size in 32, 64, 128, 256 or equal to K=64, got group_size=16; quantise again
    with one of these
w: expected K % 64 == 0, got K=100, group_size=64; pad K to 128""",
    )


@pytest.mark.parametrize("tag", layouts.LAYOUTS)
@pytest.mark.parametrize(
    "N, K, group_size", [(1, 32, 32), (3, 96, 32), (5, 256, 64), (7, 160, 160)]
)
def test_index_maps_reach_every_place_once(tag, N, K, group_size):
    layout, n_groups = layouts.LAYOUTS[tag], K // group_size
    rows = -(-N // 64) * 64 if layout.pads_n else N  # those of the padding too
    kept = K // 2 if layout.is_sparse else K
    n, k = np.meshgrid(np.arange(rows), np.arange(kept), indexing="ij")
    bits = np.sort(layout.qdata_bit_offset(n, k, N, K).ravel())
    assert np.array_equal(bits, 4 * np.arange(8 * np.prod(layout.qdata_shape(N, K)) // 4))
    n, g = np.meshgrid(np.arange(rows), np.arange(n_groups), indexing="ij")
    places = np.sort(layout.scale_index(n, g, N, n_groups).ravel())
    assert np.array_equal(places, np.arange(np.prod(layout.scale_shape(N, n_groups))))


def test_plain_and_coalesced_differ_in_the_order_of_scales_alone():
    plain, coalesced = layouts.LAYOUTS[layouts.PLAIN], layouts.LAYOUTS[layouts.COALESCED]
    assert plain.qdata_bit_offset(2, 5, 4, 64) == coalesced.qdata_bit_offset(2, 5, 4, 64) == 532
    # A square scale has one shape in both orders: the tag alone tells them apart.
    assert plain.scale_shape(2, 2) == coalesced.scale_shape(2, 2)
    assert (plain.scale_index(0, 1, 2, 2), coalesced.scale_index(0, 1, 2, 2)) == (2, 1)
