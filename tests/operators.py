"""DeepSpeed's operators in C++. Compiling one takes minutes, which no test's own time is meant for."""

import shutil


def compile_operator(builder: str) -> str | None:
    """Makes ``deepspeed.ops.op_builder``'s operator ready; returns what is lacking for it, if anything."""
    from megatrain.engine.zero.import_once import import_deepspeed

    import_deepspeed()
    from deepspeed.ops import op_builder

    if not all(map(shutil.which, ("g++", "ninja"))):
        return "g++ or ninja"
    operator = getattr(op_builder, builder)()
    if not operator.is_compatible():
        return "libaio"
    operator.load(verbose=False)
    return None
