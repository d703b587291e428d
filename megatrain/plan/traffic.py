"""The bytes that a rank must send in one step, as arithmetic of the layout.

Sources: Rajbhandari et al. 2020, section 7 (ZeRO); Shoeybi et al. 2019, section 3 (tensor); Korthikanti et al. 2022,
section 4.2 (sequence; with the second gathering of inputs that weight gradients need); Narayanan et al. 2021, section
2.2 (pipeline); Jacobs et al. 2023, section 3.2 (Ulysses); Dubey et al. 2024, section 3.3.2 (gathered keys and values);
Lepikhin et al. 2021, section 3.2 (experts).
"""

from torch import nn

from megatrain.config.pipeline_schedules import PIPELINE_SCHEDULES
from megatrain.config.schema import ResolvedRun
from megatrain.config.stages import num_stages, own_stages, rank_of_stage, stage_blocks
from megatrain.parallel.marks import is_spread, partition_dim
from megatrain.parallel.mesh import Mesh
from megatrain.spec.derive import mixture_layers

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def expected_bytes(
    config: ResolvedRun, mesh: Mesh, parameters: list[tuple[str, nn.Parameter]], expert_rows: int
) -> dict[str, float]:
    """Bytes by part of the layout.

    Args:
        parameters: this rank's, by canonical name; expert_rows: rows that went to and came from other ranks' experts
            in the forward passes of the step, which depend on the data.
    """
    topology, parallel = mesh.topology, config.parallel
    micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * topology.dp)
    spread = sum(_size(p) for _, p in parameters if is_spread(p))
    dense = sum(_size(p) for _, p in parameters) - spread
    parts = {
        "data": _replicas(config, dense, micro_batches, topology.data_size),
        "experts' copies": _replicas(config, spread, micro_batches, topology.edp),
        "experts": 2.0 * expert_rows * config.model.hidden_size * _BYTES[config.precision.dtype],
        "context": micro_batches * _context(config) * len(_own_blocks(config, mesh)),
        "tensor": micro_batches * _tensor(config, mesh) + _norms(config, mesh, parameters),
        "pipeline": float(micro_batches * _pipeline(config, mesh)),
    }
    at_an_end = parallel.pp > 1 and mesh.coordinate("pp") in (0, parallel.pp - 1)
    if at_an_end and config.model.tie_embeddings and not PIPELINE_SCHEDULES[parallel.pp_schedule].v_shaped:
        word = next(p for name, p in parameters if name == "embedding.word.weight")
        parts["tied embedding"] = _share(2) * 2 * _size(word) * _gradient_bytes(config)
    return {name: count for name, count in parts.items() if count}


def _share(ranks: int) -> float:
    """What a ring leaves out: a rank's own part."""
    return (ranks - 1) / ranks


def _size(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_shape", parameter.shape).numel()  # type: ignore[no-any-return]


def _gradient_bytes(config: ResolvedRun) -> int:
    return _BYTES[config.precision.dtype if config.precision.gradient_dtype != "fp32" else "fp32"]


def _activation(config: ResolvedRun) -> float:
    """Bytes [S, B, D] of a micro-batch's positions on a context rank."""
    positions = config.data.seq_len * config.train.micro_batch_size // config.parallel.cp
    return float(positions * config.model.hidden_size * _BYTES[config.precision.dtype])


def _own_blocks(config: ResolvedRun, mesh: Mesh) -> list[int]:
    blocks = stage_blocks(config)
    return [block for stage in own_stages(config.parallel, mesh.coordinate("pp")) for block in blocks[stage]]


def _replicas(config: ResolvedRun, weights: int, micro_batches: int, ranks: int) -> float:
    """Gradients (g bytes) and weights (w bytes) between the ranks that hold copies of P weights.

    ZeRO 0: all-reduce, 2 g P. 1: reduce-scatter once a step, all-gather: (g + w) P. 2: reduce-scatter of every
    micro-batch: (m g + w) P. 3: and all-gather forward and backward: m (2 w + g) P. All times (d - 1) / d.
    """
    g, w = _gradient_bytes(config), _BYTES[config.precision.dtype]
    each = (2 * g, g + w, micro_batches * g + w, micro_batches * (2 * w + g))[config.parallel.zero_stage]
    return _share(ranks) * each * weights


def _tensor(config: ResolvedRun, mesh: Mesh) -> float:
    """Traffic of one micro-batch, of n bytes of activations: a block all-reduces twice forward and twice backward.

    With sequence parallelism each of its two halves gathers n and scatters n, both ways, and gathers its input once
    more for the weight gradient: 5 n (4 n where experts keep what they gathered). The embedding, whose table is split,
    sums once, the head's input gradient once; the loss needs three numbers of each token.
    """
    parallel, n = config.parallel, _activation(config)
    stages = own_stages(parallel, mesh.coordinate("pp"))
    first, last = 0 in stages, num_stages(parallel) - 1 in stages
    block, embedding, head = (10 * n, 2 * n, 3 * n) if parallel.sequence_parallel else (8 * n, 2 * n, 2 * n)
    if parallel.sequence_parallel and config.model.norm.kind == "layer_norm":
        embedding = 3 * n  # learned positions are added to the whole sequence: summed whole, gathered backward
    loss = 3 * 2 * 4.0 * config.data.seq_len * config.train.micro_batch_size / parallel.cp
    blocks = _own_blocks(config, mesh)
    mixtures = len(set(blocks) & set(mixture_layers(config.model))) if parallel.sequence_parallel else 0
    total = block * len(blocks) - n * mixtures + first * embedding + last * (head + loss)
    return _share(parallel.tp) * total


def _norms(config: ResolvedRun, mesh: Mesh, parameters: list[tuple[str, nn.Parameter]]) -> float:
    """One sum a step of the gradients of what every tensor rank holds whole and sees a part of: norms, routers."""
    norms = config.parallel.sequence_parallel
    whole = [p for name, p in parameters if partition_dim(p) is None]
    seen = sum(_size(p) for p in whole if (p.dim() == 1 and norms) or p.shape[0] == config.model.experts.num_experts)
    return _share(config.parallel.tp) * 2 * _gradient_bytes(config) * seen


def _context(config: ResolvedRun) -> float:
    """Traffic of a micro-batch and block: keys and values gathered, their gradients scattered, or four all-to-alls."""
    parallel, model = config.parallel, config.model
    heads, groups = (
        model.attention.num_heads // parallel.tp,
        model.attention.num_kv_heads // parallel.tp,
    )
    width = (
        config.data.seq_len
        * config.train.micro_batch_size
        * model.attention.head_width
        * _BYTES[config.precision.dtype]
    )
    if parallel.cp_method == "ulysses":
        groups *= -(-parallel.cp // groups) if groups % parallel.cp else 1  # a head that serves several ranks
        return _share(parallel.cp) * 2 * (2 * heads + 2 * groups) * width / parallel.cp
    return _share(parallel.cp) * 2 * 2 * groups * width


def _pipeline(config: ResolvedRun, mesh: Mesh) -> float:
    """Traffic of a micro-batch: activations to the next stage, gradients to the one before, if it is another rank's."""
    parallel, own = config.parallel, mesh.coordinate("pp")
    sent = _activation(config) / (parallel.tp if parallel.sequence_parallel else 1)
    total = num_stages(parallel)
    neighbours = [s + side for s in own_stages(parallel, own) for side in (-1, 1) if 0 <= s + side < total]
    return sent * sum(rank_of_stage(parallel, stage) != own for stage in neighbours)
