"""BERT's parts, as its paper and its published code have them; and it learns."""

import math

import torch
from torch import Tensor

from megatrain.data.feed.objectives import Masked
from megatrain.data.feed.rows import Batch
from megatrain.models.build import build_model
from tests.configs import model_spec
from tests.reference.bert import masked_language_model

V, S = 12, 12
SIZES = {"family": "bert", "num_layers": 2, "hidden_size": 32, "attention.num_heads": 4, "vocab_size": V,
         "vocab_padding": 1, "max_seq_len": S, "norm.eps": 1e-12}  # fmt: skip
LENGTHS = torch.tensor([S, 5, 1])


def test_every_number_is_the_reference_s() -> None:
    """Also those of padded sequences, and the gradients of all parameters."""
    model = build_model(model_spec({**SIZES, "init_std": 0.3}), seed=1).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases at their initial values would hide each other
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    tokens = torch.randint(0, V - 1, (3, S), generator=generator)
    labels = torch.where(torch.rand(3, S, generator=generator) < 0.4, tokens, -100)
    labels = labels.masked_fill(torch.arange(S) >= LENGTHS[:, None], -100)
    weights = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    wanted = masked_language_model(weights, tokens, labels, LENGTHS, layers=2, heads=4, padding=1)
    losses = model(tokens, labels, lengths_B=LENGTHS)
    # the loss is computed in FP32
    torch.testing.assert_close(losses.double(), wanted, rtol=1e-6, atol=1e-6)
    wanted.sum().backward()
    losses.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-5, atol=1e-6, msg=name)


def counting(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sequences that count upwards from anywhere, some tokens hidden: inputs, labels, and what was there."""
    first = torch.randint(0, V - 2, (16, 1), generator=torch.Generator().manual_seed(step))
    tokens = (first + torch.arange(S)) % (V - 2)
    ids = torch.arange(16) + 16 * step
    batch = Masked("counting", 0.25, V - 2, V - 2)(Batch(tokens.clone(), tokens.clone(), ids, None, ids))
    return batch.tokens, batch.labels, tokens


def test_it_learns_to_fill_gaps() -> None:
    model = build_model(model_spec({**SIZES, "init_std": 0.1}), seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(300):
        tokens, labels, _ = counting(step)
        loss = model(tokens, labels).sum() / (labels >= 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - math.log(V - 1)) < 0.3, "at first all tokens are as likely"
    tokens, labels, there = counting(999)
    hidden = tokens == V - 2
    filled = model(tokens).transpose(0, 1)[..., :-1].argmax(-1)
    assert hidden.sum() > 20 and float((filled == there)[hidden].float().mean()) > 0.95
