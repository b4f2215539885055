"""Checks that several sequences decoded in one call are each as if decoded alone, on a GPU.

    python tests/gpu/check_cuda_sequences.py                       # toy models, exported here
    python tests/gpu/check_cuda_sequences.py --fusions none
    python tests/gpu/check_cuda_sequences.py --export FOLDER       # no more than this, without GPU
    python tests/gpu/check_cuda_sequences.py --programs FOLDER     # those

Prompts of different lengths are read together (the shorter ones repeat their last token and its
position) and decoded together, then one by one from the same weights in a program of one sequence.
A row's logits differ from those alone by the order of sums only, since the kernels choose theirs by
the number of rows: they must lie as near as the two programs' on the CPU do, and the tokens be the
same wherever the likeliest two lie further apart than that.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import cuda_int4  # noqa: E402
import decode_model  # noqa: E402
from cuda_int4.model import Model  # noqa: E402

MAX_SEQUENCES, MAX_CONTEXT, MAX_LENGTH = 16, 160, 64
LENGTHS = (3, 40, 1, 17, 64, 9, 33, 2, 5, 16, 31, 48, 7, 12, 25, 50)
N_STEPS = 24
# Of the largest logit. In w4a8 a sum in another order can move an activation by one of 127 steps.
EPS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EPS_W4A8 = 5e-2
n_right = n_wrong = 0


def note(right: bool, what: str) -> None:
    """Count one check."""
    global n_right, n_wrong
    n_right += right
    n_wrong += not right
    if not right:
        print("WRONG", what, flush=True)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is exported."""

    name: str
    dtype: torch.dtype
    activation: str = "none"
    layout: str = "coalesced"

    def export(self, folder: Path, max_sequences: int, fusions: str) -> Path:
        """Write the program of 1 or of MAX_SEQUENCES sequences."""
        model = decode_model.build(
            decode_model.MODELS[self.name],
            max_context=MAX_CONTEXT,
            dtype=self.dtype,
            group_size=32 if self.layout == "coalesced" else 128,
            activation=self.activation,
            layout_tag=f"{self.layout}.v1",
            max_sequences=max_sequences,
        )
        example, free = decode_model.example_call(MAX_LENGTH, max_sequences)
        return cuda_int4.export(
            model,
            example,
            self.path(folder, max_sequences),
            dynamic_shapes=free,
            activation=self.activation,
            constant_methods={
                "get_max_seq_len": MAX_LENGTH,
                "get_max_context_len": MAX_CONTEXT,
                "get_eos_ids": [],
                **({"get_max_batch": max_sequences} if max_sequences > 1 else {}),
            },
            fusions=fusions,
        )

    def path(self, folder: Path, max_sequences: int) -> Path:
        """Of its program."""
        dtype = str(self.dtype).removeprefix("torch.")
        return folder / f"{self.name}-{self.layout}-{self.activation}-{dtype}-{max_sequences}.pte"

    @property
    def eps(self) -> float:
        """How far a row's logits may lie from those alone, of the largest."""
        return EPS_W4A8 if self.activation == "int8" else EPS[self.dtype]

    def __str__(self) -> str:
        """A short name."""
        return f"{self.name} {self.layout} {self.activation} {self.dtype}"


def alone(model: Model, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Tokens and logits [N_STEPS, V] of greedy decoding."""
    model.reset()
    tokens, positions = torch.tensor([prompt]), torch.arange(len(prompt))
    chosen, rows = [], []
    for _ in range(N_STEPS):
        (logits,) = model.forward(tokens, positions)
        rows.append(logits[0])
        chosen.append(int(logits[0].argmax()))
        tokens, positions = torch.tensor([[chosen[-1]]]), positions[-1:] + 1
    return chosen, torch.stack(rows)


def together(model: Model, prompts: list[list[int]], follow: Tensor) -> Tensor:
    """Logits [N_STEPS, B, V]; step i goes on with the tokens ``follow[:, i]`` [B, N_STEPS]."""
    model.reset()
    longest = max(map(len, prompts))
    tokens = torch.tensor([p + p[-1:] * (longest - len(p)) for p in prompts])
    last = torch.tensor([[len(p) - 1] for p in prompts])
    positions = torch.minimum(torch.arange(longest), last)
    rows = []
    for step in range(N_STEPS):
        (logits,) = model.forward(tokens, positions)
        rows.append(logits)
        tokens, positions = follow[:, step : step + 1].clone(), last + 1 + step
    return torch.stack(rows)


def check(case: Case, device: str, folder: Path) -> None:
    """All lengths of batch, each row against itself alone."""
    generator = torch.Generator().manual_seed(0)
    vocab_size = decode_model.MODELS[case.name].vocab_size
    prompts = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in LENGTHS]
    paths = [case.path(folder, n) for n in (1, MAX_SEQUENCES)]
    with cuda_int4.load(paths[0], device=device) as one:
        expected = [alone(one, prompt) for prompt in prompts]
    follow = torch.tensor([tokens for tokens, _ in expected])
    exact = torch.stack([logits for _, logits in expected], 1).double()
    worst = 0.0
    with cuda_int4.load(paths[1], device=device) as many:
        for B in (1, 2, 3, 5, 8, 16):
            rows = [(7 * i + B) % len(prompts) for i in range(B)]  # another order each time
            logits = together(many, [prompts[r] for r in rows], follow[rows]).double()
            difference = (logits - exact[:, rows]).abs()
            size = float(exact[:, rows].abs().max())
            worst = max(worst, float(difference.max()) / size)
            note(bool(logits.isfinite().all()), f"{case}: B {B}: logits that are not finite")
            note(
                float(difference.max()) <= case.eps * size,
                f"{case}: B {B}: logits differ by {float(difference.max()):.3e} of {size:.3e}",
            )
            top = exact[:, rows].topk(2, -1).values
            others = logits.argmax(-1) != exact[:, rows].argmax(-1)
            margin = (top[..., 0] - top[..., 1])[others]
            note(
                bool((margin <= 2 * difference.amax(-1)[others]).all()),
                f"{case}: B {B}: other tokens at margins {margin.tolist()}",
            )
    print(f"{case}: logits differ from those alone by {worst:.2e} of the largest", flush=True)


def main() -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--fusions", default="all")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--export", type=Path, help="write the programs there and end")
    parser.add_argument("--programs", type=Path, help="where --export has written them")
    options = parser.parse_args()
    cases = [
        Case("toy-llama", torch.float32),
        Case("toy-llama", torch.bfloat16),
        Case("toy-gemma", torch.float32),
        Case("toy-gemma", torch.float16),
        Case("toy-llama", torch.float32, "int8"),
        Case("toy-llama", torch.bfloat16, "none", "marlin"),
        Case("toy-llama", torch.bfloat16, "none", "marlin24"),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.programs or options.export or Path(temporary)
        folder.mkdir(exist_ok=True)
        for case in cases:
            if options.only not in str(case):
                continue
            if options.programs is None:
                for n in (1, MAX_SEQUENCES):
                    case.export(folder, n, options.fusions)
            if options.export is None:
                check(case, options.device, folder)
    print(f"{n_right} right, {n_wrong} wrong")
    return int(n_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
