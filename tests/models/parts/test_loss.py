"""The loss against torch's cross-entropy, with positions that have none."""

import math

import torch
import torch.nn.functional as F

from megatrain.models.parts.loss import sequence_losses
from megatrain.parallel.layers import Layers
from megatrain.spec.labels import IGNORE

SEQ, BATCH, VOCAB = 6, 3, 11


def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """[S, B, V] and [B, S]: some labels of the first sequence count, all of the second, none of the third."""
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(SEQ, BATCH, VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels[0, ::2], labels[2] = IGNORE, IGNORE
    return logits, labels


def test_it_is_the_sum_of_torchs_over_each_sequence() -> None:
    logits, labels = logits_and_labels()
    ours, its = logits.clone().requires_grad_(), logits.double().requires_grad_()
    losses = sequence_losses(Layers(), ours, labels)
    expected = torch.stack([
        F.cross_entropy(its[:, number], labels[number], ignore_index=IGNORE, reduction="sum") for number in range(BATCH)
    ])  # fmt: skip
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    weights = torch.tensor([1.0, 2.0, 3.0])
    (losses * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None and its.grad is not None
    torch.testing.assert_close(ours.grad.double(), its.grad, rtol=1e-6, atol=1e-7)
    assert not ours.grad[:, 2].any() and not ours.grad[::2, 0].any(), "what has no loss pulls at nothing"


def test_even_scores_cost_the_logarithm_of_the_vocabulary() -> None:
    losses = sequence_losses(Layers(), torch.zeros(SEQ, BATCH, VOCAB), torch.zeros(BATCH, SEQ, dtype=torch.int64))
    torch.testing.assert_close(losses, torch.full((BATCH,), SEQ * math.log(VOCAB)))


def test_sixteen_bits_are_summed_in_fp32() -> None:
    logits, labels = logits_and_labels()
    losses = sequence_losses(Layers(), logits.bfloat16(), labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, sequence_losses(Layers(), logits.bfloat16().float(), labels), rtol=0, atol=0)


def test_padding_of_the_vocabulary_takes_no_part() -> None:
    logits, labels = logits_and_labels()
    labels = labels.clamp(max=7)
    hidden = Layers().hide_tokens_from(8, logits)
    expected = sequence_losses(Layers(), logits[..., :8], labels)
    torch.testing.assert_close(sequence_losses(Layers(), hidden, labels), expected)
