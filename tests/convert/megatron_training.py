"""Megatron-core's optimizers around its GPT model on CPU ranks: they train, save and load its checkpoints."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from megatrain.spec.schema import ModelSpec
from tests.convert.megatron_model import States, random_model, run, save

# as Megatron-LM saves with --dist-ckpt-optim-fully-reshardable
CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True)
class OptimizerKind:
    """Which of the optimizers: distributed or not, with FP32 weights or BF16's and masters, experts spread over ranks.

    In BF16 they are around an AdamW with its states where Transformer Engine's has them, in FP32 around torch's.
    """

    distributed: bool = False
    bf16: bool = False
    expert_ranks: int = 1


class FusedAdam(torch.optim.Optimizer):
    """AdamW whose step and ``bias_correction`` stand in the groups, and whose states are the moments and nothing else.

    Transformer Engine's needs a GPU; Megatron-core's distributed optimizer cannot load its states around torch's, which
    has a step for each parameter.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float,
        betas: Any,
        eps: float,
        adam_w_mode: bool,
        capturable: bool = False,  # Megatron-core 0.17 and later say it
    ):
        assert adam_w_mode and not capturable
        settings = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "bias_correction": True}
        super().__init__(params, settings)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in self.state.values())

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                state = self.state[parameter]
                for moment in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(moment, torch.zeros_like(parameter))
                beta1, beta2 = group["betas"]
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
                first, second = (
                    1 - beta ** group["step"] if group["bias_correction"] else 1.0 for beta in group["betas"]
                )
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(
                    group["lr"] * state["exp_avg"] / first / ((state["exp_avg_sq"] / second).sqrt() + group["eps"])
                )


def train_and_save(folder: str, model: ModelSpec, tokens: torch.Tensor, kind: OptimizerKind, **content: Any) -> States:
    """Two steps, then a checkpoint with the optimizer's states, of which this returns some."""
    with _optimizers_on_cpus(kind):
        gpt, optimizer = _training(model, kind, seed=3)
        for _ in range(2):
            _step(gpt, optimizer, tokens)
        _save_with_states(folder, gpt.module, optimizer, **content)
        return _states(gpt.module, optimizer)


def load_and_save(source: str, target: str, model: ModelSpec, tokens: torch.Tensor, kind: OptimizerKind) -> States:
    """Loads a checkpoint into another model and its optimizer, saves them again, and trains on."""
    from megatron.core import dist_checkpointing

    content = dist_checkpointing.load_content_metadata(source)
    with _optimizers_on_cpus(kind):
        gpt, optimizer = _training(model, kind, seed=4)
        sharded = gpt.module.sharded_state_dict(metadata=dict(content))
        states = optimizer.sharded_state_dict(sharded, is_loading=True, metadata=dict(content))
        loaded = dist_checkpointing.load({"model": sharded, "optimizer": states}, source)
        gpt.module.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
        _save_with_states(target, gpt.module, optimizer)
        found = _states(gpt.module, optimizer)
        _step(gpt, optimizer, tokens)
        return found


def _training(model: ModelSpec, kind: OptimizerKind, seed: int) -> tuple[Any, Any]:
    """A random model for training, and the optimizers that Megatron-core makes for it."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    gpt = random_model(model, seed, expert_ranks=kind.expert_ranks)
    gpt = gpt.bfloat16() if kind.bf16 else gpt
    config = DistributedDataParallelConfig(use_distributed_optimizer=kind.distributed)
    wrapped = DistributedDataParallel(gpt.config, config, gpt)
    options = OptimizerConfig(optimizer="adam", lr=1e-2, bf16=kind.bf16, use_distributed_optimizer=kind.distributed)
    return wrapped, get_megatron_optimizer(options, [wrapped])


def _step(gpt: Any, optimizer: Any, tokens: torch.Tensor) -> None:
    gpt.zero_grad_buffer()
    run(gpt, tokens).float().logsumexp(-1).mean().backward()
    gpt.finish_grad_sync()
    optimizer.prepare_grads()
    assert optimizer.step_with_ready_grads()


@contextlib.contextmanager
def _optimizers_on_cpus(kind: OptimizerKind) -> Iterator[None]:
    """CPU tensors where the optimizers ask for a GPU's, and an AdamW like Transformer Engine's."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    tensor, type_name = torch.tensor, torch.Tensor.type

    def named(values: torch.Tensor, *wanted: Any, **options: Any) -> Any:
        found = type_name(values, *wanted, **options)
        return found if wanted or options else found.replace("torch.", "torch.cuda.")

    with contextlib.ExitStack() as patches:
        if kind.bf16:
            enter = [(optimizer, {"Adam": FusedAdam, "USING_PYTORCH_OPTIMIZER": False})]
            states = {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True}
            for module, values in (*enter, (distrib_optimizer, states)):
                patches.enter_context(mock.patch.multiple(module, **values))
        as_on_cpu = {"tensor": lambda *values, device=None, **options: tensor(*values, **options)}
        patches.enter_context(mock.patch.multiple(torch, **as_on_cpu))
        # 0.19 asks for the stream that would have to wait for replayed graphs, of which there are none
        patches.enter_context(mock.patch.object(torch.cuda, "current_stream", lambda: None))
        patches.enter_context(mock.patch.multiple(torch.Tensor, type=named, cuda=lambda values, *_, **__: values))
        yield


def _save_with_states(folder: str, gpt: Any, optimizer: Any, **others: Any) -> None:
    content = CONTENT | others
    sharded = gpt.sharded_state_dict(metadata=dict(content))
    states = optimizer.sharded_state_dict(sharded, metadata=dict(content))
    save(folder, {"iteration": 2, "model": sharded, "optimizer": states}, content_metadata=content)


def _states(gpt: Any, chain: Any) -> States:
    """Weights, and the moments of those parameters that their optimizer holds whole and without masters."""
    states, found = chain.chained_optimizers[0].optimizer.state, {}
    for name, parameter in gpt.named_parameters():
        found["weight", name] = parameter.detach().clone()
        for kind, values in states.get(parameter, {}).items():
            found[kind, name] = values.clone()
    return found
