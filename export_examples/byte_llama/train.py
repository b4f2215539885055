"""Train the byte Llama on the Python standard library's own source, within a number of minutes.

    python train.py --minutes 7.5 --output .                     # one H200
    python train.py --source /path/to/cpython/Lib --minutes 7.5  # another Python's library

Writes ``byte_llama.safetensors`` (bfloat16) and ``byte_llama.json`` (sizes, figures, samples) into
``--output``, twice a minute and at the end. The learning rate follows the clock: a short warm-up, a
plateau, then a straight line to zero that ends when the minutes do. Matrices of the layers are
trained by Muon (muon.py), the rest by AdamW; the library is read dozens of times, hence weight decay
and a little dropout. Bits per byte are those of the held-out files (corpus.py). On a CPU,
``--batch 2 --context 128 --minutes 0.3 --dim 64`` shows that the script works.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import documents, standard_library, stream
from model import ByteLlama, Config
from muon import Muon
from safetensors.torch import save_file
from torch import Tensor

START = time.monotonic()
PROMPTS = [
    b"",
    b'def read_config(path):\n    """',
    b"class Stack:\n",
    b"import os\nimport sys\n\n\ndef main(",
]


def windows(data: Tensor, batch: int, context: int) -> Iterator[Tensor]:
    """Yield batches [batch, context + 1] for ever; each epoch cuts ``data`` at another phase and shuffles the cuts."""
    reach = torch.arange(context + 1, device=data.device)
    while True:
        phase = int(torch.randint(context, ()))
        starts = phase + context * torch.randperm(
            (len(data) - phase - 1) // context, device=data.device
        )
        for i in range(0, len(starts) - batch + 1, batch):
            yield data[starts[i : i + batch, None] + reach].long()


def loss_of(model: ByteLlama, window: Tensor) -> Tensor:
    """Mean cross entropy (nats) of each byte of ``window`` [B, T + 1] but the first."""
    logits = model(window[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(model: ByteLlama, data: Tensor, context: int, batch: int = 64) -> float:
    """Mean bits per byte of ``data``, read in windows of ``context`` bytes that know nothing of each other."""
    cuts = data[: (len(data) - 1) // context * context + 1].unfold(0, context + 1, context)
    total = sum(float(loss_of(model, part.long())) * len(part) for part in cuts.split(batch))
    return total / len(cuts) / math.log(2)


def learning_rate(progress: float, warm_up: float = 0.02, decay: float = 0.6) -> float:
    """Factor on the peak rate at ``progress`` 0..1 of the time."""
    return max(min(progress / warm_up, 1.0, (1 - progress) / decay), 0.0)


def save(model: ByteLlama, report: dict, folder: Path) -> None:
    """Write weights and report, each in one step, so that a killed run leaves the last good pair."""
    metadata = {"config": json.dumps(dataclasses.asdict(model.config))}
    state = {
        name: p.detach().bfloat16().cpu().contiguous() for name, p in model.state_dict().items()
    }
    save_file(state, folder / "weights.tmp", metadata=metadata)
    os.replace(folder / "weights.tmp", folder / "byte_llama.safetensors")
    (folder / "report.tmp").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(folder / "report.tmp", folder / "byte_llama.json")


def samples(model: ByteLlama, n_bytes: int) -> dict[str, str]:
    """Continue each prompt with bfloat16 weights at temperature 0.6."""
    device = model.output.weight.device
    reader = ByteLlama(model.config, max_context=2048).to(device)
    reader.load_state_dict(model.state_dict())
    reader.cast(torch.bfloat16).eval()
    texts = {
        p.decode(): reader.generate(p, n_bytes, temperature=0.6).decode(errors="replace")
        for p in PROMPTS
    }
    for prompt, text in texts.items():
        print(f"---- prompt {prompt!r}\n{prompt}{text}", flush=True)
    return texts


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=standard_library(),
        help="folder of Python sources",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("."), help="folder for weights and report"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=7.0,
        help="wall time of the whole run but the samples",
    )
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--context", type=int, default=2048, help="bytes per sequence")
    parser.add_argument(
        "--muon-rate",
        type=float,
        default=5e-3,
        help="peak learning rate of the layers' matrices",
    )
    parser.add_argument(
        "--adam-rate",
        type=float,
        default=3e-3,
        help="peak learning rate of embedding, head, norms",
    )
    parser.add_argument(
        "--weight-decay",
        type=float,
        default=0.1,
        help="of the layers' matrices, times the rate",
    )
    parser.add_argument(
        "--dropout",
        type=float,
        default=0.05,
        help="on what each layer adds to the residual",
    )
    parser.add_argument(
        "--dim", type=int, default=Config.dim, help="width, smaller for a trial run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    return parser.parse_args()


def main() -> None:
    """Train, report, save."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    texts = {
        side: documents(args.source, held_out=side == "held_out") for side in ("train", "held_out")
    }
    data = {
        side: torch.frombuffer(bytearray(stream(docs)), dtype=torch.uint8)
        for side, docs in texts.items()
    }
    data = {side: bytes_.to(device) for side, bytes_ in data.items()}

    config = Config(dim=args.dim)
    model = ByteLlama(config, dropout=args.dropout).to(device)
    model.init_weights()
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        Muon(matrices, lr=args.muon_rate, weight_decay=args.weight_decay),
        torch.optim.AdamW(
            others, lr=args.adam_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        ),
    ]
    peaks = [args.muon_rate, args.adam_rate]
    n_parameters = sum(p.numel() for p in model.parameters())
    assert n_parameters == sum(p.numel() for p in matrices + others)
    print(
        f"{n_parameters:,} parameters; bytes:",
        {side: len(t) for side, t in data.items()},
        device,
        flush=True,
    )

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16)

    step_loss = loss_of if args.no_compile or device.type == "cpu" else torch.compile(loss_of)
    batches = windows(data["train"], args.batch, args.context)
    deadline, began, rate = args.minutes * 60, 0.0, 0.0
    history: list[dict] = []
    report: dict = {}
    step, seen, losses, next_eval, progress = (
        0,
        0,
        torch.zeros((), device=device),
        30.0,
        0.0,
    )
    while progress < 1.0:
        model.train()
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(progress)
        window = next(batches)
        with autocast():
            loss = step_loss(model, window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        losses += loss.detach()
        step, seen, progress = step + 1, seen + window[:, 1:].numel(), progress + rate
        if step % 10 and step > 3 and progress < 1.0:
            continue
        float(losses)  # waits for the GPU, so that the clock below tells the truth
        now = time.monotonic() - START
        if step <= 3:  # the first steps compile; time counts from here
            began, progress = now, 0.0
            continue
        progress = (now - began) / max(deadline - began, 1e-9)
        rate = progress / (step - 3)
        if now < next_eval and progress < 1.0:
            continue
        model.eval()
        with autocast():
            held_out = bits_per_byte(model, data["held_out"], args.context)
        n_losses = step - (history[-1]["step"] if history else 0)
        row = {
            "step": step,
            "seconds": round(now, 1),
            "progress": round(progress, 3),
            "train_bits_per_byte": round(float(losses) / n_losses / math.log(2), 4),
            "held_out_bits_per_byte": round(held_out, 4),
            "bytes_per_second": round(seen / (now - began)) if now > began else 0,
            "epochs": round(seen / len(data["train"]), 2),
        }
        print(json.dumps(row), flush=True)
        history.append(row)
        losses.zero_()
        next_eval = time.monotonic() - START + 30
        report = {
            "config": dataclasses.asdict(config),
            "n_parameters": n_parameters,
            "python_library": f"{len(texts['train'])} training and {len(texts['held_out'])} held-out files",
            "bytes": {side: len(t) for side, t in data.items()},
            "arguments": {
                k: v if isinstance(v, int | float) else v.name for k, v in vars(args).items()
            },
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "history": history,
        }
        save(model, report, args.output)
    model.eval()
    report["samples"] = samples(model, 600 if device.type == "cuda" else 40)
    save(model, report, args.output)
    print(
        f"saved {args.output / 'byte_llama.safetensors'} after {time.monotonic() - START:.0f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
