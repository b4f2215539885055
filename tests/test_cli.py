"""The command cuda-int4: what it prints, where, and its exit codes."""

import csv
import json
import re
import subprocess
import sys
import textwrap

import pytest

import cuda_int4
from cuda_int4.cli import SUBCOMMANDS, main

SCRIPT = """
import torch
from torch import nn


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 8)), (torch.randn(2, 64),)


def dynamic():
    model, example = make()
    return {
        "model": model,
        "example_inputs": example,
        "dynamic_shapes": ({0: torch.export.Dim("batch", max=64)},),
        "constant_methods": {"get_answer": 42},
    }


def wrong():
    return {"model": 1, "weights": 2}


constant = 3
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "my_model.py"
    path.write_text(SCRIPT)
    return path


def run(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cuda_int4.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("command", SUBCOMMANDS)
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: cuda-int4 {command}") and len(shown.splitlines()) > 8


def test_without_a_command_it_lists_them(capsys):
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"    {command}" in shown for command in SUBCOMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cuda-int4 {cuda_int4.__version__}\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("model", "expected FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION, got 'model'"),
        ("none.py:make", "none.py: no such file"),
        ("no_such_package:make", "No module named 'no_such_package'; write FILE.py:FUNCTION"),
        ("{script}:missing", "has no function 'missing'"),
        ("{script}:constant", "has no function 'constant'"),
        ("{script}:wrong", "got ['model', 'weights']"),
    ],
)
def test_a_source_that_cannot_be_exported(source, reason, script, tmp_path):
    out = tmp_path / "m.pte"
    done = run("export", source.format(script=script), "-o", out)
    assert done.returncode == 1 and done.stderr.startswith("cuda-int4 export: ")
    assert reason in done.stderr
    assert not out.exists() and not done.stdout


def test_a_wrong_command_line_is_exit_code_2(script, tmp_path):
    for args in (
        ["export", script],
        ["inspect"],
        ["nothing"],
        ["bench", "linear", "--shape", "4096"],
    ):
        done = run(*args)
        assert done.returncode == 2 and "usage:" in done.stderr, done


def test_export_then_inspect(script, tmp_path):
    out = tmp_path / "m.pte"
    done = run("export", f"{script}:dynamic", "-o", out, "--group-size", 32, "--asymmetric")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.startswith(f"{out}: 2 int4 weights, 0.0 MB")

    text = run("inspect", out)
    assert text.returncode == 0 and text.stderr == ""
    expected = """\
        SIZE, sealed
          get_answer: 42

        int4 weights: 2, 0.00 MB
          name      N   padded_N  K  group_size  layout_tag    activation  nbytes  bits_per_weight
          0.weight  32        32  64          32  coalesced.v1  none          1536            6.000
          2.weight   8         8  32          32  coalesced.v1  none           192            6.000

        ops in the delegate:
          calls  op
              1  cuda_int4::gelu.out
              2  cuda_int4::linear.out

        on cpu: every op

        outside the delegate: nothing
        """
    shown = re.sub(r"^.*: [0-9.]+ MB,", "SIZE,", text.stdout, count=1)
    shown = (
        "\n".join(line for line in shown.splitlines() if not re.search("sym_size|on cuda", line))
        + "\n"
    )
    assert shown.split() == textwrap.dedent(expected).split()
    assert json.loads(run("inspect", out, "--json").stdout) == cuda_int4.inspect(out)


def test_inspect_names_what_is_wrong(tmp_path):
    path = tmp_path / "no.pte"
    path.write_bytes(b"nothing of the kind" * 20)
    done = run("inspect", path)
    assert done.returncode == 1 and "expected an ExecuTorch program" in done.stderr


def test_bench_writes_a_table_of_checked_kernels():
    options = "--shape 64,128 --rows 1 5 --group-size 32 --turns 1 --rotate-mb 1"
    done = run("bench", "linear", *options.split(), "--kernel", "w4a16", "w4a8", "torch_fp32")
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.startswith("kernel,M,N,K,group_size,us_p10,us_median,us_p90,GB_per_s")
    assert len(rows) == 6 and not any("WRONG" in row for row in rows)


@pytest.mark.parametrize("model", ["toy-llama", "toy-gemma"])
def test_bench_decodes_from_a_model_that_it_exports(model, tmp_path):
    out = tmp_path / "rows.csv"
    options = "--device cpu --context 20 --prefill 8 --new-tokens 8 --runs 2"
    options += " --prompt 8 --generate 6 --repeat 2 --profile --out"
    done = run("bench", "decode", "--model", model, *options.split(), out)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(line for line in out.open() if not line.startswith("#")))
    phases = [(row["phase"], row["context"]) for row in rows]
    others = [("decode", "20"), ("step of 16", "20")]
    assert phases == [("prefill", "8"), ("generate 6", "8"), *others]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    text = out.with_suffix(".md").read_text()
    assert text in done.stdout
    assert "## a token behind 20" in text and "## a prompt of 8" in text
    table = out.with_suffix(".profile.csv").open()
    titles = {row["call"] for row in csv.DictReader(line for line in table if line[0] != "#")}
    assert titles == {"a token behind 20", "a prompt of 8"}


def test_the_demo_agrees_with_pytorch(tmp_path):
    done = run("demo", "--check", 80, "--max-new", 24, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "class Stack:\n    def __init__(self" in done.stdout
    table = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for cells in (line.strip("│┃").split("│") for line in done.stdout.splitlines())
        if len(cells) == 3
    }
    assert table["same token as PyTorch"][0] == "80 of 80"
    assert table["greedy bytes as in PyTorch"][0] == "24 of 24"
    assert float(table["greatest difference of a logit"][0]) < 1e-3
    assert {path.name for path in tmp_path.iterdir()} == {
        "byte_llama_w4a16.pte",
        "byte_llama_w4a8.pte",
    }
