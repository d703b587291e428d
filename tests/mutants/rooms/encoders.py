"""Mistakes in encoders: what blocks see that look both ways, BERT's parts, and the hiding of tokens."""

from tests.mutants.mutant import Mutant


def _m(file: str, old: str, new: str, kind: str, *see: str) -> Mutant:
    return Mutant(f"{file}.py", old, new, kind, see)


MUTANTS = [
    _m("models/decoder", "if lengths_B is not None and self.sees_ahead:", "if False:", "padding is seen", "bert"),
    _m("models/block", "feed_forward_norm(x + self", "feed_forward_norm(x_SBD + self", "wrong stream", "bert"),
    _m("models/ends", "F.gelu(self.dense(x_SBD))", "F.gelu(self.dense(x_SBD), approximate='tanh')", "tanh", "bert"),
    _m("data/feed/objectives", "_REPLACED = 0.8, 0.9", "_REPLACED = 0.8, 0.95", "wrong share", "objectives"),
    _m("data/feed/objectives", "            chosen &= np.arange", "            np.arange", "padding", "objectives"),
    _m("data/feed/objectives", "batch.sample_ids.numpy()", "np.arange(len(tokens))", "by row", "objectives"),
]
