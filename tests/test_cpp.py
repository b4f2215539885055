"""The C++ tests (tests/cpp), built against the installed package as a user's project would be."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest

import cuda_int4
import delegate_models as models
import forged
import language_models
from cuda_int4 import _native
from delegate_models import make, rows

SOURCE = Path(__file__).parent / "cpp"


def run(*command, **options) -> subprocess.CompletedProcess:
    options = {"check": True, "timeout": 300, **options}
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, errors="replace", **options
    )


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """The folder of the built programs."""
    build = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={_native.package_dir()}"
    try:
        run("cmake", "-S", SOURCE, "-B", build, "-G", "Ninja", prefix)
        run("cmake", "--build", build)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"{error.cmd}:\n{error.stdout}\n{error.stderr}")
    return build


def test_unit(programs):
    found = run(programs / "unit", check=False)
    assert found.returncode == 0, found.stderr[-4000:]


def test_ctypes_mirrors_the_structs(programs):
    mirrors = {
        "TensorView": _native.TensorView,
        "LinearArgs": _native.LinearArgs,
        "AttentionArgs": _native.AttentionArgs,
        "RmsNormArgs": _native.RmsNormArgs,
        "SiluArgs": _native.SiluArgs,
        "SampleRow": _native.SampleRow,
        "SampleArgs": _native.SampleArgs,
        "cuda_int4_model_options": _native.ModelOptions,
        "cuda_int4_device_use": _native.DeviceUse,
        "cuda_int4_generate_config": _native.GenerateConfig,
        "cuda_int4_generate_stats": _native.GenerateStats,
        "cuda_int4_generate_request": _native.GenerateRequest,
        "cuda_int4_decode_info": _native.DecodeInfo,
    }
    found = dict(line.split(" ", 1) for line in run(programs / "structs").stdout.splitlines())
    for name, mirror in mirrors.items():
        last = getattr(mirror, mirror._fields_[-1][0])
        assert found[name] == f"{ctypes.sizeof(mirror)} {last.offset}", name


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return language_models.export_toy_llama(tmp_path_factory.mktemp("llama") / "model.pte")


def test_tokens_equal_eager_and_steps_allocate_nothing(programs, llama):
    first, second, allocations = run(programs / "run", llama).stdout.splitlines()
    expected = language_models.greedy(language_models.toy_llama(), [3, 1, 4, 1, 5], 10)
    assert [int(token) for token in first.split()] == expected
    assert second == first
    assert allocations == "allocations 0"


def test_the_decoder_of_the_public_headers(programs, llama):
    prompt = [3, 1, 4, 1, 5]
    found = run(programs / "decode", llama, ",".join(map(str, prompt)), 12, check=False)
    assert found.returncode == 0, found.stderr
    expected = language_models.greedy(language_models.toy_llama(), prompt, 12)
    assert [int(token) for token in found.stdout.split()] == expected


def test_an_etdump_has_every_op(programs, llama, tmp_path):
    from executorch.devtools import Inspector

    found = run(programs / "trace", llama, "cpu", tmp_path / "dump.etdp")
    assert len(found.stdout.split()) == 2
    blocks = Inspector(etdump_path=str(tmp_path / "dump.etdp")).event_blocks
    counts = {
        event.name: len(event.perf_data.raw)
        for block in blocks
        for event in block.events
        if event.is_delegated_op
    }
    assert counts["cuda_int4::linear.out"] == counts["cuda_int4::attention.out"] == 2  # calls


@pytest.fixture(scope="module")
def forge(tmp_path_factory):
    return forged.Forge(tmp_path_factory.mktemp("forged"), make(models.Linear()), (rows(3),))


def refusals(programs, *paths) -> dict[str, tuple[int, str]]:
    lines = run(programs / "refuse", *paths).stdout.splitlines()
    return {loader: (int(code), reason) for loader, code, reason in (x.split("\t") for x in lines)}


def test_a_good_file_is_not_refused(programs, forge):
    found = refusals(programs, forge.path)
    assert found == {"model": (0, ""), "module": (0, ""), "c": (0, "")}


@pytest.mark.parametrize("case", forged.REFUSALS, ids=str)
def test_refused_with_its_code_and_reason(programs, forge, case):
    found = refusals(programs, forge.change(case.changed))
    assert set(found) == {"model", "module", "c"}
    for loader, (code, reason) in found.items():
        assert code == case.code, loader
        for words in case.words:
            assert words in reason, loader


def test_files_that_are_refused_as_a_whole(programs, forge, tmp_path):
    data = forge.path.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    cases = {
        "truncated.pte": (data[:-100], forged.INVALID_PROGRAM, "truncated or damaged"),
        "flipped.pte": (bytes(flipped), forged.INVALID_PROGRAM, "expected checksum"),
        "empty.pte": (b"", 0x22, "an empty file"),
    }
    for name, (content, code, words) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        found = refusals(programs, path)
        for loader in ("model", "c"):
            assert found[loader][0] == code and words in found[loader][1]


def test_a_ptd_of_another_export(programs, tmp_path):
    one, two = (
        models.write(
            make(models.Linear(), seed), tmp_path / f"{seed}.pte", (rows(3),), external_weights=True
        )
        for seed in (1, 2)
    )
    assert refusals(programs, one, one.with_suffix(".ptd"))["module"] == (0, "")
    for code, reason in refusals(programs, one, two.with_suffix(".ptd")).values():
        assert code == forged.INVALID_EXTERNAL_DATA and "found no such key" in reason
    assert cuda_int4.load(one, one.with_suffix(".ptd")).methods == ("forward",)
