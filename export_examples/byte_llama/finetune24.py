"""Make the byte Llama 2:4 and train what is left: half of the weights, most of the accuracy.

    python finetune24.py             # byte_llama_24.safetensors: a minute and a half of one H200

Wanda (cuda_int4.prune_24_) chooses two of every four weights of each linear from a few windows of
the training text. Then the model is trained on, its mask kept: after every step of the optimizer
the dropped weights are 0 again. The dense model teaches a little: a fifth of the loss is the cross
entropy with its distribution, the rest that with the text. Training text, held-out text and
schedule are train.py's.

Bits per byte of the held-out text: 0.7006 dense, 2.1507 pruned, then (1.5 readings of the text, on
an H200 that did other work beside it):

    share of the teacher  Muon's rate  AdamW's rate
                     0.5         5e-3        2.5e-3  0.7253
                     0.2         3e-3        1.5e-3  0.7234: the weights here
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from corpus import documents, standard_library, stream
from cuda_int4 import prune_24_
from model import WEIGHTS, WEIGHTS_24, ByteLlama, as_tensor, bits_per_byte, load, save_24
from muon import Muon
from train import START, Clock, learning_rate, windows


def teach(student: ByteLlama, teacher: ByteLlama, window: Tensor, share: float) -> Tensor:
    """Mean loss (nats) of the bytes of ``window`` [B, T + 1] but the first.

    Args:
        student: the model that learns.
        teacher: the dense model.
        window: bytes, int64.
        share: of the cross entropy with the teacher's distribution; the rest is that with the text.
    """
    tokens, text = window[:, :-1], window[:, 1:].flatten()
    logits = student(tokens).float().flatten(0, 1)
    with torch.no_grad():
        wanted = teacher(tokens).float().flatten(0, 1).softmax(-1)
    return share * F.cross_entropy(logits, wanted) + (1 - share) * F.cross_entropy(logits, text)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", type=Path, default=standard_library(), help="folder of Python sources"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="the dense model")
    parser.add_argument("-o", "--output", type=Path, default=Path(WEIGHTS_24.name))
    parser.add_argument("--minutes", type=float, default=1.4, help="wall time of the whole run")
    parser.add_argument("--batch", type=int, default=32, help="sequences per step")
    parser.add_argument("--context", type=int, default=2048, help="bytes per sequence")
    parser.add_argument("--calibration", type=int, default=32, help="windows that wanda measures")
    parser.add_argument("--teacher", type=float, default=0.2, help="share of the teacher's loss")
    parser.add_argument("--muon-rate", type=float, default=3e-3, help="peak, layers' matrices")
    parser.add_argument("--adam-rate", type=float, default=1.5e-3, help="peak, all others")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the layers' matrices")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    return parser.parse_args()


def main() -> None:
    """Prune, train, save."""
    args = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    data = {
        side: as_tensor(stream(documents(args.source, held_out=side == "held_out"))).to(device)
        for side in ("train", "held_out")
    }
    teacher = load(args.weights).to(device).requires_grad_(False)
    student = load(args.weights).to(device)
    autocast = torch.autocast(device.type, torch.bfloat16)

    @torch.no_grad()
    def held_out(model: nn.Module) -> float:
        with autocast:
            return round(bits_per_byte(model.eval(), data["held_out"], args.context), 4)

    batches = windows(data["train"], args.batch, args.context)
    calibration = windows(data["train"], 1, args.context)
    report = {"dense_bits_per_byte": held_out(teacher)}
    prune_24_(student, "wanda", [next(calibration)[:, :-1] for _ in range(args.calibration)])
    linears = [m.weight for m in student.modules() if isinstance(m, nn.Linear)]
    masks = [(weight != 0).to(weight.dtype) for weight in linears]
    report["pruned_bits_per_byte"] = held_out(student)
    print(json.dumps(report), flush=True)

    matrices = [p for p in student.layers.parameters() if p.dim() == 2]
    others = [p for p in student.parameters() if all(p is not m for m in matrices)]
    optimizers = {
        Muon(matrices, lr=args.muon_rate, weight_decay=args.weight_decay): args.muon_rate,
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True): args.adam_rate,
    }
    loss_of = teach if args.no_compile or device.type == "cpu" else torch.compile(teach)
    clock = Clock(args.minutes * 60)
    next_report = 15.0
    while clock.progress < 1:
        student.train()
        for optimizer, peak in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = peak * learning_rate(clock.progress, decay=0.8)
        with autocast:
            loss = loss_of(student, teacher, next(batches), args.teacher)
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        student.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_mul_(linears, masks)
        if not clock.tick():
            continue
        loss.item()  # waits for the GPU, so that the clock tells the truth
        clock.look()
        if clock.now >= next_report or clock.progress >= 1:
            seen = clock.step * args.batch * args.context / len(data["train"])
            row = {"seconds": round(clock.now, 1), "epochs": round(seen, 2)}
            print(json.dumps(row | {"held_out_bits_per_byte": held_out(student)}), flush=True)
            next_report = clock.now + 15
    report["finetuned_bits_per_byte"] = held_out(student)
    report["arguments"] = {
        k: v if isinstance(v, int | float) else v.name for k, v in vars(args).items()
    }
    save_24(student.cast(torch.bfloat16), report, args.output)
    print(f"saved {args.output} after {time.monotonic() - START:.0f} s: {json.dumps(report)}")


if __name__ == "__main__":
    main()
