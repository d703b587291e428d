"""The few DeepSpeed keys that a user may add: they change how fast or how loud a run is, never what it computes.

Those of ``zero_optimization`` are axes of the table of compatibility: each is tried with every feature that it goes
together with. The others only print, and a test holds that a run with all of them on has the same bits.
"""

from collections.abc import Iterator
from typing import Any

from megatrain.config.reading.fields import nearest_keys
from megatrain.config.reading.problems import Problem
from megatrain.config.rules.rule import rule
from megatrain.config.schema import RunConfig

# dotted key below `deepspeed` -> type, what it does
ALLOWED: dict[str, tuple[type, str]] = {
    "wall_clock_breakdown": (bool, "Log the time of forward, backward and step."),
    "memory_breakdown": (bool, "Log the memory of forward, backward and step."),
    "dump_state": (bool, "Print DeepSpeed's configuration at the start."),
    "comms_logger.enabled": (bool, "Log every communication."),
    "comms_logger.verbose": (bool, "Each with its time and bandwidth."),
    "comms_logger.prof_all": (bool, "All operations, not only those in prof_ops."),
    "comms_logger.prof_ops": (list, "Names of the operations to log."),
    "comms_logger.debug": (bool, "Add the caller's name to each operation."),
    "zero_optimization.reduce_bucket_size": (int, "Elements of a gradient reduction; at most all are."),
    "zero_optimization.overlap_comm": (bool, "ZeRO 2, 3: reduce gradients during the backward pass."),
    "zero_optimization.stage3_prefetch_bucket_size": (int, "ZeRO 3: elements fetched ahead."),
    "zero_optimization.stage3_param_persistence_threshold": (int, "ZeRO 3: smaller weights are not sharded."),
    "zero_optimization.stage3_max_live_parameters": (int, "ZeRO 3: weights that may be whole at a time."),
    "zero_optimization.stage3_max_reuse_distance": (int, "ZeRO 3: weights used again within this stay whole."),
    "zero_optimization.sub_group_size": (int, "ZeRO 3: elements of one optimizer update."),
}

# DeepSpeed key -> what decides it here
_DERIVED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size and train.micro_batch_size",
    "managed_gradient_accumulation": "megatrain's engine",
    "gradient_clipping": "optimizer.grad_clip",
    "optimizer": "the section `optimizer`",
    "scheduler": "the section `schedule`",
    "fp16": "precision.dtype",
    "bf16": "precision.dtype",
    "bfloat16": "precision.dtype",
    "torch_autocast": "precision.dtype",
    "data_types": "precision.gradient_dtype",
    "communication_data_type": "precision.gradient_dtype",
    "zero_optimization.stage": "parallel.zero_stage",
    "pipeline": "parallel.pp",
    "tensor_parallel": "parallel.tp",
    "activation_checkpointing": "train.activation_checkpointing",
    "steps_per_print": "train.log_every",
    "tensorboard": "megatrain, which writes TensorBoard files into every run folder",
    "checkpoint": "the section `checkpoint`",
    "seed": "train.seed",
}
# DeepSpeed key -> why no value of it is passed on
_HARMFUL = {
    "flops_profiler": "replaces torch's functions in the step that it counts, and attention over context ranks then "
    "reads its mask wrongly; train.peak_tflops has the operations per second logged, as MFU",
    "zero_optimization.round_robin_gradients": "makes DeepSpeed order the weights of its partitions anew and look for "
    "each at its old place: a checkpoint of ZeRO 1 or 2 then holds another weight's numbers under a name, and Muon and "
    "Adafactor update other matrices than they should",
    "zero_optimization.contiguous_gradients": "is set by megatrain: without one buffer of gradients ZeRO 1 sums those "
    "of experts as if all ranks held the same ones, and ZeRO 2 refuses experts",
    "zero_optimization.allgather_bucket_size": "does nothing: DeepSpeed gathers the weights of a group at once",
}
_KINDS = {bool: "true or false", int: "a whole number, at least {}", list: "a list of names"}
_LEAST = {"zero_optimization.reduce_bucket_size": 1}
"""Least numbers other than 0."""


@rule("deepspeed")
def forbidden_keys(config: RunConfig, world_size: int | None = None) -> Iterator[Problem]:
    """Problems of the extra keys in `deepspeed`."""
    yield from _problems(config.deepspeed, "")


def kind_of(key: str) -> str:
    """The values of an allowed key, in words."""
    return _KINDS[ALLOWED[key][0]].format(_LEAST.get(key, 0))


def _problems(section: dict[str, Any], prefix: str) -> Iterator[Problem]:
    for name, value in section.items():
        key = prefix + name
        if any(allowed.startswith(f"{key}.") for allowed in ALLOWED):
            if isinstance(value, dict):
                yield from _problems(value, f"{key}.")
            else:
                yield _wrong(key, value, "is a section of keys", "keys: " + _keys_below(key), "put its keys below it")
        elif key not in ALLOWED:
            yield _unknown(key, value)
        elif not _fits(key, value):
            cure = f"set deepspeed.{key} to {kind_of(key)}"
            yield _wrong(key, value, "has a value that it cannot have", kind_of(key), cure)


def _unknown(key: str, value: Any) -> Problem:
    derived = _DERIVED.get(key)
    allowed = "keys: " + _keys_below(key.rpartition(".")[0])
    if derived is not None:
        what = f"set {derived} instead" if "." in derived or "`" in derived else "leave it out"
        return _wrong(key, value, f"is decided by {derived}: megatrain derives DeepSpeed's own config", allowed, what)
    if key in _HARMFUL:
        return _wrong(key, value, _HARMFUL[key], allowed, "leave it out")
    near = nearest_keys(key, ALLOWED)
    cure = f"did you mean {' or '.join(f'deepspeed.{other}' for other in near)}?" if near else "leave it out"
    return _wrong(key, value, "is not a DeepSpeed key that may be added here", allowed, cure)


def _wrong(key: str, value: Any, message: str, allowed: str, cure: str) -> Problem:
    return Problem(f"deepspeed.{key}", value, message, allowed, cure)


def _keys_below(section: str) -> str:
    prefix = f"{section}." if section else ""
    names = (key.removeprefix(prefix).partition(".")[0] for key in ALLOWED if key.startswith(prefix))
    return ", ".join(dict.fromkeys(names))


def _fits(key: str, value: Any) -> bool:
    kind = ALLOWED[key][0]
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= _LEAST.get(key, 0)
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)
