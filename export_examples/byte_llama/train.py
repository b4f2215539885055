"""Train the byte Llama on the Python standard library's own source, within a number of minutes.

    python train.py                            # the weights in this folder: 3.5 minutes of one H200
    python train.py --source /path/to/Lib      # another Python's library (ours was 3.11.7's)

Writes ``byte_llama.safetensors`` (bfloat16) and ``byte_llama.json`` (sizes, figures, samples) into
``--output``, twice a minute and at the end. The learning rate follows the clock: a short warm-up, a
plateau, then a straight line to zero that ends when the minutes do. Matrices of the layers are
trained by Muon (muon.py), the rest by AdamW. Bits per byte are those of the held-out files
(corpus.py). On a CPU, ``--batch 2 --context 128 --minutes 0.3 --dim 64`` shows that it works.

The library is read 26 times, so it takes regularization. Tried, each on one H200:

    minutes  readings  dropout  weight decay  held-out bits per byte
        3.5        26     0.05           0.5  0.701, still falling: the weights here
        3.5        26     0.1            0.2  0.708
        7.5        57     0.05           0.1  0.728 after 46 readings, 0.765 at the end
        7.5        58     0              0.1  0.766 after 38 readings, 1.017 at the end
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
from safetensors.torch import save_file
from torch import Tensor

from corpus import documents, standard_library, stream
from model import WEIGHTS, ByteLlama, Config, as_tensor, bits_per_byte, loss_of
from muon import Muon

START = time.monotonic()
LOG2 = math.log(2)
PROMPTS = [
    b"",
    b'def read_config(path):\n    """',
    b"class Stack:\n",
    b"import os\nimport sys\n\n\ndef main(",
]


def windows(data: Tensor, batch: int, context: int) -> Iterator[Tensor]:
    """Yield batches [batch, context + 1] for ever; each epoch shuffles cuts of another phase."""
    reach = torch.arange(context + 1, device=data.device)
    while True:
        phase = int(torch.randint(context, ()))
        starts = phase + context * torch.randperm(
            (len(data) - phase - 1) // context, device=data.device
        )
        for i in range(0, len(starts) - batch + 1, batch):
            yield data[starts[i : i + batch, None] + reach].long()


def learning_rate(progress: float, warm_up: float = 0.02, decay: float = 0.6) -> float:
    """Factor on the peak rate at ``progress`` 0..1 of the time."""
    return max(min(progress / warm_up, 1.0, (1 - progress) / decay), 0.0)


def save(model: ByteLlama, report: dict, folder: Path) -> None:
    """Write weights and report, each in one step: a killed run leaves the last good ones."""
    metadata = {"config": json.dumps(dataclasses.asdict(model.config))}
    state = {
        name: p.detach().bfloat16().cpu().contiguous() for name, p in model.state_dict().items()
    }
    save_file(state, folder / "weights.tmp", metadata=metadata)
    os.replace(folder / "weights.tmp", folder / WEIGHTS.name)
    (folder / "report.tmp").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(folder / "report.tmp", (folder / WEIGHTS.name).with_suffix(".json"))


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
        "--source", type=Path, default=standard_library(), help="folder of Python sources"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("."), help="folder for weights and report"
    )
    parser.add_argument(
        "--minutes", type=float, default=3.5, help="wall time of the whole run but the samples"
    )
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--context", type=int, default=2048, help="bytes per sequence")
    parser.add_argument(
        "--muon-rate", type=float, default=5e-3, help="peak learning rate of the layers' matrices"
    )
    parser.add_argument(
        "--adam-rate", type=float, default=3e-3, help="peak learning rate of embedding, head, norms"
    )
    parser.add_argument(
        "--weight-decay", type=float, default=0.5, help="of the layers' matrices, times the rate"
    )
    parser.add_argument(
        "--dropout", type=float, default=0.05, help="on what each layer adds to the residual"
    )
    parser.add_argument(
        "--dim", type=int, default=Config.dim, help="width, smaller for a trial run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    return parser.parse_args()


class Clock:
    """Progress 0..1 of training by wall time, extrapolated between looks at the clock.

    The first steps compile; time counts from the end of step ``skipped`` to ``deadline`` seconds
    after the start of the process.
    """

    skipped = 3

    def __init__(self, deadline: float):
        self.deadline, self.began, self.now = deadline, 0.0, 0.0
        self.step, self.progress, self.rate = 0, 0.0, 0.0

    def tick(self) -> bool:
        """Count a step; say whether it is time to wait for the GPU and look at the clock."""
        self.step += 1
        self.progress += self.rate
        return self.step % 10 == 0 or self.step <= self.skipped or self.progress >= 1

    def look(self) -> None:
        """Read the clock."""
        self.now = time.monotonic() - START
        if self.step <= self.skipped:
            self.began = self.now
        else:
            self.progress = (self.now - self.began) / max(self.deadline - self.began, 1e-9)
            self.rate = self.progress / (self.step - self.skipped)


def main() -> None:
    """Train, report, save."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")

    sides = {"train": False, "held_out": True}
    texts = {side: documents(args.source, held_out=is_out) for side, is_out in sides.items()}
    data = {side: as_tensor(stream(docs)).to(device) for side, docs in texts.items()}

    config = Config(dim=args.dim)
    model = ByteLlama(config, dropout=args.dropout).to(device)
    model.init_weights()
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    muon = Muon(matrices, lr=args.muon_rate, weight_decay=args.weight_decay)
    adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    peaks = {muon: args.muon_rate, adam: args.adam_rate}
    report = {
        "config": dataclasses.asdict(config),
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "files": {side: len(docs) for side, docs in texts.items()},
        "bytes": {side: len(text) for side, text in data.items()},
        "arguments": {
            k: v if isinstance(v, int | float) else v.name for k, v in vars(args).items()
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "history": [],
    }
    print(json.dumps(report), flush=True)

    autocast = torch.autocast(device.type, torch.bfloat16)
    train_loss = loss_of if args.no_compile or device.type == "cpu" else torch.compile(loss_of)
    batches = windows(data["train"], args.batch, args.context)
    clock = Clock(args.minutes * 60)
    losses, next_report, last_step = torch.zeros((), device=device), 30.0, 0
    while clock.progress < 1:
        model.train()
        for optimizer, peak in peaks.items():
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(clock.progress)
        with autocast:
            loss = train_loss(model, next(batches))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in peaks:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        losses += loss.detach()
        if not clock.tick():
            continue
        losses.item()  # waits for the GPU, so that the clock tells the truth
        clock.look()
        if clock.now < next_report and clock.progress < 1:
            continue
        model.eval()
        with autocast:
            held_out = bits_per_byte(model, data["held_out"], args.context)
        seen = clock.step * args.batch * args.context
        row = {
            "step": clock.step,
            "seconds": round(clock.now, 1),
            "progress": round(clock.progress, 3),
            "train_bits_per_byte": round(losses.item() / (clock.step - last_step) / LOG2, 4),
            "held_out_bits_per_byte": round(held_out, 4),
            "bytes_per_second": round(seen / max(clock.now - clock.began, 1e-9)),
            "epochs": round(seen / len(data["train"]), 2),
        }
        print(json.dumps(row), flush=True)
        report["history"].append(row)
        save(model, report, args.output)
        losses.zero_()
        next_report, last_step = clock.now + 30, clock.step
    report["samples"] = samples(model.eval(), 600 if device.type == "cuda" else 40)
    save(model, report, args.output)
    print(f"saved {args.output / WEIGHTS.name} after {time.monotonic() - START:.0f} s", flush=True)


if __name__ == "__main__":
    main()
