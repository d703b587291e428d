"""Short deterministic runs in a process that starts as a run does: python -m tests.engine.determinism_run.

Prints, by name, a digest of this rank's weights and moments after some steps.
"""

import hashlib
import os
import sys
from types import SimpleNamespace
from typing import Any

MIXTURE: dict[str, Any] = {"experts.num_experts": 8, "experts.per_token": 2, "experts.hidden_size": 64}
# large enough that torch spreads its sums over threads
SHAPE = {
    "num_layers": 2,
    "hidden_size": 128,
    "attention.num_heads": 4,
    "feed_forward.hidden_size": 256,
    "vocab_size": 512,
}
SEQ_LEN = 64


def configs(on_gpu: bool, num_ranks: int) -> dict[str, Any]:
    from tests.layouts import Layout, run_config

    layout = Layout(dp=num_ranks, zero_stage=2)

    def made(family: str, model: dict[str, Any], **sections: Any) -> Any:
        model = SHAPE | {"max_seq_len": SEQ_LEN} | model
        return run_config(family, layout, model=model, data={"seq_len": SEQ_LEN}, **sections)

    found = {
        "gpt": made("gpt", {"dropout": 0.1, "attention.dropout": 0.1}),
        "mixture": made("llama", MIXTURE | {"experts.capacity": 0.75}),
    }
    if on_gpu:
        bf16 = {"precision": {"dtype": "bf16"}}
        found |= {
            "bf16": made("llama", {}, **bf16),
            "compiled": made("llama", MIXTURE, train={"compile": True}, **bf16),
            "muon": made("llama", {}, optimizer={"name": "muon"}, **bf16),
        }
        for kernel in ("flex", "varlen"):
            data = {"seq_len": SEQ_LEN, "sequences": "mask_documents"}
            found[kernel] = run_config(
                "llama", layout, model=SHAPE | {"attention.documents": kernel}, data=data, **bf16
            )
    return found


def batch(step: int, rank: int, num_ranks: int) -> SimpleNamespace:
    import torch

    from tests.layouts import GLOBAL_BATCH_SIZE

    generator = torch.Generator().manual_seed(step)
    shape = (2, GLOBAL_BATCH_SIZE, SEQ_LEN)
    tokens, labels = torch.randint(0, SHAPE["vocab_size"], shape, generator=generator)
    places = torch.arange(SEQ_LEN) % (SEQ_LEN // 4)
    own = slice(rank * GLOBAL_BATCH_SIZE // num_ranks, (rank + 1) * GLOBAL_BATCH_SIZE // num_ranks)
    return SimpleNamespace(
        tokens=tokens[own],
        labels=labels[own],
        sample_ids=torch.arange(GLOBAL_BATCH_SIZE)[own] + step * 1000,
        positions=places.expand(GLOBAL_BATCH_SIZE, -1)[own],
        lengths=None,
    )


def digest(engine: Any) -> str:
    """Of all weights and moments, put together from all ranks."""
    import torch

    from megatrain.engine.state import export_state

    found = hashlib.sha256()
    for kind, name, values in export_state(engine):
        found.update(f"{kind} {name}".encode())
        found.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main(deterministic: bool) -> None:
    from megatrain.engine.start import start_distributed
    from megatrain.train.build import build_engine

    device = start_distributed(deterministic)
    rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for name, config in configs(device.type == "cuda", num_ranks).items():
        engine = build_engine(config, device)
        for step in (1, 2, 3):
            engine.train_step(batch(step, rank, num_ranks), step)
        print(name, digest(engine), flush=True)
        engine.close()


if __name__ == "__main__":
    main(deterministic=sys.argv[1:] != ["undetermined"])
