"""Which decay and which factor of the rate a weight has (docs/optimizers.md)."""

import re
from typing import Any

from torch import Tensor


def decay_and_scale(name: str, weight: Tensor, optimizer: dict[str, Any]) -> tuple[float, float]:
    """Matrices decay, norms and biases don't; of the rules that fit, each sets what it says."""
    decay, scale = (optimizer["weight_decay"] if weight.dim() > 1 else 0.0), 1.0
    for rule in optimizer["rules"]:
        if re.fullmatch(re.escape(rule["pattern"]).replace(r"\*", ".*"), name):
            decay = decay if rule.get("weight_decay") is None else rule["weight_decay"]
            scale = scale if rule.get("lr_scale") is None else rule["lr_scale"]
    return decay, scale
