"""Silent bugs that were reported of other trainers, each planted where ours has a place for it.

NVIDIA/Megatron-LM 7452 is a list of eleven of them, huggingface/transformers 48687 and 48205 are of expert ranks; the
others are older, and come again and again.
"""

from tests.mutants.mutant import Mutant


def _m(public: str, file: str, old: str, new: str, *see: str) -> Mutant:
    return Mutant(f"{file}.py", old, new, "public", see, public)


_CROSS_ENTROPY = "return tensor_parallel.vocab_parallel_cross_entropy(logits_SBV, labels_SB.contiguous())"

MUTANTS = [
    _m(
        "a loss normalised over the rank's own part of the vocabulary (Megatron-LM 7452, finding 1; 737)",
        "parallel/tensor",
        _CROSS_ENTROPY,
        "return super().cross_entropy(logits_SBV, labels_SB % logits_SBV.shape[-1])",
        "tp",
    ),
    _m(
        "gathered logits in a loss for split ones: too large by log(tp) (Megatron-LM 7452)",
        "parallel/tensor",
        _CROSS_ENTROPY,
        "return super().cross_entropy(logits_SBV, labels_SB % logits_SBV.shape[-1]) + torch.tensor(self.size).log()",
        "tp",
    ),
    _m(
        "side losses of a router counted tp times (Megatron-LM 5047)",
        "parallel/routing",
        "loss_factor * self.gradient_share",
        "loss_factor",
        "ep-all",
    ),
    _m(
        "a balance loss from the counts of one context rank (Megatron-LM 1652, 4302)",
        "parallel/layers",
        "return self.context.total(x)",
        "return x",
        "experts-cp",
    ),
    _m(
        "a loss per token divided by local counts, unequal over data and context ranks (Megatron-LM 7452, finding 3)",
        "engine/engine",
        "        dist.all_reduce(count, group=self.mesh.data_group)\n",
        "        count *= self.mesh.topology.data_size\n",
        "dp",
    ),
    _m(
        "a loss per token divided by the counts of the data ranks alone (verl 6609)",
        "engine/engine",
        "dist.all_reduce(count, group=self.mesh.data_group)",
        "dist.all_reduce(count, group=self.mesh.cp_group)\n        count *= self.mesh.topology.dp",
        "dp",
    ),
    _m(
        "a loss scaled by the size of the context axis (Megatron-LM 673)",
        "engine/engine",
        "self.mesh.topology.data_size if self.config.parallel.zero_stage > 0 else 1",
        "self.mesh.topology.dp if self.config.parallel.zero_stage > 0 else 1",
        "cp",
    ),
    _m(
        "a loss scaled by the size of the tensor axis",
        "engine/engine",
        "self._gradient_factor() / num_tokens",
        "self._gradient_factor() * self.mesh.topology.tp / num_tokens",
        "tp",
    ),
    _m(
        "activations made again in another group (Megatron-LM 7452)",
        "parallel/column",
        "whole = gather_first_dim(x, ctx.group) if ctx.split_sequence else x\n        summand",
        "whole = gather_first_dim(x, dist.group.WORLD)[: len(x) * dist.get_world_size(ctx.group)] "
        "if ctx.split_sequence else x\n        summand",
        "tp-dp",
    ),
    _m(
        "replicated weights counted tp times in the gradient norm (TransformerEngine 715)",
        "engine/zero/mpu",
        'return self._mesh.coordinate("tp")',
        "return 0",
        "tp",
    ),
    _m(
        "split weights without their mark, left out of the norm (Megatron-LM 7452, finding 8; 5916)",
        "engine/zero/mpu",
        "self._mesh.model_group if self._sharded else self._mesh.expert_model_group",
        "self._mesh.pp_group",
        "tp",
    ),
    _m(
        "a tied embedding counted twice in the gradient norm (Megatron-LM 7227)",
        "engine/engine",
        "            for name, parameter in self.parameters:\n                if name ==",
        "            for name, parameter in ():\n                if name ==",
        "pp",
    ),
    _m(
        "experts left out of the norm of ranks that hold others (Megatron-LM 5916)",
        "engine/zero/mpu",
        "self._sharded else self._mesh.expert_model_group",
        "self._sharded else self._mesh.model_group",
        "ep",
    ),
    _m(
        "a router's gradient from a part of its experts (transformers 48687)",
        "parallel/experts",
        "        return drows, dgates, None",
        "        num_own = len(ctx.saved_tensors[0]) // getattr(ctx.exchange, 'size', 1)\n"
        "        dgates = dgates * (ctx.saved_tensors[2] < num_own)\n"
        "        return drows, dgates, None",
        "ep",
    ),
    _m(
        "gradients of a mixture's input that are parts, never summed (transformers 48205, finding 2)",
        "parallel/tensor",
        "return tensor_parallel.copy_to_tensor_model_parallel_region(x_SBD, group=self.group)",
        "return x_SBD",
        "experts-tp",
    ),
    _m(
        "gates that reach other ranks without a gradient (Automodel 2995)",
        "parallel/experts",
        "        return drows, dgates, None",
        '        return drows, dgates if not hasattr(ctx.exchange, "size") else torch.zeros_like(dgates), None',
        "ep",
    ),
    _m(
        "norms' gradients of a split sequence, unsummed (Megatron-Bridge 5411, Megatron-DeepSpeed 274)",
        "parallel/tensor",
        "    def on_split_sequence(self, module: nn.Module) -> nn.Module:\n        if self.sequence_parallel:",
        "    def on_split_sequence(self, module: nn.Module) -> nn.Module:\n        if False:",
        "sp",
    ),
    _m(
        "averaged twice over data ranks",
        "engine/engine",
        "return self.mesh.topology.data_size if self.config.parallel.zero_stage > 0 else 1",
        "return 1",
        "dp",
    ),
    _m(
        "experts' gradients divided by the size of the expert axis",
        "engine/zero/experts",
        "        mark(parameter, expert_group=name)\n",
        "        mark(parameter, expert_group=name)\n"
        "        parameter.register_hook(lambda gradient: gradient / mesh.topology.ep)\n",
        "ep",
    ),
    _m(
        "experts' gradients summed over ranks that hold others",
        "engine/zero/experts",
        "groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.edp_group",
        "groups._EXPERT_DATA_PARALLEL_GROUP[name] = mesh.data_group",
        "ep",
    ),
    _m(
        "accumulation that averages averages (transformers 34191)",
        "engine/engine",
        "self.runtime.backward(losses.sum() * factor)",
        "self.runtime.backward(losses.sum() / max(1, int((micro_batch.labels != IGNORE).sum())) "
        "/ len(self._split(inputs)) * self._gradient_factor())",
        "reference",
    ),
    _m(
        "accumulation that averages averages in a pipeline (transformers 34191)",
        "parallel/pipeline",
        "scale_grads=False",
        "scale_grads=True",
        "pp",
    ),
    _m(
        "positions from zero on every context rank",
        "models/decoder",
        "own_positions(self.factory.positions(num_positions, device), documents)",
        "own_positions(self.factory.positions(num_positions, device).argsort(), documents)",
        "cp-llama",
    ),
    _m(
        "capacity by the tokens of one context rank",
        "parallel/layers",
        "return self.context.in_order(x_S)",
        "return x_S",
        "ep-all",
    ),
    _m(
        "copies of one key head whose gradients are not summed (bigcode Megatron-LM 35)",
        "parallel/context",
        "x.repeat_interleave(copies, dim=2) for x",
        "torch.cat([x] + [x.detach()] * (copies - 1), dim=2) for x",
        "ulysses-gqa",
    ),
    _m(
        "an overflow that ranks of one model do not share: other loss scales (fairseq2 1374)",
        "engine/zero/mpu",
        "return self._mesh.model_group if self._sharded else self._mesh.expert_model_group",
        "return self._mesh.self_group",
        "16-bit",
    ),
    _m(
        "labels of a split sequence that are another part's",
        "engine/engine",
        "tokens[:, own], labels[:, own]",
        "tokens[:, own], labels[:, : len(own)]",
        "cp",
    ),
    _m(
        "one mask of dropout on all tensor ranks (Megatron-LM 7452: another group's random state)",
        "parallel/tensor",
        "self.context.head_part(self.rank)",
        "self.context.head_part(0)",
        "dropout-tp",
    ),
    _m(
        "a skipped step that moves the balance biases all the same",
        "engine/engine",
        "self.routers.end_step(updated=updated.applied)",
        "self.routers.end_step(updated=True)",
        "skips",
    ),
]

NO_PLACE = {
    "label smoothing over tensor ranks (Megatron-LM 7452, finding 1; 737; 5522)": "there is no label smoothing; "
    "megatron-core's is wrong over tensor ranks, so whoever adds it writes it in parallel/tensor.py",
    "a loss of several tokens ahead with local counts (Megatron-LM 7452, finding 3)": "there is no such loss; "
    "local counts are planted in the one that there is",
    "embeddings of images scattered over the wrong tensor group (Megatron-LM 7452, finding 7)": "there are no images, "
    "and a process knows one tensor group",
    "attention sinks left out of the norm (Megatron-LM 7452, finding 8)": "there are no sinks; marks of split weights "
    "also place their initial values, so a weight without its mark has another shape at once",
    "recomputation with the random state of another group (Megatron-LM 7452)": "dropout is a function of the sample, "
    "so recomputation has no random state; masks of another group are planted instead",
    "sentinel rows of a grouped product that are never written (transformers 48205, finding 1)": "rows without an "
    "expert are not sent, so no product has rows that it does not write",
    "experts without tokens that keep no gradient (Automodel 2995)": "all experts of a rank are one tensor",
}
"""Classes that ours has no place for, and why."""
