"""Damages .pte files by the thousand and runs them: nothing may crash, hang, or give wrong answers.

    python tests/fuzz_pte.py --count 10000          the whole run (test_fuzz.py: a few hundred)
    python tests/fuzz_pte.py --seed 7 --only 1234   one file again; --keep DIR keeps those that fail

Every file goes through ``cuda_int4.load`` and ``forward`` (a worker process each, restarted when it
dies) and through the C++ program ``cuda-int4-decode``. A file passes if each either fails with an
error and a reason, or gives exactly the answer of the undamaged file. Damage by kind:

    sealed     anywhere in a sealed .pte or its .ptd: bits flipped, bytes overwritten, cut off,
               appended, sections swapped, fields of the headers set to extremes
    inside     the same within the delegate blob or the constants of a .pte without a seal; these go
               through stock executorch.runtime too
    forged     fields of the delegate blob set to extremes, every checksum then made right
    unsealed   in ExecuTorch's own program around the delegate or tables of the .ptd, without a
               seal: only crashes and hangs count (--unsealed; no checksum covers those)
    nested     in the nested program, every checksum then made right: another program, of which
               only crashes and hangs count (--nested)

CUDA_INT4_DEVICE says where they run. On a GPU an error of the driver (an address out of range, a
launch that it refuses) counts as a crash, and --under "compute-sanitizer --log-file FILE" has the
worker of ``load`` looked at. --bases DIR keeps the undamaged files, for another machine.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import os
import queue
import random
import selectors
import shlex
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 60
LOADERS = ("load", "decode", "stock")
PROMPT = (3, 1, 4, 1, 5)
EXTREMES = (0, 1, 2, 7, 0x7F, 0x80, 0xFF, *((1 << n) - 1 for n in (31, 32, 40, 63, 64)), 1 << 63)


# ---- the undamaged files ----


@dataclass(frozen=True)
class Base:
    """A good .pte with its .ptd if it has one, and where things lie in it.

    Attributes:
        pte: its bytes, sealed.
        ptd: bytes of the .ptd, sealed; empty where there is none.
        blob: (offset, nbytes) of the delegate blob.
        constants: (offset, nbytes) of each constant in the .pte.
    """

    pte: bytes
    ptd: bytes
    blob: tuple[int, int]
    constants: tuple[tuple[int, int], ...]


def make_base(folder: Path, *, external_weights: bool) -> Base:
    """The toy Llama: int4 linears, cache, every kind of constant. Taken as it is if it is there."""
    import cuda_int4
    import language_models
    from cuda_int4.pte_file import ExecutorchFile

    path = folder / f"base{int(external_weights)}.pte"
    if not path.exists():
        inputs, shapes = language_models.example(16)
        cuda_int4.export(
            language_models.toy_llama(),
            inputs,
            path,
            dynamic_shapes=shapes,
            constant_methods=language_models.constant_methods(64),
            external_weights=external_weights,
        )
    pte = path.read_bytes()
    ptd = path.with_suffix(".ptd").read_bytes() if external_weights else b""
    at = pte.index(b"CUDAINT4")
    (nbytes,) = struct.unpack_from("<Q", pte, at + 16)
    with ExecutorchFile(path) as file:
        views = [bytes(view) for view in file.named_data.values()]
    constants = tuple((pte.index(view), len(view)) for view in views if view)
    return Base(pte, ptd, (at, nbytes), constants)


# ---- damage ----

Damage = Callable[[random.Random, bytearray, int, int], None]  # within data[begin : end]


def flip_bits(rng: random.Random, data: bytearray, begin: int, end: int) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        data[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)


def overwrite(rng: random.Random, data: bytearray, begin: int, end: int) -> None:
    at = rng.randrange(begin, end)
    nbytes = min(rng.choice((1, 4, 8, 64, 1000)), end - at)
    fill = rng.choice((b"\0", b"\xff", None))
    data[at : at + nbytes] = rng.randbytes(nbytes) if fill is None else fill * nbytes


def swap_sections(rng: random.Random, data: bytearray, begin: int, end: int) -> None:
    nbytes = min(rng.choice((4, 16, 128, 4096)), (end - begin) // 2)
    a = rng.randrange(begin, end - 2 * nbytes + 1)
    b = rng.randrange(a + nbytes, end - nbytes + 1)
    data[a : a + nbytes], data[b : b + nbytes] = data[b : b + nbytes], data[a : a + nbytes]


def set_word(rng: random.Random, data: bytearray, begin: int, end: int) -> None:
    form, nbytes = rng.choice((("<I", 4), ("<Q", 8)))
    if end - begin >= nbytes:
        at = begin + rng.randrange(0, end - begin - nbytes + 1) // 4 * 4
        struct.pack_into(form, data, at, rng.choice(EXTREMES) & ((1 << 8 * nbytes) - 1))


IN_PLACE: tuple[Damage, ...] = (flip_bits, flip_bits, overwrite, swap_sections, set_word)


def damage_anywhere(rng: random.Random, data: bytearray) -> None:
    kind = rng.randrange(10)
    if kind == 0:
        del data[rng.randrange(len(data)) :]
    elif kind == 1:
        del data[len(data) - rng.randrange(1, min(len(data), 65)) :]
    elif kind == 2:
        data += rng.randbytes(rng.choice((1, 32, 500)))
    elif kind == 3:  # ExecuTorch's header, or the seal
        begin = rng.choice((0, max(0, len(data) - 32)))
        set_word(rng, data, begin, min(begin + 64, len(data)))
    elif kind == 4:  # a hole
        at = rng.randrange(len(data))
        del data[at : at + rng.choice((1, 16, 128))]
    else:
        rng.choice(IN_PLACE)(rng, data, 0, len(data))


# ---- cases ----


@dataclass(frozen=True)
class Case:
    """One damaged file.

    Attributes:
        kind: "sealed", "inside", "forged", "unsealed" or "nested"; see the module.
        pte: its bytes.
        ptd: bytes of its .ptd, or empty.
    """

    kind: str
    pte: bytes
    ptd: bytes


def make_case(
    index: int, seed: int, bases: tuple[Base, Base], *, unsealed: bool, nested: bool
) -> Case:
    """The damaged file of this number: the same for the same seed, whatever the others are."""
    from cuda_int4 import _native
    from cuda_int4.seal import SEAL_NBYTES

    rng = random.Random(f"{seed}/{index}")
    whole, apart = bases
    if unsealed:
        if rng.randrange(3) == 0:
            offset, nbytes = struct.unpack_from("<QQ", apart.ptd, 16)
            data = bytearray(apart.ptd[:-SEAL_NBYTES])
            rng.choice(IN_PLACE)(rng, data, 0, offset + nbytes)
            return Case("unsealed", apart.pte, bytes(data))
        data = bytearray(whole.pte[:-SEAL_NBYTES])
        (program_nbytes,) = struct.unpack_from("<Q", data, 16)
        rng.choice(IN_PLACE)(rng, data, 0, program_nbytes)
        return Case("unsealed", bytes(data), b"")
    kind = rng.choices(("sealed", "external", "inside", "forged"), (5, 1, 2, 2))[0]
    kind = "nested" if nested else kind
    if kind == "sealed":
        data = bytearray(whole.pte)
        damage_anywhere(rng, data)
        return Case("sealed", bytes(data), b"")
    if kind == "external":
        data = bytearray(apart.ptd)
        damage_anywhere(rng, data)
        return Case("sealed", apart.pte, bytes(data))
    data = bytearray(whole.pte[:-SEAL_NBYTES])
    at, nbytes = whole.blob
    if kind == "inside":
        at, nbytes = rng.choice((whole.blob, rng.choice(whole.constants)))
        rng.choice(IN_PLACE)(rng, data, at, at + nbytes)
        return Case("inside", bytes(data), b"")
    (program_offset,) = struct.unpack_from("<Q", data, at + 24)
    for _ in range(rng.choice((1, 1, 2))):
        if nested:
            rng.choice(IN_PLACE)(rng, data, at + program_offset, at + nbytes)
        else:
            begin = at + (rng.randrange(16, program_offset - 8) & ~3)
            set_word(rng, data, begin, at + program_offset)
    view = memoryview(data)[at + 16 : at + nbytes]
    struct.pack_into("<I", data, at + 12, _native.checksum(bytes(view)))
    return Case(kind, bytes(data), b"")


# ---- what runs them ----


def serve(loader: str) -> None:
    """A worker: reads "pte<TAB>ptd" lines, answers each with a line."""
    import torch

    import cuda_int4

    tokens, positions = torch.tensor([PROMPT]), torch.arange(len(PROMPT))
    if loader == "stock":
        cuda_int4.load_runtime()
        from executorch.runtime import Runtime, Verification

    def answer(pte: str, ptd: str) -> torch.Tensor:
        if loader == "stock":
            program = Runtime.get().load_program(pte, verification=Verification.Minimal)
            method = program.load_method("forward")
            first = method.execute([tokens, positions])[0].clone()
            second = method.execute([tokens[:, :1], positions[-1:] + 1])[0]
        else:
            with cuda_int4.load(pte, ptd or None) as model:
                (first,) = model.forward(tokens, positions)
                (second,) = model.forward(tokens[:, :1], positions[-1:] + 1)
        return torch.cat([first.flatten(), second.flatten()])

    good = None
    for line in sys.stdin:
        try:
            found = answer(*line.rstrip("\n").split("\t"))
        except (RuntimeError, ValueError) as error:
            result = "error " + " ".join(str(error).split())
        else:
            good = found if good is None else good  # the first file is the undamaged one
            same = found.shape == good.shape and torch.equal(found, good)
            result = "same" if same else "WRONG ANSWER"
        print(result, flush=True)


class Worker:
    """A process of :func:`serve`, started again whenever it dies."""

    def __init__(self, loader: str, good: tuple[Path, Path | None], under: str = ""):
        self.loader, self.good, self.under = loader, good, shlex.split(under)
        self.process: subprocess.Popen | None = None
        self.lock = threading.Lock()

    def run(self, pte: Path, ptd: Path | None) -> str:
        with self.lock:
            if self.process is None:
                self.process = subprocess.Popen(
                    [*self.under, sys.executable, __file__, "--serve", self.loader],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
                started = self._ask(*self.good)
                if started != "same":
                    raise RuntimeError(f"{self.loader}: the undamaged file gave: {started}")
            return self._ask(pte, ptd)

    def _ask(self, pte: Path, ptd: Path | None) -> str:
        assert self.process is not None and self.process.stdin and self.process.stdout
        line = b""
        try:
            self.process.stdin.write(f"{pte}\t{ptd or ''}\n".encode())
            self.process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(self.process.stdout, selectors.EVENT_READ)
                hung = not selector.select(TIMEOUT_S)
            line = b"" if hung else self.process.stdout.readline()
        except BrokenPipeError:
            hung = False
        if line:
            return line.decode(errors="replace").strip()
        self.process.kill()
        code = self.process.wait()
        self.process = None
        return "HANG" if hung else f"DIED with {_exit_name(code)}"

    def close(self) -> None:
        if self.process is not None and self.process.stdin:
            self.process.stdin.close()
            self.process.wait(TIMEOUT_S)


class Decode:
    """The C++ program: a process a file."""

    loader = "decode"

    def __init__(self, good: Path):
        from cuda_int4 import _native

        self.program = _native.package_dir() / "bin" / "cuda-int4-decode"
        self.good = self._output(good)
        if self.good[0] != 0:
            raise RuntimeError(f"decode: the undamaged file gave: {self.good}")

    def _output(self, pte: Path) -> tuple[int, str, str]:
        tokens = ",".join(map(str, PROMPT))
        command = [self.program, pte, "--tokens", tokens, "--max-new", "3"]
        found = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S
        )
        return found.returncode, found.stdout, found.stderr

    def run(self, pte: Path, ptd: Path | None) -> str:
        if ptd is not None:
            return "skipped"  # the program takes a .pte alone
        try:
            code, out, err = self._output(pte)
        except subprocess.TimeoutExpired:
            return "HANG"
        if code < 0 or code > 1:
            return f"DIED with {_exit_name(code)}"
        if code == 1:
            return "error " + " ".join(err.split()) if err.strip() else "ERROR WITHOUT REASON"
        return "same" if out == self.good[1] else "WRONG ANSWER"

    def close(self) -> None:
        """Nothing runs on."""


def _exit_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


@dataclass(frozen=True)
class Failure:
    """A file that did not pass."""

    index: int
    kind: str
    loader: str
    result: str

    def __str__(self) -> str:
        return f"file {self.index} ({self.kind}) through {self.loader}: {self.result}"


def is_failure(kind: str, result: str) -> bool:
    """Whether a result breaks the promise."""
    if kind in ("unsealed", "nested") and result == "WRONG ANSWER":
        return False
    refused = result.startswith("error ") and "cudaError" not in result
    return not (refused or result in ("same", "skipped"))


def fuzz(
    indices: range,
    *,
    seed: int = 0,
    unsealed: bool = False,
    nested: bool = False,
    keep: Path | None = None,
    bases: Path | None = None,
    loaders: tuple[str, ...] = LOADERS,
    under: str = "",
    jobs: int = 2,
    report: Callable[[int, collections.Counter], None] | None = None,
) -> tuple[list[Failure], collections.Counter]:
    """Damage and run the files of these numbers; returns failures and counts of results."""
    failures: list[Failure] = []
    counts: collections.Counter = collections.Counter()
    shared_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shared_memory) as folder_name:
        folder = Path(folder_name)
        from_folder = bases or folder
        from_folder.mkdir(parents=True, exist_ok=True)
        whole, apart = (make_base(from_folder, external_weights=e) for e in (False, True))
        good = from_folder / "base0.pte"
        workers: queue.SimpleQueue[dict[str, Worker | Decode]] = queue.SimpleQueue()
        decode = Decode(good)
        started: list[dict[str, Worker | Decode]] = [
            {
                "load": Worker("load", (good, None), under),
                "decode": decode,
                "stock": Worker("stock", (good, None)),
            }
            for _ in range(jobs)
        ]
        for runners in started:
            workers.put(runners)

        def run_one(index: int) -> Iterator[Failure]:
            case = make_case(index, seed, (whole, apart), unsealed=unsealed, nested=nested)
            pte, ptd = folder / f"{index}.pte", folder / f"{index}.ptd"
            pte.write_bytes(case.pte)
            if case.ptd:
                ptd.write_bytes(case.ptd)
            runners = workers.get()
            try:
                for loader in loaders:
                    if loader == "stock" and case.kind not in ("inside", "forged"):
                        continue
                    result = runners[loader].run(pte, ptd if case.ptd else None)
                    counts[case.kind, loader, result.split(" ", 1)[0]] += 1
                    if is_failure(case.kind, result):
                        if keep is not None:
                            keep.mkdir(parents=True, exist_ok=True)
                            (keep / pte.name).write_bytes(case.pte)
                            if case.ptd:
                                (keep / ptd.name).write_bytes(case.ptd)
                        yield Failure(index, case.kind, loader, result)
            finally:
                workers.put(runners)
                pte.unlink()
                ptd.unlink(missing_ok=True)

        try:
            with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
                done = pool.map(lambda index: list(run_one(index)), indices)
                for n, found in enumerate(done, 1):
                    failures += found
                    if report is not None and n % 100 == 0:
                        report(n, counts)
        finally:
            for runners in started:
                for runner in runners.values():
                    runner.close()
    return failures, counts


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=300, help="files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    parser.add_argument("--only", type=int, help="run this one file")
    parser.add_argument("--unsealed", action="store_true", help="damage ExecuTorch's own program")
    parser.add_argument("--nested", action="store_true", help="damage the nested program")
    parser.add_argument("--keep", type=Path, help="keep the files that fail here")
    parser.add_argument("--bases", type=Path, help="the undamaged files; made where missing")
    parser.add_argument("--loaders", nargs="+", choices=LOADERS, default=LOADERS)
    parser.add_argument("--under", default="", help="command to run the worker of load under")
    parser.add_argument("--jobs", type=int, default=2, help="files at once (default: %(default)s)")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return 0

    def report(n: int, counts: collections.Counter) -> None:
        print(f"\r{n} files", end="", file=sys.stderr, flush=True)

    indices = range(args.count) if args.only is None else range(args.only, args.only + 1)
    failures, counts = fuzz(
        indices,
        seed=args.seed,
        unsealed=args.unsealed,
        nested=args.nested,
        keep=args.keep,
        bases=args.bases,
        loaders=tuple(args.loaders),
        under=args.under,
        jobs=args.jobs,
        report=report,
    )
    print(file=sys.stderr)
    for (kind, loader, result), n in sorted(counts.items()):
        print(f"{kind:9} {loader:7} {result:6} {n}")
    for failure in failures:
        print(failure)
    print(f"{len(indices)} files, {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
