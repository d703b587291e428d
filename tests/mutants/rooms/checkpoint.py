"""Mistakes in checkpoints that give other numbers: where a value lies, what is restored, averages, conversions."""

from tests.mutants.mutant import Mutant


def _m(file: str, old: str, new: str, kind: str, *see: str) -> Mutant:
    return Mutant(f"{file}.py", old, new, kind, see)


_RESUME, _STORE = ("resume", "resume-all", "resume-mixture"), ("store", "resume")

MUTANTS = [
    _m(
        "checkpoint/tools/merge",
        "return [1.0 / count] * count",
        "return [1.0 / (count - 1)] * count",
        "off by one",
        "merge",
    ),
    _m(
        "checkpoint/load",
        'set_optimizer_step_count(engine, reader.state["optimizer_steps"])',
        "pass",
        "not restored",
        *_RESUME,
    ),
    _m(
        "checkpoint/load",
        'engine.routers.load_biases(reader.state["router_biases"])',
        "pass",
        "not restored",
        "resume-mixture",
    ),
    _m(
        "checkpoint/load",
        'engine.load_loss_scaler_state(reader.state["loss_scaler"])',
        "pass",
        "not restored",
        *_RESUME,
    ),
    _m("checkpoint/load", "    finish_import(engine)\n", "", "not restored", *_RESUME),
    _m(
        "checkpoint/load",
        "rows[self.before : self.before + self.fragment.size]",
        "rows[: self.fragment.size]",
        "wrong part",
        *_RESUME,
    ),
    _m("checkpoint/load", "fragment.start - first * row_elements", "fragment.start % 7", "wrong part", *_RESUME),
    _m(
        "checkpoint/load",
        "read.fragment.set(read.kind, values.to",
        'read.fragment.set("exp_avg", values.to',
        "wrong state",
        *_RESUME,
    ),
    _m(
        "checkpoint/load",
        "last = -(-(fragment.start + fragment.size) // row_elements)",
        "last = -(-(fragment.start + fragment.size) // row_elements) + 1",
        "off by one",
        *_RESUME,
    ),
    _m(
        "checkpoint/load",
        "                factor[: len(saved)].copy_(saved)",
        "                saved",
        "not restored",
        "resume-optimizers",
    ),
    _m(
        "checkpoint/placement",
        '{"tp": Split.over(engine.mesh.tp_group), "ep": Split.over(engine.mesh.ep_group)}',
        '{"tp": Split.over(engine.mesh.tp_group), "ep": Split()}',
        "wrong place",
        "resume-mixture",
    ),
    _m(
        "checkpoint/placement",
        'is None and engine.mesh.coordinate("tp") > 0',
        'is None and engine.mesh.coordinate("tp") > 1',
        "off by one",
        *_RESUME,
    ),
    _m(
        "checkpoint/placement",
        "(engine.mesh.data_group, False), (engine.mesh.edp_group, True)",
        "(engine.mesh.data_group, False), (engine.mesh.data_group, True)",
        "wrong group",
        "resume-mixture",
    ),
    _m("checkpoint/placement", "not marks.marks_of(parameter).tied_copy", "True", "saved twice", *_RESUME),
    _m("checkpoint/snapshot", "first = start - fragments[chunk.name].start", "first = start", "wrong part", *_RESUME),
    _m(
        "checkpoint/snapshot",
        "values[start - chunk.start : start - chunk.start + size]",
        "values[:size]",
        "wrong part",
        *_RESUME,
    ),
    _m(
        "checkpoint/snapshot",
        "copies[key].copy_(piece, non_blocking=True)",
        "copies[key] = piece",
        "live state",
        "saves",
    ),
    _m("checkpoint/snapshot", "place += piece.numel()", "place += 0", "overwritten copies", *_RESUME, "saves"),
    _m(
        "checkpoint/snapshot",
        "fragments[name].values(kind) for",
        'fragments[name].values("weight") for',
        "wrong state",
        *_RESUME,
    ),
    _m(
        "checkpoint/snapshot",
        "pieces[kind, chunk.name, chunk.start].cpu()",
        'pieces["weight", chunk.name, chunk.start].cpu()',
        "wrong state",
        *_RESUME,
    ),
    _m(
        "checkpoint/snapshot",
        "offset = (where.offset[0] + chunk.first_row,",
        "offset = (chunk.first_row,",
        "wrong place",
        *_RESUME,
    ),
    _m(
        "checkpoint/snapshot",
        'if self.engine.mesh.coordinate("tp") > 0:',
        'if self.engine.mesh.coordinate("tp") > 1:',
        "saved twice",
        "resume-optimizers",
    ),
    _m(
        "checkpoint/shares",
        "row * part.row_elements, min(row + chunk_rows, part.rows)",
        "row * part.row_elements, min(row + chunk_rows - 1, part.rows)",
        "off by one",
        *_STORE,
    ),
    _m(
        "checkpoint/shares",
        "first, last = max(low, begin), min(high, end)",
        "first, last = max(low, begin), high",
        "wrong bound",
        *_STORE,
    ),
    _m(
        "checkpoint/store/grid",
        "slice(first - position * part, last - position * part)",
        "slice(0, last - first)",
        "wrong part",
        *_STORE,
    ),
    _m("checkpoint/store/grid", "slice(first - begin, last - begin)", "slice(0, last - first)", "wrong part", *_STORE),
    _m(
        "checkpoint/store/grid",
        "position * part for position, part in zip(index",
        "position for position, part in zip(index",
        "missing factor",
        *_STORE,
        "merge",
    ),
    _m("checkpoint/tools/merge", "decay ** (count - 1 - i)", "decay ** (count - i)", "off by one", "merge"),
    _m("checkpoint/tools/merge", "factors[0] = decay ** (count - 1)", "pass", "dropped statement", "merge"),
    _m("checkpoint/tools/merge", "(1.0 - decay) * decay **", "decay * (1.0 - decay) **", "complement", "merge"),
    _m(
        "checkpoint/tools/merge",
        "factor * part.astype(np.float64)",
        "factor * part.astype(np.float16)",
        "lower precision",
        "merge",
    ),
]
