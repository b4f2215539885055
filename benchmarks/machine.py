"""What a result says of where it was measured."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from cuda_int4 import _native


def choose_device(asked: str) -> str:
    """Resolve "auto", and check that "cuda" is there.

    Raises:
        ValueError: there is no GPU, or this torch or library was built without CUDA.
    """
    missing = [
        what
        for what, there in (
            ("a torch with CUDA and a GPU", torch.cuda.is_available()),
            ("a libcuda_int4 with CUDA kernels", bool(_native.library().cuda_available())),
        )
        if not there
    ]
    if asked == "cuda" and missing:
        raise ValueError(f"bench: --device cuda needs {' and '.join(missing)}; use --device cpu")
    return "cpu" if asked == "cpu" or missing else "cuda"


def cpu_name() -> str:
    """As /proc/cpuinfo has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "cpu"
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), "cpu")


def command_line() -> str:
    """What was typed, files without their folders."""
    return shlex.join(Path(word).name if os.path.isabs(word) else word for word in sys.argv)


def driver_version() -> str:
    """Of the NVIDIA driver, as nvidia-smi has it; "unknown" where that does not answer."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (answer.stdout.split() or ["unknown"])[0]


def last_level_cache_bytes() -> int:
    """Of CPU 0; 32 MiB where the system does not say."""
    sizes = [32 << 20]
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = index.read_text().strip()
        sizes.append(int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0))
    return max(sizes)


def commit_id() -> str:
    """Short hash of the checkout, "+" behind it if files differ; empty outside of git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        status = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if status.stdout.strip() else "")
