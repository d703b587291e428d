"""One update of one weight, by each optimizer's paper, in FP64. All decay decoupled (Loshchilov & Hutter 2019)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]
Update = Callable[[Tensor, Tensor, State, int, float, float, dict[str, Any]], Tensor]
"""(weight, gradient, what is kept of it, number of this update from 1, rate, decay, config) -> new weight."""


def adamw(w: Tensor, g: Tensor, kept: State, t: int, rate: float, decay: float, config: dict[str, Any]) -> Tensor:
    """Loshchilov & Hutter 2019, algorithm 2."""
    beta1, beta2 = config["beta1"], config["beta2"]
    m = kept["exp_avg"] = beta1 * kept.get("exp_avg", torch.zeros_like(w)) + (1 - beta1) * g
    v = kept["exp_avg_sq"] = beta2 * kept.get("exp_avg_sq", torch.zeros_like(w)) + (1 - beta2) * g * g
    step = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + config["eps"])
    return w - rate * (step + decay * w)


def lion(w: Tensor, g: Tensor, kept: State, t: int, rate: float, decay: float, config: dict[str, Any]) -> Tensor:
    """Chen et al. 2023, algorithm 2."""
    m = kept.get("exp_avg", torch.zeros_like(w))
    direction = (config["beta1"] * m + (1 - config["beta1"]) * g).sign()
    kept["exp_avg"] = config["beta2"] * m + (1 - config["beta2"]) * g
    return w - rate * (direction + decay * w)


def adafactor(w: Tensor, g: Tensor, kept: State, t: int, rate: float, decay: float, config: dict[str, Any]) -> Tensor:
    """Shazeer & Stern 2018, algorithms 4 to 6 without a first moment; means in the place of sums change nothing."""
    squares, beta2 = g * g + 1e-30, 1 - t**-0.8
    if w.dim() == 2:
        zeros = torch.zeros_like(w)
        rows = kept["exp_avg_sq_rows"] = beta2 * kept.get("exp_avg_sq_rows", zeros.mean(1)) + t**-0.8 * squares.mean(1)
        cols = kept.get("exp_avg_sq_columns", zeros.mean(0))
        cols = kept["exp_avg_sq_columns"] = beta2 * cols + t**-0.8 * squares.mean(0)
        v = rows[:, None] * cols[None, :] / rows.mean()
    else:
        v = kept["exp_avg_sq"] = beta2 * kept.get("exp_avg_sq", torch.zeros_like(w)) + t**-0.8 * squares
    update = g / v.sqrt()
    update = update / max(1.0, _rms(update))
    return w - rate * (max(1e-3, _rms(w)) * update + decay * w)


def muon(w: Tensor, g: Tensor, kept: State, t: int, rate: float, decay: float, config: dict[str, Any]) -> Tensor:
    """Jordan et al. 2024 with Nesterov's momentum, of AdamW's size as in Liu et al. 2025, eq. 4."""
    mu = config["muon_momentum"]
    m = kept["exp_avg"] = mu * kept.get("exp_avg", torch.zeros_like(w)) + (1 - mu) * g
    x = mu * m + (1 - mu) * g
    # several matrices in one parameter, a few rows of each in turn: queries, keys and values, each by itself
    rows = config.get("stacked_rows") or [len(x)]
    parts = x.unflatten(0, (-1, sum(rows))).split(rows, 1)
    each = [_orthogonal(part.flatten(0, 1)).mul(0.2 * math.sqrt(max(part.flatten(0, 1).shape))) for part in parts]
    whole = torch.cat([made.view_as(part) for made, part in zip(each, parts, strict=True)], 1).flatten(0, 1)
    return w - rate * (whole + decay * w)


def _orthogonal(x: Tensor) -> Tensor:
    """a x + b (x x^T) x + c (x x^T)^2 x, five times."""
    x = x / (x.square().sum().sqrt() + 1e-7)
    for _ in range(5):
        if x.shape[0] <= x.shape[1]:
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        else:
            gram = x.T @ x
            x = 3.4445 * x - 4.7750 * x @ gram + 2.0315 * x @ gram @ gram
    return x


def update_of(optimizer: str, name: str, weight: Tensor) -> Update:
    """docs/optimizers.md: Muon takes matrices of attention and feed-forwards, AdamW the rest."""
    if optimizer == "muon":
        return muon if weight.dim() == 2 and name.startswith("layers.") and ".router." not in name else adamw
    return {"adamw": adamw, "lion": lion, "adafactor": adafactor}[optimizer]


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
