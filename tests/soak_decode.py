"""Decode many tokens in one process and watch its memory.

    python tests/soak_decode.py --tokens 100000
    python tests/soak_decode.py --tokens 100000 --model byte_llama.pte

The cache fills, a new conversation begins, and so on; every second conversation is sampled. After a
tenth of the tokens (two conversations at least) everything has its size: from there on the resident
memory may grow by --slack-mib and the live heap by --slack-kib, and no more. Exit code 1 if it did.
"""

import argparse
import ctypes
import sys
import tempfile
import time
from pathlib import Path


class HeapInfo(ctypes.Structure):
    """glibc's struct mallinfo2; ``uordblks`` are the bytes in use."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


def heap_bytes() -> int:
    """Bytes that malloc has given out and not got back, mapped blocks included."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = HeapInfo
    info = mallinfo2()
    return info.uordblks + info.hblkhd


def resident_bytes() -> int:
    """Resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def main() -> int:
    """Run; 0 if memory stayed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--model", type=Path, help="default: a toy Llama, exported here")
    parser.add_argument("--slack-mib", type=float, default=2.0, help="of resident memory")
    parser.add_argument("--slack-kib", type=float, default=64.0, help="of the live heap")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = args.model
        if path is None:
            from language_models import export_toy_llama

            path = export_toy_llama(Path(folder) / "toy.pte", context=256)
        import cuda_int4
        from cuda_int4.generation import generate_tokens

        model = cuda_int4.load(path)
        n, conversation, start, base = 0, 0, time.perf_counter(), None
        while n < args.tokens:
            options = {"temperature": 0.8, "top_p": 0.9, "seed": conversation}
            generation = generate_tokens(
                model, [1 + conversation % 100] * 7, **(options if conversation % 2 else {})
            )
            n += generation.stats.prompt_tokens + generation.stats.new_tokens
            conversation += 1
            if base is None and n >= args.tokens / 10 and conversation >= 2:
                base = resident_bytes(), heap_bytes()
        assert base is not None
        resident, heap = resident_bytes() - base[0], heap_bytes() - base[1]

    seconds = time.perf_counter() - start
    print(f"{n} tokens in {conversation} conversations, {n / seconds:.0f} tokens/s")
    print(f"resident memory {resident / 2**20:+.2f} MiB to {resident_bytes() / 2**20:.1f} MiB")
    print(f"live heap {heap / 2**10:+.1f} KiB")
    grew = resident > args.slack_mib * 2**20 or heap > args.slack_kib * 2**10
    print("GREW" if grew else "steady")
    return int(grew)


if __name__ == "__main__":
    sys.exit(main())
