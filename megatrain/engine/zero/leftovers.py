"""What DeepSpeed leaves in a process after its engine: taken out, for one that builds one engine after another."""

import inspect
import sys

from torch import nn

_LINEAR = nn.functional.linear


def clear_leftovers() -> None:
    """Puts torch's own functions back, and lets go of the models that ZeRO 3 keeps in its module's globals.

    ZeRO 3 leaves its own ``linear`` behind, whose backward hands out the gradients of weight and bias in another
    order; ranks that differ in it would reduce each other's wrong buckets. Its list of the modules inside whose
    forward it is never loses the outermost one, and the cache of a method never loses an engine.
    """
    nn.functional.linear = _LINEAR
    if "deepspeed.runtime.zero.parameter_offload" not in sys.modules:
        return
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

    parameter_offload.FWD_MODULE_STACK.clear()
    cached = Coordinator._PartitionedParameterCoordinator__params_to_release
    inspect.getclosurevars(cached).nonlocals["func"].cache_clear()
