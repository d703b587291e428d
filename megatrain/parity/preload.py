"""What ranks that one program starts need: imported once, in the process that they are forked from."""

import gc

gc.disable()  # looks through all that the imports make, again and again

from megatrain.engine.zero.import_once import import_deepspeed  # noqa: E402

import_deepspeed()

import megatrain.parallel.pipeline  # noqa: E402
import megatrain.train.build  # noqa: E402, F401
from megatrain.parallel import tensor  # noqa: E402, F401

gc.freeze()  # shared with the ranks, unchanged
gc.enable()
