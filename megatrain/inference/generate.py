"""Text from a checkpoint, on one process, whatever layout wrote it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatrain.checkpoint.state import require_state, saved_model
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.models.build import build_empty_model
from megatrain.models.decoder import Decoder
from megatrain.models.parts.mixture import load_router_biases
from megatrain.spec.derive import num_tokens
from megatrain.spec.kinds import WEIGHT


def load_model(checkpoint: Path) -> Decoder:
    """The model of a checkpoint, in plain PyTorch and FP32, ready to evaluate.

    Raises:
        CheckpointError: damaged or not there, or its state is not that of a model.
    """
    reader = CheckpointReader(checkpoint)
    reader.require_files()  # before memory is taken
    model = build_empty_model(saved_model(reader))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(reader.read(WEIGHT, name)))
    load_router_biases(model, require_state(reader, "router_biases")["router_biases"])
    return model.eval()


def require_room(reader: CheckpointReader, prompt: list[int]) -> None:
    """Checks that the model goes on with texts, and has tokens and positions for all of a prompt.

    Raises:
        CheckpointError: it hasn't.
    """
    model = saved_model(reader)
    if "bidirectional" in model.blocks:
        raise CheckpointError(
            f"{reader.path}: the model's blocks see both ways (model.blocks bidirectional): it fills gaps in a "
            "text, and can't go on with one"
        )
    if len(prompt) > model.max_seq_len:
        raise CheckpointError(
            f"--prompt is {len(prompt)} tokens long, the model has {model.max_seq_len} positions: shorten it"
        )
    if max(prompt) >= num_tokens(model):
        raise CheckpointError(
            f"--prompt has the token {max(prompt)}, the model only {num_tokens(model)}: the tokenizer is another's"
        )


@torch.no_grad()
def generate(
    model: Decoder, prompt: list[int], max_new_tokens: int, temperature: float, seed: int, stop_id: int | None = None
) -> Iterator[int]:
    """Yields new tokens one by one; at temperature 0 the likeliest, else drawn from softmax(logits / temperature).

    The model sees at most its last ``max_seq_len`` tokens. Ends before ``stop_id``.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        window = torch.tensor([tokens[-model.config.max_seq_len :]])
        token = _choose(model(window)[-1, 0, : num_tokens(model.config)].float(), temperature, generator)
        if token == stop_id:
            return
        tokens.append(token)
        yield token


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if not bool(logits_V.isfinite().all()):
        raise CheckpointError("the model's logits are not finite: its weights are of a run that broke down")
    if temperature == 0.0 or not bool((logits_V / temperature).isfinite().all()):  # as good as 0
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))
