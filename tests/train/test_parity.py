"""The parity tool finds nothing where there is nothing, and names each of the classic mistakes planted here."""

import ast
import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatrain.train.parity_compare import BANDS, Divergence, compare
from tests.layouts import ONE_PROCESS, Layout, run_config
from tests.parallel.test_mixture import MODELS
from tests.pool import Pool

EXPERTS = MODELS["llama"]
LR = 5e-3  # run_config warms up to 1e-2 in two steps


def capture(
    family: str, layout: Layout, change: Callable[[Any], None] | None = None, sections: dict[str, Any] | None = None
) -> Any:
    from megatrain.train.parity import capture_step

    # four micro-batches a rank and more: the mistakes are planted in one of them
    config = run_config(family, layout, **{"train": {"micro_batch_size": 2}, **(sections or {})})
    if config.precision.dtype == "fp16":
        from deepspeed.accelerator import get_accelerator

        get_accelerator().is_fp16_supported = lambda: True
    return capture_step(config, torch.device("cpu"), change)


@functools.cache
def one_process(pool: Pool, family: str, sections: str) -> list[Any]:
    return pool.run(capture, 1, family, ONE_PROCESS, None, ast.literal_eval(sections))


def differences(
    pool: Pool, family: str, layout: Layout, change: Callable[[Any], None] | None = None, **sections: Any
) -> list[Divergence]:
    reference = one_process(pool, family, repr(sections))
    ranks = pool.run(capture, layout.world_size, family, layout, change, sections)
    dtype = sections.get("precision", {}).get("dtype", "fp32")
    return compare(ranks, reference, BANDS[dtype], LR)


@pytest.mark.parametrize(
    ("family", "layout", "dtype"),
    [
        ("gpt", Layout(tp=2, pp=2, sequence_parallel=True, zero_stage=1), "fp32"),
        ("llama", Layout(dp=2, zero_stage=3), "fp32"),
        ("llama", Layout(pp=2, schedule="zbv"), "bf16"),
        ("llama", Layout(tp=2, dp=2, zero_stage=2), "fp16"),
    ],
    ids=str,
)
def test_right_layouts_are_equal(pool: Pool, family: str, layout: Layout, dtype: str) -> None:
    assert differences(pool, family, layout, precision={"dtype": dtype}) == []


def test_an_optimizer_that_keeps_no_gradient(pool: Pool) -> None:
    """Its weights are compared, and a gradient that is lost shows in them."""
    layout, sections = Layout(dp=2, zero_stage=1), {"optimizer": {"name": "adafactor", "lr": 1e-2}}
    assert differences(pool, "llama", layout, **sections) == []
    found = differences(pool, "llama", layout, forget_a_weight, **sections)
    assert "weight of layers.0.feed_forward.up.weight" in {difference.what for difference in found}


def forget_a_weight(engine: Any) -> None:
    """Its gradient is zero, so its step too."""
    dict(engine.parameters)["layers.0.feed_forward.up.weight"].register_hook(lambda gradient: gradient * 0)


def modules(engine: Any, kind: type) -> list[nn.Module]:
    return [module for module in engine.model.modules() if isinstance(module, kind)]


def forget_the_sum_of_norm_gradients(engine: Any) -> None:
    for name, parameter in engine.parameters:
        if "norm" in name and parameter._backward_hooks:
            parameter._backward_hooks.clear()


def shift_the_vocabulary(engine: Any) -> None:
    from megatron.core.tensor_parallel import VocabParallelEmbedding

    if engine.mesh.coordinate("tp") == 1:
        for module in modules(engine, VocabParallelEmbedding):
            module.vocab_start_index += 1  # type: ignore[operator, assignment]
            module.vocab_end_index += 1  # type: ignore[operator, assignment]


def sum_tied_gradients_twice(engine: Any) -> None:
    reduce = engine._reduce_what_deepspeed_does_not
    engine._reduce_what_deepspeed_does_not = lambda: (reduce(), reduce())


def average_averages(engine: Any) -> None:
    engine._global_loss_tokens = lambda labels: int((labels != -100).sum()) * engine.mesh.topology.dp


def drop_the_last_micro_batch(engine: Any) -> None:
    split = engine._split
    engine._split = lambda inputs: split(inputs)[:-1]


def forget_a_backward(engine: Any) -> None:
    backward, calls = engine._deepspeed.backward, []

    def all_but_one(loss: Tensor, **options: Any) -> None:
        calls.append(1)
        backward(loss if len(calls) < 4 else loss * 0, **options)

    engine._deepspeed.backward = all_but_one


def count_positions_from_zero(engine: Any) -> None:
    from megatrain.models.rotary import Rotary

    for module in modules(engine, Rotary):
        turn = module.forward
        module.forward = lambda at, length, turn=turn: turn(at - at.min(), length)  # type: ignore[method-assign]


def overflow_alone(engine: Any) -> None:
    engine.optimizer.has_overflow = lambda partition_gradients=True: engine.mesh.rank == 1


def average_instead_of_sum(engine: Any) -> None:
    engine._gradient_factor = lambda: 1


def count_a_tied_copy_twice(engine: Any) -> None:
    for _, parameter in engine.parameters:
        parameter.ds_pipe_replicated = False


def scatter_the_wrong_chunk(engine: Any) -> None:
    for name, parameter in engine.parameters:
        if name == "layers.2.attention.query_key_value.weight":
            parameter.data.copy_(parameter.data.flip(0))


MISTAKES = [
    (forget_the_sum_of_norm_gradients, "llama", Layout(tp=2, sequence_parallel=True), "gradient of final_norm.weight"),
    (shift_the_vocabulary, "llama", Layout(tp=2), "activation of embedding"),
    (sum_tied_gradients_twice, "gpt", Layout(pp=2), "gradient of embedding.word.weight"),
    (average_averages, "llama", Layout(dp=2), "loss"),
    (drop_the_last_micro_batch, "llama", Layout(dp=2, zero_stage=1), "activation of embedding"),
    (forget_a_backward, "llama", Layout(dp=2, zero_stage=2), "gradient of final_norm.weight"),
    (count_positions_from_zero, "llama", Layout(cp=2), "activation of layers.0"),
    (average_instead_of_sum, "llama", Layout(dp=2, zero_stage=1), "gradient of final_norm.weight"),
    (count_a_tied_copy_twice, "gpt", Layout(pp=2, zero_stage=1), "gradient norm"),
    (scatter_the_wrong_chunk, "llama", Layout(pp=2), "activation of layers.2"),
]


@pytest.mark.parametrize(("mistake", "family", "layout", "first"), MISTAKES, ids=lambda x: getattr(x, "__name__", None))
def test_a_mistake_is_found_and_named(
    pool: Pool, mistake: Callable[[Any], None], family: str, layout: Layout, first: str
) -> None:
    found = differences(pool, family, layout, mistake)
    assert found and found[0].what == first, [str(difference) for difference in found[:5]]


def test_an_overflow_that_one_rank_keeps_to_itself(pool: Pool) -> None:
    found = differences(pool, "llama", Layout(dp=2), overflow_alone, precision={"dtype": "fp16"})
    assert (found[0].what, found[0].rank) == ("skipped", 1)


def sum_experts_over_the_wrong_group(engine: Any) -> None:
    object.__setattr__(engine.mesh, "edp_group", engine.mesh.ep_group)


def test_an_experts_gradient_summed_over_the_wrong_group(pool: Pool) -> None:
    layout = Layout(dp=2, ep=2)
    assert differences(pool, "llama", layout, model=EXPERTS) == []
    found = differences(pool, "llama", layout, sum_experts_over_the_wrong_group, model=EXPERTS)
    last = EXPERTS["num_layers"] - 1  # its gradients are made first
    assert found[0].what.startswith(f"gradient of layers.{last}.feed_forward.experts.")
    assert all(".experts." in difference.what for difference in found if "gradient of" in difference.what)


def test_the_program_says_equal_and_refuses(tmp_path: Path) -> None:
    small = ["--model.num_layers", "2", "--model.hidden_size", "32", "--model.num_heads", "4", "--data.seq_len", "16"]
    command = [sys.executable, "launch/parity.py", "--layout", "pp=2", *small, "--precision.dtype", "fp32"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("equal: ")
    command[3] = "pp=3"
    refused = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "model.num_layers" in refused.stderr
