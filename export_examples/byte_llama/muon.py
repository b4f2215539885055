"""Muon for many small matrices: equal shapes are stacked, so a step is a few dozen large launches.

``torch.optim.Muon`` (adjust_lr_fn="match_rms_adamw") does the same arithmetic one matrix at a time.
Method: Jordan et al. 2024 (momentum, then five Newton-Schulz steps toward the nearest orthogonal
matrix); scale of the update: Liu et al. 2025.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Bring each matrix of g [n, rows, cols] near its closest orthogonal one, in bfloat16."""
    a, b, c = COEFFICIENTS
    x = g.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalized by Newton-Schulz, with decoupled weight decay, for 2-D parameters.

    Args:
        params: matrices.
        lr: the entries of an update have root mean square 0.2 * lr, much as AdamW's have.
        weight_decay: each step multiplies the matrices by ``1 - lr * weight_decay``.
        momentum: of the Nesterov average of gradients.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for p in params:
            by_shape[p.shape].append(p)
        super().__init__(
            [{"params": ps} for ps in by_shape.values()],
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum},
        )

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            matrices, lr, momentum = group["params"], group["lr"], group["momentum"]
            g = torch.stack([p.grad for p in matrices])
            state = self.state[matrices[0]]
            average = state.setdefault("average", torch.zeros_like(g))
            average.lerp_(g, 1 - momentum)
            update = orthogonalize(g.lerp(average, momentum)).to(g.dtype)
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
            scale = 0.2 * max(g.shape[1:]) ** 0.5
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-lr * scale)
