"""The parity tool finds nothing where there is nothing, and names each of the mistakes planted here, in BF16 too."""

import ast
import contextlib
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.parity.bands import Bands
from megatrain.parity.compare import Divergence, compare
from megatrain.parity.run import DRAWS
from tests.layouts import ONE_PROCESS, Layout, run_config
from tests.parallel.test_mixture import MODELS
from tests.parity import mistakes
from tests.pool import Pool
from tests.programs import run_program

Change = Callable[[Any], None]
Patch = tuple[str, Callable[..., Any]]


def capture(
    family: str,
    layout: Layout,
    sections: dict[str, Any],
    change: Change | Patch | None = None,
    draws: int = 0,
    steps: int = 3,
) -> list[Any]:
    """Undisturbed, then in ``draws`` of noise. ``change``: of an engine, or of what the engine's file imports."""
    from megatrain.parity.capture import capture_steps

    # four micro-batches a rank and more: the mistakes are planted in one of them
    config = run_config(family, layout, **sections | {"train": {"micro_batch_size": 2, **sections.get("train", {})}})
    of_file = isinstance(change, tuple)
    with mistakes.in_place_of(*change) if of_file else contextlib.nullcontext():  # type: ignore[misc]
        plant = None if of_file else change
        return [capture_steps(config, torch.device("cpu"), plant, n, steps) for n in range(1 + draws)]  # type: ignore[arg-type]


@functools.cache
def one_process(pool: Pool, family: str, sections: str) -> Bands:
    [captures] = pool.run(capture, 1, family, ONE_PROCESS, ast.literal_eval(sections), draws=DRAWS)
    return Bands([[captured] for captured in captures])


def differences(
    pool: Pool, family: str, layout: Layout, change: Change | Patch | None = None, steps: int = 3, **sections: Any
) -> list[Divergence]:
    bands = one_process(pool, family, repr(sections))
    ranks = pool.run(capture, layout.world_size, family, layout, sections, change, steps=steps)
    return compare([captured for [captured] in ranks], bands)


@pytest.mark.parametrize(
    ("family", "layout", "dtype"),
    [
        ("gpt", Layout(tp=2, pp=2, sequence_parallel=True, zero_stage=1), "fp32"),
        ("llama", Layout(dp=2, zero_stage=3), "bf16"),
        ("llama", Layout(tp=2, pp=2, schedule="zbv"), "bf16"),
        ("llama", Layout(tp=2, dp=2, zero_stage=2), "fp16"),
    ],
    ids=str,
)
def test_right_layouts_are_equal(pool: Pool, family: str, layout: Layout, dtype: str) -> None:
    assert differences(pool, family, layout, precision={"dtype": dtype}) == []


def test_a_mixture_in_bf16(pool: Pool) -> None:
    """Rounding changes some choices of experts, and with them the balance biases; a wrong direction changes all."""
    sections = {"model": MODELS["gpt"], "precision": {"dtype": "bf16"}}
    layout = Layout(tp=2, dp=2, ep=2, zero_stage=1)
    assert differences(pool, "gpt", layout, **sections) == []
    found = differences(pool, "gpt", layout, mistakes.move_biases_the_wrong_way, steps=1, **sections)
    assert {difference.what for difference in found} == {"balance bias of routers"}


def test_an_optimizer_that_keeps_no_gradient(pool: Pool) -> None:
    """Its factors and updates are compared, and a gradient that is lost shows in them."""
    layout = Layout(dp=2, zero_stage=1)
    sections = {"optimizer": {"name": "adafactor", "lr": 1e-2}, "precision": {"dtype": "bf16"}}
    assert differences(pool, "llama", layout, **sections) == []
    found = differences(pool, "llama", layout, mistakes.forget_a_weight, steps=1, **sections)
    lost = {difference.what for difference in found}
    assert {f"{kind} of layers.0.feed_forward.up.weight" for kind in ("update", "exp_avg_sq_rows")} < lost


NORM_OF_TP = "gradient norm against the gradients"
LAST_SUM = "sum over backward passes of head.weight"
# attention begins even, whatever the turns: in BF16 rounding hides them but in the gradients of queries and keys
TURNED = {"fp32": "activation of layers.0", "bf16": "gradient of layers.4.attention.query_key_value.weight"}
MISTAKES: list[tuple[Change | Patch, str, Layout, str | dict[str, str]]] = [
    (
        mistakes.forget_the_sum_of_norm_gradients,
        "llama",
        Layout(tp=2, sequence_parallel=True),
        "gradient of final_norm",
    ),
    (mistakes.shift_the_vocabulary, "llama", Layout(tp=2), "activation of embedding"),
    (mistakes.sum_tied_gradients_twice, "gpt", Layout(pp=2), "gradient of embedding.word"),
    (mistakes.average_averages, "llama", Layout(dp=2), "loss"),
    (mistakes.drop_the_last_micro_batch, "llama", Layout(dp=2, zero_stage=1), "activation of embedding"),
    (mistakes.forget_a_backward, "llama", Layout(dp=2, zero_stage=2), "gradient of final_norm"),
    (mistakes.count_positions_from_zero, "llama", Layout(cp=2), TURNED),
    (mistakes.average_instead_of_sum, "llama", Layout(dp=2, zero_stage=1), "gradient of final_norm"),
    (mistakes.count_a_tied_copy_twice, "gpt", Layout(pp=2, zero_stage=1), NORM_OF_TP),
    (mistakes.scatter_the_wrong_chunk, "llama", Layout(pp=2), "activation of layers.2"),
    (mistakes.update_nothing, "llama", Layout(dp=2, zero_stage=1), "update of embedding.word"),
    (mistakes.double_the_rate, "llama", Layout(dp=2, zero_stage=3), "update of embedding.word"),
    (mistakes.forget_the_decay, "llama", Layout(dp=2, zero_stage=2), "update of embedding.word"),
    (mistakes.count_replicated_norms_on_each_rank, "llama", Layout(tp=2), NORM_OF_TP),
    (
        ("engine.all_reduce_each", mistakes.sum_replicas_in_16_bits),
        "llama",
        Layout(dp=2),
        {"bf16": LAST_SUM, "fp32": "gradient of final_norm"},  # in FP32 the rounding alone is above the band
    ),
    (("zero.start.deepspeed_config", mistakes.reduce_in_16_bits), "llama", Layout(dp=2, zero_stage=1), LAST_SUM),
    (("zero.start.deepspeed_config", mistakes.reduce_in_16_bits), "llama", Layout(dp=2, zero_stage=2), LAST_SUM),
]


def name_of(value: object) -> str | None:
    return getattr(value[1] if isinstance(value, tuple) else value, "__name__", None)


@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("mistake", "family", "layout", "first"), MISTAKES, ids=name_of)
def test_a_mistake_is_found_and_named(
    pool: Pool, mistake: Change | Patch, family: str, layout: Layout, first: str | dict[str, str], dtype: str
) -> None:
    if dtype == "fp32" and mistake == ("zero.start.deepspeed_config", mistakes.reduce_in_16_bits):
        pytest.skip("DeepSpeed reduces FP32 weights' gradients as they are")
    found = differences(pool, family, layout, mistake, steps=1, precision={"dtype": dtype})
    wanted = first if isinstance(first, str) else first[dtype]
    assert found and found[0].what.startswith(wanted), [str(difference) for difference in found[:5]]


def test_clipping_by_a_wrong_norm(pool: Pool) -> None:
    """The first step is not clipped, the second is: what was divided by too much is small in its moments."""
    layout, sections = Layout(dp=2, zero_stage=2), {"precision": {"dtype": "bf16"}}
    found = differences(pool, "llama", layout, mistakes.clip_twice_as_hard, steps=2, **sections)
    assert {(difference.step, difference.what.split(" of ")[0]) for difference in found} >= {(2, "exp_avg")}
    assert all(difference.step == 2 for difference in found)


def test_an_overflow_that_one_rank_keeps_to_itself(pool: Pool) -> None:
    found = differences(pool, "llama", Layout(dp=2), mistakes.overflow_alone, steps=1, precision={"dtype": "fp16"})
    assert (found[0].what, found[0].rank) == ("skipped", 1)


def test_an_experts_gradient_summed_over_the_wrong_group(pool: Pool) -> None:
    sections = {"model": MODELS["llama"], "precision": {"dtype": "bf16"}}
    layout, mistake = Layout(dp=2, ep=2), mistakes.sum_experts_over_the_wrong_group
    found = differences(pool, "llama", layout, mistake, steps=1, **sections)
    last = MODELS["llama"]["num_layers"] - 1  # its gradients are made first
    assert found[0].what.startswith(f"gradient of layers.{last}.feed_forward.experts.")
    assert all(".experts." in difference.what for difference in found if "gradient of" in difference.what)


def test_the_program_says_equal_and_refuses() -> None:
    sizes = {"model.num_layers": 2, "model.hidden_size": 32, "model.attention.num_heads": 4, "data.seq_len": 16}
    small = [f"--{key}={value}" for key, value in sizes.items()]
    words = ["launch/parity.py", "--layout", "pp=2", *small, "--precision.dtype", "bf16"]
    root = Path(__file__).parents[2]
    done = run_program(words, root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("equal: ")
    words[2] = "pp=3"
    refused = run_program(words, root)
    assert refused.returncode == 2 and "model.num_layers" in refused.stderr
