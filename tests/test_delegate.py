"""A .pte gives what eager gives, whatever its inputs and outputs are, here and in ExecuTorch."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import cuda_int4
import delegate_models as models
import language_models
from cuda_int4 import _native
from cuda_int4._native import CudaInt4Error
from cuda_int4.model import explained
from delegate_models import dim, make, rows, write

NO_CUDA = "built without nvcc|expected a CUDA driver with a GPU, none answers here"
without_gpu = pytest.mark.skipif(
    _native.library().cuda_available() == 1, reason="this machine has a GPU"
)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    model = make(models.Linear())
    path = tmp_path_factory.mktemp("linear") / "model.pte"
    return model, write(model, path, (rows(3),), ({0: dim()},))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    model = make(models.Cache())
    path = tmp_path_factory.mktemp("cache") / "model.pte"
    shapes = ({0: dim()}, {0: dim()})
    return write(model, path, (rows(3), torch.arange(3)), shapes)


@pytest.fixture
def stock():
    """executorch.runtime with our delegate in it."""
    cuda_int4.load_runtime()
    from executorch.runtime import Runtime

    return Runtime.get()


def assert_same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_lengths_up_and_down(linear):
    model, path = linear
    loaded = cuda_int4.load(path)
    for n in (3, 16, 1, 7, 16, 3):
        (y,) = loaded.forward(rows(n))
        assert_same(y, model(rows(n)))


def test_lengths_up_and_down_in_executorch(linear, stock):
    model, path = linear
    method = stock.load_program(path).load_method("forward")
    for n in (3, 16, 1, 7, 16, 3):
        (y,) = method.execute([rows(n)])
        assert_same(y, model(rows(n)))


def test_outputs_are_copies(linear):
    model, path = linear
    loaded = cuda_int4.load(path)
    (first,) = loaded.forward(rows(3))
    loaded.forward(rows(3, seed=2))
    loaded.close()
    assert_same(first, model(rows(3)))


def check_many_outputs(model, run):
    for n in (2, 16, 1):
        x = rows(n)
        found, expected = run(x), model(x)
        assert len(found) == len(expected)
        for y, exact in zip(found, expected, strict=True):
            if isinstance(exact, torch.Tensor):
                assert_same(y, exact)
            else:
                assert int(y) == exact


def test_outputs_that_are_inputs_views_constants_and_numbers(tmp_path, stock):
    model = make(models.ManyOutputs())
    path = write(model, tmp_path / "model.pte", (rows(3),), ({0: dim()},))
    check_many_outputs(model, cuda_int4.load(path).forward)
    method = stock.load_program(path).load_method("forward")
    check_many_outputs(model, lambda x: method.execute([x]))


class ViewsAConstant(models.Offset):
    """y = linear(x) plus the sums of the constant's halves."""

    def forward(self, x):
        return self.proj(x) + self.offset.view(2, 24).sum(1).view(2, 1).expand(2, 24).reshape(48)


def test_views_of_a_constant(tmp_path):
    model = make(ViewsAConstant())
    path = write(model, tmp_path / "model.pte", (rows(3),), ({0: dim()},))
    assert_same(cuda_int4.load(path).forward(rows(5))[0], model(rows(5)))


def test_sizes_as_ints(tmp_path, stock):
    model = make(models.TakesInt())
    inputs = rows(4), torch.zeros(3)
    path = write(model, tmp_path / "model.pte", inputs, (None, {0: dim(most=4)}))
    loaded = cuda_int4.load(path)
    method = stock.load_program(path).load_method("forward")
    for n in (3, 1, 4, 2):
        inputs = rows(4), torch.zeros(n)
        assert_same(loaded.forward(*inputs)[0], model(*inputs))
        assert_same(method.execute(list(inputs))[0], model(*inputs))


def sums(run, calls=((3, 0), (1, 3), (8, 4))):
    """What Cache gives over a conversation of (rows, position)."""
    results = []
    for n, start in calls:
        results.append(run(rows(n, seed=start), torch.arange(start, start + n))[0].clone())
    return results


def assert_all_same(found, expected):
    for y, exact in zip(found, expected, strict=True):
        assert_same(y, exact)


def test_a_cache_lives_from_call_to_call_and_starts_as_zeros(cache, stock):
    model = make(models.Cache())
    expected = sums(lambda *inputs: [model(*inputs)])
    loaded = cuda_int4.load(cache)
    assert_all_same(sums(loaded.forward), expected)
    loaded.reset()
    assert_all_same(sums(loaded.forward), expected)
    method = stock.load_program(cache).load_method("forward")
    assert_all_same(sums(lambda *inputs: method.execute(list(inputs))), expected)


def test_two_models_of_one_file_share_no_state(cache):
    one, two = cuda_int4.load(cache), cuda_int4.load(cache)
    expected = sums(one.forward)
    assert_all_same(sums(two.forward), expected)


def test_a_reset_empties_caches_that_another_copy_of_the_library_holds(cache, tmp_path):
    copy = tmp_path / "libcuda_int4_copy.so"
    shutil.copy(_native.library()._name, copy)
    code = (
        "import ctypes, sys, torch; sys.path.insert(0, sys.argv[1]);"
        "from cuda_int4 import _native; _native._load_executorch(); ctypes.CDLL(sys.argv[2]);"
        "import cuda_int4, test_delegate as t; loaded = cuda_int4.load(sys.argv[3]);"
        "expected = t.sums(loaded.forward); loaded.reset();"
        "t.assert_all_same(t.sums(loaded.forward), expected)"
    )
    command = [sys.executable, "-c", code, Path(__file__).parent, copy, cache]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr[-2000:]


def test_two_threads_with_a_model_each(cache):
    expected = sums(cuda_int4.load(cache).forward)
    failures = []

    def work():
        try:
            loaded = cuda_int4.load(cache)
            for _ in range(20):
                assert_all_same(sums(loaded.forward), expected)
                loaded.reset()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_nodes_outside_the_delegate_run_on_executorch(tmp_path, stock):
    model = make(models.Hybrid())
    path = write(model, tmp_path / "model.pte", (rows(5),))
    expected = model(rows(5))
    loaded = cuda_int4.load(path)
    torch.testing.assert_close(loaded.forward(rows(5))[0], expected, rtol=1e-4, atol=1e-3)
    loaded.reset()
    torch.testing.assert_close(loaded.forward(rows(5))[0], expected, rtol=1e-4, atol=1e-3)
    found = stock.load_program(path).load_method("forward").execute([rows(5)])[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, dtype):
    torch.manual_seed(0)
    model = models.Linear().to(dtype)
    model = make(model)
    x = rows(3).to(dtype)
    path = write(model, tmp_path / "model.pte", (x,), ({0: dim()},))
    (y,) = cuda_int4.load(path).forward(x)
    assert y.dtype == dtype and torch.equal(y, model(x))


def test_weights_in_a_file_of_their_own(tmp_path):
    model = make(models.Linear())
    path = write(model, tmp_path / "model.pte", (rows(3),), external_weights=True)
    loaded = cuda_int4.load(path, path.with_suffix(".ptd"))
    assert_same(loaded.forward(rows(3))[0], model(rows(3)))
    unverified = cuda_int4.load(path, path.with_suffix(".ptd"), verify=False)
    assert_same(unverified.forward(rows(3))[0], model(rows(3)))


def test_a_file_that_the_plain_calls_wrote_has_no_seal_and_runs(tmp_path):
    from executorch.exir import to_edge_transform_and_lower

    model = make(models.Linear())
    cuda_int4.prepare_(model)
    exported = torch.export.export(model, (rows(3),))
    partitioner = [cuda_int4.CudaInt4Partitioner()]
    edge = to_edge_transform_and_lower(exported, partitioner=partitioner)
    path = tmp_path / "plain.pte"
    path.write_bytes(edge.to_executorch().buffer)
    assert_same(cuda_int4.load(path).forward(rows(3))[0], model(rows(3)))


def test_inputs_are_checked(linear):
    _, path = linear
    loaded = cuda_int4.load(path)
    cases = [
        ((), "expected 1 inputs, got 0"),
        ((rows(3).double(),), "input 0: expected dtype float32, got float64"),
        ((rows(17),), r"input 0: expected sizes it was exported for \(at most \[16, 64\]\)"),
        ((rows(3)[0],), r"input 0: expected 2 dimensions \(at most \[16, 64\]\), got \[64\]"),
        ((rows(3)[:, :32],), r"got \[3, 32\]"),
        ((3,), "input 0: expected dtype float32, got int64"),
    ]
    for inputs, expected in cases:
        with pytest.raises(CudaInt4Error, match=expected):
            loaded.forward(*inputs)
    loaded.forward(rows(3))  # and it still runs


def test_a_kernel_that_refuses_is_named(cache, tmp_path):
    past_the_end = torch.tensor([16])
    with pytest.raises(CudaInt4Error, match="program: cuda_int4::index_put_ refused .*Argument"):
        cuda_int4.load(cache).forward(rows(1), past_the_end)
    history = language_models.HistoryModel(context=16)
    path = language_models.export_plain(history, tmp_path / "plain.pte")
    with pytest.raises(CudaInt4Error, match="forward: aten::index_put.* outside CudaInt4Backend"):
        cuda_int4.load(path).forward(torch.tensor([[1]]), past_the_end)


def test_no_rows(linear):
    model, path = linear
    loaded = cuda_int4.load(path)
    for x in (torch.empty(0, models.K), rows(3), rows(3)[:0]):
        assert_same(loaded.forward(x)[0], model(x))


def test_an_input_in_the_memory_of_an_output_is_refused(tmp_path):
    model = make(models.ManyOutputs())
    loaded = cuda_int4.load(write(model, tmp_path / "model.pte", (rows(3),), ({0: dim()},)))
    x, view = rows(3), _native.TensorView()
    for _ in range(2):  # its first output is x: the same x again is no mistake
        loaded.forward(x)
    _native.check(_native.library().model_output(loaded.handle, 1, view))
    with pytest.raises(CudaInt4Error, match="input 0: .* that of output 1, .*; pass a copy"):
        _native.check(
            _native.library().model_forward(loaded.handle, b"forward", view, 1, ctypes.c_uint64())
        )
    assert_same(loaded.forward(x)[1], model(x)[1])


def test_strided_inputs_are_made_contiguous(linear):
    model, path = linear
    x = rows(128)[:64].T[:5]
    assert not x.is_contiguous()
    assert_same(cuda_int4.load(path).forward(x)[0], model(x))


def test_a_closed_model_says_so(linear):
    with cuda_int4.load(linear[1]) as loaded:
        assert loaded.methods == ("forward",)
    with pytest.raises(ValueError, match="expected an open model, got a closed one"):
        loaded.forward(rows(3))
    loaded.close()
    assert "closed" in repr(loaded)


def test_a_model_that_outlives_the_modules_it_needs_goes_without_a_word(linear, monkeypatch):
    loaded = cuda_int4.load(linear[1])
    with monkeypatch.context() as at_exit:  # Python sets what modules hold to None
        for name in ("contextlib", "library"):
            at_exit.setattr(cuda_int4.model, name, None)
        loaded.__del__()
    assert loaded.forward(rows(1))


def test_devices(linear):
    _, path = linear
    assert cuda_int4.load(path, device="cpu").forward(rows(1))
    for name in ("tpu", "cuda:", "cuda:one", "cuda:-1"):
        expected = f'expected "auto", "cpu", "cuda" or "cuda:<index>", got "{name}"'
        with pytest.raises(RuntimeError, match=expected):
            cuda_int4.load(path, device=name)


@without_gpu
def test_cuda_is_refused_where_there_is_none(linear):
    for name in ("cuda", "cuda:1"):
        with pytest.raises(RuntimeError, match=NO_CUDA):
            cuda_int4.load(linear[1], device=name)


def test_what_a_device_has_done(linear):
    loaded = cuda_int4.load(linear[1], device="cpu", cuda_graph=False)
    loaded.forward(rows(1))
    use = loaded.device_use()
    assert use == cuda_int4.model.DeviceUse("cpu", 0, 0, 0, 0.0, 0, 0, 0)
    loaded.close()
    with pytest.raises(ValueError, match="expected an open model"):
        loaded.device_use()


def load_in_a_process(path, **environment):
    code = (
        "import sys; from cuda_int4._native import *; import ctypes; m = ctypes.c_void_p();"
        "check(library().model_open(sys.argv[1].encode(), None, b'auto', 1, ctypes.byref(m)))"
    )
    return subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_environment_takes_the_place_of_auto(linear):
    assert load_in_a_process(linear[1], CUDA_INT4_DEVICE="cpu").returncode == 0
    refused = load_in_a_process(linear[1], CUDA_INT4_DEVICE="tpu")
    assert refused.returncode != 0 and 'got "tpu"' in refused.stderr


def test_auto_says_what_it_chose_once(linear):
    stderr = load_in_a_process(linear[1]).stderr
    assert stderr.count("cuda_int4: device auto:") == 1


@without_gpu
def test_auto_is_the_cpu_without_a_gpu(linear):
    stderr = load_in_a_process(linear[1]).stderr
    assert re.search(
        "device auto: the CPU, because (no CUDA driver|this library was built)", stderr
    )


def test_executorch_errors_get_their_reason(linear, stock):
    _, path = linear
    data = bytearray(path.read_bytes())
    at = data.index(b"CUDAINT4")
    data[at + 40] ^= 1
    damaged = path.with_name("damaged.pte")
    damaged.write_bytes(data)
    with pytest.raises(CudaInt4Error, match="delegate blob: expected checksum"):
        with explained():
            stock.load_program(damaged).load_method("forward")
    with pytest.raises(RuntimeError, match="error 0x10"):  # not ours: left alone
        with explained():
            stock.load_program(path).load_method("forward").execute([rows(17)])
