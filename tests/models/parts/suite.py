"""The cases of every part of a model: a new part gets its proofs by a class that names it.

A class that inherits from a suite, in a test file of the part's own, says how the part is built and what it must
compute; pytest then runs all cases of the suite on it. Shapes: S sequence, B micro-batch, D width.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from megatrain.config.schema import ResolvedRun
from megatrain.models.parts.sublayers import MicroBatch
from megatrain.parallel.layers import Layers
from tests.layouts import ONE_PROCESS, Layout, run_config
from tests.pool import Pool

SEQ, BATCH, WIDTH, HEADS, INNER = 12, 2, 32, 4, 64  # of run_config's model
TENSOR = (Layout(tp=2), Layout(tp=2, sequence_parallel=True))
CONTEXT = (Layout(cp=2), Layout(cp=2, cp_method="ulysses"))
EPS = 0.5  # of norms: one that counts
DOCUMENTS = ([5, 1, 6], [12])  # lengths, of each sequence
Weights = dict[str, Tensor]


class PartSuite:
    """What every part must hold: its formula and its gradients.

    ``part``: the class. ``family``, ``model`` and ``data`` are the config's. ``error``: the largest that is
    rounding, relative to the largest number, in FP64 (a part that computes in FP32 has FP32's). ``documents``: whether
    a case's sequences hold several.
    """

    part: ClassVar[type[nn.Module]]
    family: ClassVar[str] = "llama"
    model: ClassVar[dict[str, Any]] = {}
    data: ClassVar[dict[str, Any]] = {}
    error: ClassVar[float] = 1e-12
    documents: ClassVar[tuple[bool, ...]] = (False,)

    @classmethod
    def build(cls, config: ResolvedRun, layers: Layers) -> nn.Module:
        """The part, with weights of any values."""
        raise NotImplementedError

    @classmethod
    def run(
        cls, part: nn.Module, x_SBD: Tensor, layers: Layers, config: ResolvedRun, positions_BS: Tensor | None
    ) -> Tensor:
        """What the part makes of activations; ``positions_BS``: places of all tokens in their documents, None: one."""
        return part(x_SBD)

    @classmethod
    def expected(cls, weights: Weights, x_SBD: Tensor, positions_BS: Tensor, config: ResolvedRun) -> Tensor:
        """The same by the published formula, from the weights by their names; shares no code with the part."""
        raise NotImplementedError

    @classmethod
    def config(cls, layout: Layout = ONE_PROCESS, **model: Any) -> ResolvedRun:
        return run_config(cls.family, layout, model={**cls.model, **model}, data=cls.data)

    @classmethod
    def weights(cls, config: ResolvedRun) -> Weights:
        """Whole weights in FP64, none of them a neutral one."""
        generator = torch.Generator().manual_seed(1)
        shapes = {name: p.shape for name, p in cls.build(config, Layers()).named_parameters()}
        return {name: 0.5 * torch.randn(shape, generator=generator).double() for name, shape in shapes.items()}

    @classmethod
    def with_weights(cls, config: ResolvedRun, layers: Layers) -> nn.Module:
        """The part with this rank's share of ``weights``."""
        part = cls.build(config, layers).double()
        with torch.no_grad():
            for name, parameter in part.named_parameters():
                parameter.copy_(layers.local_part(cls.weights(config)[name], parameter))
        return part

    @classmethod
    def whole(cls, documents: bool = False, **model: Any) -> tuple[Tensor, Tensor, Weights]:
        """By the formula: the output, the gradient of the input and those of the weights."""
        config = cls.config(**model)
        weights = {name: weight.requires_grad_() for name, weight in cls.weights(config).items()}
        x = activations().requires_grad_()
        positions = positions_of(*DOCUMENTS) if documents else positions_of(*[[SEQ]] * BATCH)
        y = cls.expected(weights, x, positions, config)
        (y * outer()).sum().backward()
        zeros = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        assert x.grad is not None
        return y.detach(), x.grad, {name: zeros[name] if w.grad is None else w.grad for name, w in weights.items()}

    def near(self, found: Tensor, expected: Tensor, what: str) -> None:
        assert found.shape == expected.shape, what
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3))
        assert error <= self.error, f"{what} is off by {error:.1e}"

    def test_output_and_gradients_are_the_formulas(self) -> None:
        for documents in self.documents:
            self.compare_on_one_rank(documents)

    def compare_on_one_rank(self, documents: bool = False, **model: Any) -> None:
        config, layers, x = self.config(**model), Layers(), activations().requires_grad_()
        part = self.with_weights(config, layers)
        y = self.run(part, x, layers, config, positions_of(*DOCUMENTS) if documents else None)
        (y * outer()).sum().backward()
        expected, of_x, of_weights = self.whole(documents, **model)
        assert x.grad is not None
        self.near(y.detach(), expected, "output")
        self.near(x.grad, of_x, "gradient of the input")
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            self.near(parameter.grad, of_weights[name], f"gradient of {name}")


def activations() -> Tensor:
    return torch.randn(SEQ, BATCH, WIDTH, generator=torch.Generator().manual_seed(2)).double()


def outer() -> Tensor:
    """What comes back from the loss."""
    return torch.randn(SEQ, BATCH, WIDTH, generator=torch.Generator().manual_seed(3)).double()


def positions_of(*sequences: list[int]) -> Tensor:
    """Places [B, S] in their documents, of sequences of documents of these lengths."""
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in sequences])


class SplitPartSuite(PartSuite):
    """What a part must hold besides whose weights or sequences are split: two ranks compute what one does."""

    layouts: ClassVar[tuple[Layout, ...]] = TENSOR

    def test_two_ranks_compute_the_same(self, pool: Pool) -> None:
        ranks = pool.run(run_on_rank, 2, type(self))
        for documents in self.documents:
            expected, of_x, of_weights = self.whole(documents)
            for layout in self.layouts:
                parts = [rank[layout, documents] for rank in ranks]
                for part in parts:
                    self.near(part["output"], expected[part["rows"]], f"{layout}: output")
                    self.near(part["of_x"], of_x[part["rows"]], f"{layout}: gradient of the input")
                for name, whole in of_weights.items():
                    for part in parts:
                        offset, own = part["of_weights"][name]
                        if layout.cp > 1:  # the engine sums over the ranks that share a sequence
                            own = sum(other["of_weights"][name][1] for other in parts)
                        place = tuple(slice(o, o + n) for o, n in zip(offset, own.shape, strict=True))
                        self.near(own, whole[place], f"{layout}: gradient of {name}")


def run_on_rank(suite: type[SplitPartSuite]) -> dict[tuple[Layout, bool], dict[str, Any]]:
    """Each layout's output and gradients on this rank: those of the ``rows`` that are here, and of its weights."""
    from megatrain.parallel.marks import place
    from megatrain.parallel.mesh import build_mesh, topology_of
    from megatrain.train.build import build_layers

    found = {}
    for layout in suite.layouts:
        config = suite.config(layout)
        mesh = build_mesh(topology_of(config.parallel), torch.device("cpu"))
        layers = build_layers(config, mesh)
        rows = layers.context.positions(SEQ // layout.cp)
        if layout.sequence_parallel:
            rows = rows.chunk(layout.tp)[mesh.coordinate("tp")]
        for documents in suite.documents:
            part = suite.with_weights(config, layers)
            x = activations()[rows].requires_grad_()
            y = suite.run(part, x, layers, config, positions_of(*DOCUMENTS) if documents else None)
            (y * outer()[rows]).sum().backward()
            found[layout, documents] = {
                "rows": rows,
                "output": y.detach(),
                "of_x": x.grad,
                "of_weights": {
                    name: (place(p, p.shape, layers.splits)[0], p.grad) for name, p in part.named_parameters()
                },
            }
    return found


class EachPositionSuite(PartSuite):
    """What a part must hold besides that mixes no positions."""

    def test_a_position_is_by_itself(self) -> None:
        config, layers, x = self.config(), Layers(), activations()
        part = self.with_weights(config, layers)
        whole = self.run(part, x, layers, config, None)
        for position in range(SEQ):
            alone = self.run(part, x[position : position + 1], layers, config, None)
            self.near(alone.detach(), whole[position : position + 1].detach(), f"position {position}")


class FeedForwardSuite(SplitPartSuite, EachPositionSuite):
    """What every feed-forward must hold. ``bias``: of its matrices; ``INNER`` is its inner width."""

    bias: ClassVar[bool] = False

    @classmethod
    def build(cls, config: ResolvedRun, layers: Layers) -> nn.Module:
        return cls.part(WIDTH, INNER, cls.bias, layers)

    @classmethod
    def run(
        cls, part: nn.Module, x_SBD: Tensor, layers: Layers, config: ResolvedRun, positions_BS: Tensor | None
    ) -> Tensor:
        return part(x_SBD, MicroBatch())


class NormSuite(EachPositionSuite):
    """What every norm must hold besides: it computes in the type of a wider stream, and returns that of its weights."""

    @classmethod
    def build(cls, config: ResolvedRun, layers: Layers) -> nn.Module:
        return cls.part(WIDTH, EPS)

    def test_a_wider_stream_is_rounded_once(self) -> None:
        config = self.config()
        x, layers = activations().float(), Layers()
        narrow = self.with_weights(config, layers).bfloat16()
        weights = {name: parameter.detach().double() for name, parameter in narrow.named_parameters()}
        found = self.run(narrow, x, layers, config, None)
        assert found.dtype == torch.bfloat16
        expected = self.expected(weights, x.double(), positions_of(*[[SEQ]] * BATCH), config)
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)
