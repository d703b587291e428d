"""Canonical names that are not those of parameters."""


def bias_name(layer: int) -> str:
    """Canonical name of a layer's balance bias."""
    return f"layers.{layer}.feed_forward.router.balance_bias"
