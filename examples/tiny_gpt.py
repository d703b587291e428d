"""A GPT and its training step on one page, in plain PyTorch: read this first.

    python examples/tiny_gpt.py

It learns to write its own source, character by character, within half a minute. megatrain computes the same, over many
processes and machines: tests/examples/test_tiny_gpt.py gives both the same weights and batches and compares what they
make of them. docs/tour.md leads on from here.

Shapes: B sequences, S positions, D width, H heads, K = D / H width of a head, V vocabulary.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Each position gathers what it needs from those before it: softmax(Q K^T / sqrt(K)) V (Vaswani et al. 2017)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.output = nn.Linear(width, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        # a head is a slice of the width, and attends by itself
        query, key, value = (
            part(x_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # B, H, S, K
            for part in (self.query, self.key, self.value)
        )
        scores_BHSS = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        is_later = torch.ones_like(scores_BHSS, dtype=torch.bool).triu(1)  # what it must predict
        weights_BHSS = scores_BHSS.masked_fill(is_later, -math.inf).softmax(-1)
        return self.output((weights_BHSS @ value).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Each position thinks by itself: two matrices, and a bend between them."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BSD), approximate="tanh"))


class Block(nn.Module):
    """Both add what they found to a stream that runs past them (GPT-2: norms stand before, not behind)."""

    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.feed_forward_norm, self.feed_forward = nn.LayerNorm(width), FeedForward(width, inner)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD))
        return x_BSD + self.feed_forward(self.feed_forward_norm(x_BSD))


class GPT(nn.Module):
    """Tokens in; for every position, a score for each token that may come next (Radford et al. 2019)."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, inner: int, layers: int):
        super().__init__()
        self.word, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.final_norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():  # norms begin as they are: times 1, plus 0
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                is_added = name.endswith(("attention.output.weight", "feed_forward.down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if is_added else 0.02)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        places_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSD = self.word(tokens_BS) + self.position(places_S)
        for block in self.blocks:
            x_BSD = block(x_BSD)
        return self.final_norm(x_BSD) @ self.word.weight.T  # logits [B, S, V]: one table reads and writes words


def adamw(model: nn.Module, betas: tuple[float, float], eps: float, decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019): matrices shrink a little in every step, norms and biases do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps)  # the rate comes with each step


def learning_rate(step: int, peak: float, warmup: int, last: int, low: float) -> float:
    """Of step 1, 2, ...: straight up to the peak at ``warmup``, then down half a cosine to ``low`` at ``last``."""
    if step < warmup:
        return peak * step / warmup
    done = min(1.0, (step - warmup) / (last - warmup))
    return low + (peak - low) * 0.5 * (1 + math.cos(math.pi * done))


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens_BS: Tensor, next_BS: Tensor, rate: float, clip: float
) -> tuple[float, float]:
    """One update of all weights. Returns the loss before it, in nats per token, and the length of the gradient."""
    loss = F.cross_entropy(model(tokens_BS).flatten(0, 1), next_BS.flatten())  # -log of the right token's probability
    loss.backward()  # how would the loss change with each weight?
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)  # a step is never longer than this, whatever the batch
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()


def main(steps: int = 500, length: int = 32, batch: int = 16) -> None:
    torch.manual_seed(0)
    text = Path(__file__).read_text(encoding="utf-8")
    letters = sorted(set(text))
    corpus = torch.tensor([letters.index(letter) for letter in text])
    model = GPT(len(letters), length, width=128, heads=4, inner=512, layers=2)
    optimizer = adamw(model, betas=(0.9, 0.95), eps=1e-8, decay=0.1)
    for step in range(1, steps + 1):
        begins = torch.randint(len(corpus) - length, (batch, 1))
        rows = corpus[begins + torch.arange(length + 1)]
        rate = learning_rate(step, peak=3e-3, warmup=20, last=steps, low=3e-4)
        loss, norm = train_step(model, optimizer, rows[:, :-1], rows[:, 1:], rate, clip=1.0)
        if step % 50 == 0 or step == steps:
            print(f"step {step}: loss {loss:.3f}, gradient norm {norm:.2f}")
    written = corpus[:length][None]
    for _ in range(200):  # one more letter, drawn by the chances that the model gives to each
        chances = model(written[:, -length:])[:, -1].softmax(-1)
        written = torch.cat([written, torch.multinomial(chances, 1)], dim=1)
    print("".join(letters[number] for number in written[0]))


if __name__ == "__main__":
    main()
