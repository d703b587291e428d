"""Mistakes in the run: what the loop counts, evaluates and reports, and what the configuration derives."""

from tests.mutants.mutant import Mutant


def _m(file: str, old: str, new: str, kind: str, *see: str) -> Mutant:
    return Mutant(f"{file}.py", old, new, kind, see)


_DERIVE, _LOOP, _PLAN = ("derive",), ("reference", "data-run"), ("derive", "plan")

MUTANTS = [
    _m("record/throughput", "(self.num_devices * self.peak_flops)", "self.peak_flops", "missing factor", "metrics"),
    _m(
        "train/loop",
        "self.engine.train_step(batch, self.step + 1)",
        "self.engine.train_step(batch, self.step)",
        "off by one",
        *_LOOP,
    ),
    _m(
        "train/loop",
        "return loader.batches(self.step, self",
        "return loader.batches(self.step + 1, self",
        "off by one",
        *_LOOP,
    ),
    _m(
        "train/run",
        "start_distributed(config.train.deterministic)",
        "start_distributed()",
        "ignored option",
        "dry-run",
    ),
    _m("train/loop", "self.step % every == 0", "self.step % every == 1", "off by one", *_LOOP),
    _m(
        "train/loop",
        "sum(float(total) for total, _ in results) / sum(count for _, count in results)",
        "sum(float(total) / count for total, count in results) / len(results)",
        "average of averages",
        *_LOOP,
    ),
    _m(
        "train/loop",
        "self.engine.evaluate(loader.batch(i)) for i in batches",
        "self.engine.evaluate(loader.batch(0)) for i in batches",
        "stale input",
        *_LOOP,
    ),
    _m(
        "train/loop",
        "range(min(self.config.train.eval_batches, num_batches(loader)))",
        "range(num_batches(loader))",
        "ignored option",
        *_LOOP,
    ),
    _m(
        "train/loop",
        "(0, 0) if resumed is None else (resumed.step, resumed.tokens)",
        "(0, 0) if resumed is None else (resumed.step, 0)",
        "not restored",
        *_LOOP,
    ),
    _m(
        "train/loop",
        'mesh.coordinate("dp"), mesh.topology.dp, pin',
        "0, mesh.topology.dp, pin",
        "all ranks read the same",
        *_LOOP,
    ),
    _m("record/records", "math.exp(self.loss)", "2**self.loss", "another function", *_LOOP),
    _m("record/ledger", "losses[i] / counts[i] if", "losses[i] / (counts[i] + 1) if", "off by one", "data-run"),
    _m("record/ledger", "== 0\n", ">= 0\n", "counted cp times", "data-run"),
    _m(
        "record/ledger",
        "        self._sums = self._nothing()\n        consumed",
        "        consumed",
        "stale sums",
        "data-run",
    ),
    _m("record/ledger", "(batch.labels != IGNORE).sum(1)", "(batch.labels != IGNORE).sum(0)", "wrong dim", "data-run"),
    _m("record/throughput", "return peak_tflops * 1e12", "return peak_tflops * 1e9", "wrong unit", "metrics"),
    _m(
        "record/records", "return self.tokens / self.seconds", "return self.seconds / self.tokens", "inverse", "metrics"
    ),
    _m(
        "spec/derive",
        "math.ceil(8 * model.hidden_size / (3 * _FFN_MULTIPLE))",
        "math.floor(8 * model.hidden_size / (3 * _FFN_MULTIPLE))",
        "rounding",
        *_DERIVE,
    ),
    _m(
        "config/derive",
        "math.ceil(config.train.steps / 10)",
        "config.train.steps // 10",
        "rounding",
        *_DERIVE,
        "reference",
    ),
    _m(
        "config/derive",
        "rank // (parallel.tp * parallel.cp) % parallel.dp",
        "rank // parallel.tp % parallel.dp",
        "dropped term",
        *_DERIVE,
        "topology",
    ),
    _m(
        "spec/derive",
        "-(-(experts.num_dense_layers + 1) // every) * every - 1",
        "experts.num_dense_layers",
        "dropped term",
        "mixture",
        *_DERIVE,
    ),
    _m("spec/parts", "if not model.tie_embeddings:", "if model.tie_embeddings:", "wrong way", *_DERIVE),
    _m("spec/parts", "    if bias:\n", "    if False:\n", "dropped term", *_DERIVE),
    _m("config/stages", "parallel.pp - 1 - rank if turn and", "rank if turn and", "wrong order", *_DERIVE),
    _m(
        "config/stages",
        "costs[-1] += 2.0 * model.vocab_size",
        "costs[0] += 2.0 * model.vocab_size",
        "wrong end",
        *_DERIVE,
    ),
    _m("config/stages", "plan = (max(slowest, cost),", "plan = (slowest + cost,", "wrong operator", *_DERIVE),
    _m(
        "plan/pipeline",
        '"1f1b": F + I + W,\n        "interleaved_1f1b"',
        '"1f1b": F + I,\n        "interleaved_1f1b"',
        "dropped term",
        "plan",
    ),
    _m("plan/pipeline", "(parallel.pp - 1) * lost", "parallel.pp * lost", "off by one", "plan"),
    _m(
        "plan/pipeline",
        "stage - 1, micro_batch) if stage > 0",
        "stage - 1, micro_batch) if stage > 1",
        "off by one",
        "plan",
    ),
]
