"""The benchmarks' own parts: shapes, random weights, the plot, what the command line refuses."""

import importlib.util

import pytest
import torch
from expecttest import assert_expected_inline

from cuda_int4.commands.shipped import shipped_script
from messages import folded, message

shapes = shipped_script("benchmarks/shapes")
decode_model = shipped_script("benchmarks/decode_model")
bench_decode = shipped_script("benchmarks/bench_decode")
bench_linear = shipped_script("benchmarks/bench_linear")
plot_linear = shipped_script("benchmarks/plot_linear")
bench_roofline = shipped_script("benchmarks/bench_roofline")


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3-8b", 7.50), ("llama-3-70b", 69.5), ("gemma-4-31b", 30.7)]
)
def test_a_decoder_has_the_linears_that_are_timed(name, billions):
    linears = decode_model.MODELS[name].linears
    assert set(linears) == set(shapes.LINEARS[name])
    assert round(sum(N * K for N, K in linears) / 1e9, 1 if billions > 10 else 2) == billions


def test_bytes_of_the_weights_that_a_token_needs():
    config = decode_model.MODELS["llama-3-8b"]
    n_weights = sum(N * K for N, K in config.linears)
    assert decode_model.bytes_a_token_reads(config, 128, False) == n_weights * 4.125 / 8
    assert decode_model.bytes_a_token_reads(config, 32, True) == n_weights * 5 / 8
    head = 128256 * 4096
    dense = decode_model.bytes_a_token_reads(config, 128, False, dense_head_bytes=2)
    assert dense == (n_weights - head) * 4.125 / 8 + head * 2


def test_bytes_of_the_cache_that_a_token_needs():
    llama, gemma = (decode_model.MODELS[name] for name in ("llama-3-8b", "gemma-4-31b"))
    assert llama.cache_bytes_read(1000, 2) == 1000 * 131072
    assert llama.cache_bytes_read(1000, 1) == 1000 * (131072 // 2 + 32 * 2 * 8 * 4)
    sliding, full = 50 * 2 * 16 * 256 * 2, 10 * 2 * 4 * 512 * 2
    assert gemma.cache_bytes_read(1000, 2) == 1000 * (sliding + full)
    assert gemma.cache_bytes_read(8192, 2) == 1024 * sliding + 8192 * full


@pytest.mark.parametrize(
    ("layout_tag", "bits"), [("coalesced.v1", 4.125), ("marlin.v1", 4.125), ("marlin24.v1", 3.125)]
)
def test_random_weights_are_weights_of_their_layout(layout_tag, bits):
    weights = decode_model.RandomWeights(torch.bfloat16, 128, False, "none", layout_tag)
    weight = weights.weight(320, 1024)
    assert weight.layout_tag == layout_tag
    assert 8 * decode_model.weight_bytes(320, 1024, 128, False, layout_tag) == bits * 320 * 1024
    y = torch.randn(64, 1024) @ weight.dequantize().T
    assert 0.8 < float(y.std()) < 1.25


ROOFLINE = """\
# a machine
# read ceiling 4.000 TB/s (torch.max over 1 GiB), fp16 matmul ceiling 800 TFLOP/s, L2 50 MiB
kernel,M,N,K,group_size,us_median,GB_per_s,zero_points,light_fraction,bus_fraction
w4a16,1,4096,4096,128,4.00,2200.0,0,0.5,0.5
w4a16,1024,4096,4096,128,50.00,500.0,0,0.8,0.1
marlin24,1024,4096,4096,128,30.00,700.0,0,0.7,0.1
w4a8,1,4096,4096,128,WRONG,,0,,
"""


def test_roofline_has_a_page_per_kernel(tmp_path):
    table = tmp_path / "linear.csv"
    table.write_text(ROOFLINE)
    assert_expected_inline(
        "\n".join(bench_roofline.page(table).splitlines()[5:]),
        """\
## w4a16 g128

| N | K | M | MB | GFLOP | memory floor, us | compute floor, us | time, us | share |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| 4096 | 4096 | 1 | 8.80 | 0.03 | 2.20 | 0.04 | 4.00 | 0.55 |
| 4096 | 4096 | 1024 | 25.00 | 34.36 | 6.25 | 42.95 | 50.00 | 0.86 |

## marlin24 g128

| N | K | M | MB | GFLOP | memory floor, us | compute floor, us | time, us | share |
|---:|---:|---:|---:|---:|---:|---:|---:|---:|
| 4096 | 4096 | 1024 | 21.00 | 17.18 | 5.25 | 21.47 | 30.00 | 0.72 |""",
    )


def test_roofline_refuses_a_table_without_ceilings(tmp_path):
    table = tmp_path / "linear.csv"
    table.write_text("\n".join(ROOFLINE.splitlines()[2:]))
    with pytest.raises(ValueError, match="roofline: expected a table with a line"):
        bench_roofline.page(table)


def test_decode_refuses_zero_points_of_a_layout_that_has_none():
    with pytest.raises(ValueError, match="expected --layout marlin24 without --zero-points"):
        bench_decode.main(["--layout", "marlin24", "--zero-points", "--device", "cpu"])


def test_roofline_is_for_a_gpu(monkeypatch):
    for found, given in (("cpu", "a machine without one"), ("cuda", "--device cpu")):
        monkeypatch.setattr(bench_roofline.bench_linear, "choose_device", lambda _, d=found: d)
        with pytest.raises(ValueError, match=f"expected a GPU, got {given}.*give --table"):
            bench_roofline.main(["--device", "cpu"] if found == "cuda" else [])


def test_a_csv_of_something_else_is_refused_by_its_name(tmp_path):
    table = tmp_path / "other.csv"
    table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other.csv: expected the CSV .* got a, b; give another"):
        bench_roofline.page(table)


@pytest.mark.parametrize("zero_points", [False, True])
def test_random_weights_keep_the_size_of_what_goes_through(zero_points):
    weights = decode_model.RandomWeights(torch.bfloat16, 32, zero_points, "none")
    first, second = weights.weight(256, 1024), weights.weight(256, 1024)
    nbytes = decode_model.weight_bytes(256, 1024, 32, zero_points)
    for weight in (first, second):
        parts = [
            part for part in (weight.qdata, weight.scale, weight.zero_point) if part is not None
        ]
        assert sum(part.nbytes for part in parts) == nbytes
        y = torch.randn(64, 1024) @ weight.dequantize().T
        assert 0.8 < float(y.std()) < 1.25
    assert not torch.equal(first.qdata, second.qdata)
    assert first.qdata.data_ptr() != second.qdata.data_ptr()


TABLE = """\
# a machine
# command: bench_linear.py
kernel,M,N,K,group_size,us_median,zero_points,light_fraction,bus_fraction
w4a16,1,64,32,32,1.00,1,0.900,0.880
w4a16,32,64,32,32,2.00,1,0.500,0.400
w4a8,1,64,32,128,WRONG,0,,
cublas_fp16,1,64,32,,9.00,,0.800,0.700
cublas_fp16,32,64,32,,9.00,,0.800,0.700
w4a16,1,96,32,32,1.00,1,0.700,0.600
"""


def test_a_table_in_markdown(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text(TABLE)
    text = shipped_script("benchmarks/linear_table").markdown(table)
    assert text.startswith("# Linear on a GPU\n\n- a machine\n- command: bench_linear.py\n")
    assert_expected_inline(
        text[text.index("##") :],
        """\
## N = 64, K = 32

| M = | 1 | 32 |
|---|---:|---:|
| w4a16 g32 z | 1.0 (0.88) | 2.0 (4.50x) |
| w4a8 g128 | WRONG |  |
| cublas_fp16 | 9.0 (0.70) | 9.0 |

## N = 96, K = 32

| M = | 1 |
|---|---:|
| w4a16 g32 z | 1.0 (0.60) |
""",
    )


def test_a_plot_is_a_picture_or_says_what_is_missing(tmp_path):
    table, picture = tmp_path / "t.csv", tmp_path / "t.png"
    table.write_text(TABLE)
    notes, rows = plot_linear.read(table)
    assert notes[0] == "a machine" and [row["us_median"] for row in rows].count("WRONG") == 0
    assert {plot_linear.label(row) for row in rows} == {"w4a16 g32 z", "cublas_fp16"}
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ImportError, match="expected matplotlib"):
            plot_linear.draw(table, picture)
        return
    plot_linear.draw(table, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_plot_of_something_else_is_refused(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("kernel,M\nw4a16,1\n")
    with pytest.raises(ValueError, match="expected the CSV of `cuda-int4 bench linear"):
        plot_linear.read(table)


def test_bench_without_matplotlib_says_so_before_it_measures(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_expected_inline(
        folded(message(plot_linear.require_matplotlib, error=ImportError)),
        """\
plot: expected matplotlib, which is not installed; pip install matplotlib, or pip install
    'executorch-cuda-int4[bench]'""",
    )


def test_gemlite_is_left_out_unless_it_is_asked_for(monkeypatch, capsys):
    linear_cuda = shipped_script("benchmarks/linear_cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "gemlite" not in linear_cuda.kernels_here(None)
    assert "left out" in capsys.readouterr().err
    assert linear_cuda.kernels_here(["w4a16"]) == ["w4a16"]
    with pytest.raises(ImportError, match="pip install gemlite"):
        linear_cuda.kernels_here(["w4a16", "gemlite"])


def test_kernels_of_2_4_weights_alone_need_weights_without_zero_points(monkeypatch):
    monkeypatch.setattr(bench_linear, "choose_device", lambda asked: "cuda")
    options = ["--device", "cuda", "--kernel", "marlin24", "--zero-points", "yes"]
    with pytest.raises(ValueError, match="expected --zero-points no or both with marlin24"):
        bench_linear.main(options)


@pytest.mark.parametrize(
    ("main", "options", "words"),
    [
        (bench_linear, ["--device", "cpu", "--kernel", "tinygemm"], "expected kernels of the cpu"),
        (bench_linear, ["--device", "cpu", "--plot", "x.png"], "--plot draws a GPU's results"),
        (bench_decode, ["--new-tokens", "4"], "expected --new-tokens of at least 6, got 4"),
    ],
)
def test_options_that_do_not_fit_are_refused(main, options, words):
    with pytest.raises(ValueError, match=words):
        main.main(options)


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--device cuda needs a torch with CUDA and a GPU"):
        bench_linear.main(["--device", "cuda"])
