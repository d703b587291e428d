"""Bytes of model state per rank by ZeRO stage, and of activations by recompute mode, against their formulas.

    python -m benchmarks.memory

Model state: one rank of eight on torch's fake process group (benchmarks/traffic.py), a Llama in BF16 with FP32
gradients and AdamW; every tensor that is alive when the step's gradients are summed. Activations: what is still alive
of all that a forward pass made, of each block; FP32 on the CPU, whose attention is torch's flash kernel. Shapes: N
positions of a micro-batch, D width, F feed-forward width, H heads, G key/value heads, K head width.
"""

import argparse
import gc
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.paired import describe_machine, random_batch
from benchmarks.traffic import Traffic, start_fake_world
from benchmarks.wire import layout_config
from megatrain.config.schema import TrainConfig
from megatrain.models.build import build_model
from megatrain.models.recompute import apply_recompute
from megatrain.spec.schema import ModelSpec

RANKS = 8
BUCKET = 1 << 18  # elements of DeepSpeed's buckets here
SEQ_LEN, BATCH = 256, 2
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {},
    "every_nth": {"checkpoint_every_nth": 2},
    "attention": {},
    "feed_forward": {},
    **{f"budget {share}": {"activation_budget": share} for share in (0.0, 0.25, 0.5, 0.75, 1.0)},
}


def state_formula(stage: int, weights: float) -> float:
    """Rajbhandari et al. 2020, section 3: 2 bytes of a BF16 weight, 4 of its FP32 gradient, 12 of AdamW's master
    weight and moments; each divided by the ranks from the stage on that shards it (3, 2, 1)."""
    shares = [RANKS if stage >= sharded else 1 for sharded in (3, 2, 1)]
    return weights * sum(size / share for size, share in zip((2, 4, 12), shares, strict=True))


def live_tensor_bytes(skip: set[int]) -> int:
    """Bytes of all storages that Python's tensors hold, but those whose addresses are in ``skip``."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and not thing.is_meta:
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(size for address, size in storages.items() if address not in skip)


def addresses() -> set[int]:
    gc.collect()
    return {x.untyped_storage().data_ptr() for x in gc.get_objects() if issubclass(type(x), Tensor) and not x.is_meta}


def model_state(stage: int) -> tuple[int, float]:
    """(bytes, weights) of one rank, at the second step's end of the last backward pass."""
    from megatrain.train.build import build_engine

    start_fake_world(RANKS)
    buckets = dict.fromkeys(("reduce_bucket_size", "stage3_prefetch_bucket_size"), BUCKET)
    options = {f"deepspeed.zero_optimization.{key}": value for key, value in buckets.items()}
    options |= {
        "deepspeed.zero_optimization.stage3_param_persistence_threshold": 0,
        "deepspeed.zero_optimization.stage3_max_live_parameters": 0,
        "deepspeed.zero_optimization.stage3_max_reuse_distance": 0,
    }
    config = layout_config(
        {"parallel.dp": RANKS, "parallel.zero_stage": stage, "precision.dtype": "bf16", **(options if stage else {})}, 2
    )
    before = addresses()
    engine: Any = build_engine(config, torch.device("cpu"))
    size = config.train.micro_batch_size * 2
    one = config.model_copy(update={"train": config.train.model_copy(update={"global_batch_size": size})})
    found = []
    update = engine.runtime.step

    def step() -> Any:
        found.append(live_tensor_bytes(before))
        return update()

    engine.runtime.step = step
    with Traffic():
        for number in (1, 2):
            engine.train_step(random_batch(one, torch.device("cpu")), number)
    weights = sum(shape.numel() for shape in engine.shapes.values())
    engine.close()
    return found[-1], weights


class Kept(TorchDispatchMode):
    """Follows the storages that operators make, weights' apart; ``bytes`` of those that still live."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._weights:
                    self._storages[storage._cdata] = weakref.ref(storage)
        return result

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for ref in self._storages.values() if (storage := ref()) is not None)


def activation_bytes(model: ModelSpec, mode: str) -> float:
    """Bytes that a block keeps: what two blocks more keep more, in the mean."""
    kept = []
    for blocks in (2, 4):
        shape = model.model_copy(update={"num_layers": blocks})
        decoder = build_model(shape, 0)
        name = mode.partition(" ")[0]
        apply_recompute(decoder, TrainConfig.model_validate({"activation_checkpointing": name, **MODES[mode]}))
        tokens = torch.randint(0, model.vocab_size, (BATCH, SEQ_LEN))
        with Kept(decoder) as storages:
            loss = decoder(tokens, tokens)
        gc.collect()
        kept.append(storages.bytes)
        del loss
    return (kept[1] - kept[0]) / 2


def activation_formula(model: ModelSpec, mode: str) -> float:
    """Bytes of a Llama block by mode.

    Each norm keeps its input, the normalised, the scaled and a factor a position; attention
    queries, keys, values (as a view of all three), its result and a logarithm a head and position; SwiGLU both
    products, the activated and the product of the two. A budget keeps the input and products.
    """
    if mode.startswith("budget"):
        return budget_formula(model, MODES[mode]["activation_budget"])[0]
    N, D, F = SEQ_LEN * BATCH, model.hidden_size, model.feed_forward.hidden_size or 0
    H, G = model.attention.num_heads, model.attention.num_kv_heads or model.attention.num_heads
    K = D // H
    norms = 2 * (3 * N * D + N)
    attention = N * (H + 2 * G) * K + N * (H + G) * K + N * H * K
    elements = {
        "none": norms + attention + N * H + 4 * N * F,
        "full": N * D,
        "attention": norms + attention + 4 * N * F,
        "feed_forward": norms + attention + N * H,
    }
    elements["every_nth"] = (elements["none"] + elements["full"]) // 2
    return 4.0 * elements[mode]


def budget_formula(model: ModelSpec, budget: float) -> tuple[float, float]:
    """Bytes that a Llama block keeps under a budget, and the most that the budget allows, its input included.

    The products with the most operations per byte stay, first the earlier of equals, as long as they fit.
    """
    N, D, F = SEQ_LEN * BATCH, model.hidden_size, model.feed_forward.hidden_size or 0
    H, G = model.attention.num_heads, model.attention.num_kv_heads or model.attention.num_heads
    K = D // H
    products = [  # operations, elements; attention's two products count as if it were not causal
        (2 * N * D * (H + 2 * G) * K, N * (H + 2 * G) * K),
        (4 * N * H * SEQ_LEN * K, N * H * K + N * H),
        (2 * N * H * K * D, N * D),
        *2 * [(2 * N * D * F, N * F)],
        (2 * N * F * D, N * D),
    ]
    most = budget * sum(elements for _, elements in products)
    kept = 0
    for _, elements in sorted(products, key=lambda product: -product[0] / product[1]):
        kept += elements if kept + elements <= most else 0
    return 4.0 * (N * D + kept), 4.0 * (N * D + most)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(describe_machine("torch", "deepspeed"))
    print("ZeRO stage | formula MB | measured MB | ratio | over, in buckets")
    for stage in range(4):
        found, weights = model_state(stage)
        expected = state_formula(stage, weights)
        over = (found - expected) / (4 * BUCKET)
        print(f"{stage} | {expected / 1e6:.3f} | {found / 1e6:.3f} | {found / expected:.4f} | {over:.2f}", flush=True)
    print("recompute mode | formula bytes a block | measured | ratio")
    model = layout_config({}, 1).model
    for mode in MODES:
        measured, expected = activation_bytes(model, mode), activation_formula(model, mode)
        most = (
            f" | allowed {budget_formula(model, MODES[mode]['activation_budget'])[1]:.0f}" if "budget" in mode else ""
        )
        print(f"{mode} | {expected:.0f} | {measured:.0f} | {measured / expected:.4f}{most}")


if __name__ == "__main__":
    main()
