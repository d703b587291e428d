"""What the launcher says, read before anything heavy is imported."""

import os


def world_size_from_environment() -> int:
    """Ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank_from_environment() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0"))
