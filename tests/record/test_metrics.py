"""Metrics, read back from where their readers find them."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatrain.config.schema import RunConfig
from megatrain.record.metrics import Metrics, metrics_of_run
from megatrain.record.records import EvaluationRecord, SourceCounts, SourcesRecord, StepRecord
from megatrain.record.run_folder import RunFolder
from megatrain.record.throughput import Hardware, peak_flops

FLOPS = 20480e6  # of a record


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    run.prepare(RunConfig())
    return run


def log_of(run: RunFolder, lines: list[str], resumed_step: int = 0) -> Metrics:
    return metrics_of_run(run, 100, resumed_step, lines.append)


def record(step: int, loss: float = 5.0, peak: float | None = 1e11, **changes: Any) -> StepRecord:
    values = {"grad_norm": 1.25, "lr": 3e-4, "loss_scale": 1.0, "skipped": False, "tokens": 20480, "seconds": 2.0}
    mfu = Hardware(num_devices=4, peak_flops=peak).mfu(FLOPS / 2.0)
    values |= {"num_steps": 10, "steps_left": 100 - step, "mfu": mfu}
    return StepRecord(step=step, loss=loss, flops=FLOPS, **(values | changes))


def rows(run: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.metrics.read_text().splitlines()]


def board(run: RunFolder) -> EventAccumulator:
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    return events


def scalars(run: RunFolder, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in board(run).Scalars(tag)]


def test_the_line_says_everything(run: RunFolder) -> None:
    lines: list[str] = []
    with log_of(run, lines) as log:
        log.log(record(10, loss=5.4321))
        log.log(EvaluationRecord(10, loss=5.5))
    assert lines == [
        "step  10/100 | loss 5.4321 | grad norm 1.250 | lr 3.00e-04 | 10,240 tokens/s | mfu 2.6% | loss scale 1 "
        "| eta 0:00:18",
        "step  10/100 | validation loss 5.5000 | perplexity 244.69",
    ]


def test_eta_counts_the_steps_of_the_last_record(run: RunFolder) -> None:
    lines: list[str] = []
    with log_of(run, lines) as log:
        log.log(record(50, seconds=20.0))
        log.log(record(60, seconds=3600.0))
    assert lines[0].endswith("eta 0:01:40")
    assert lines[1].endswith("eta 4:00:00")


def test_without_a_known_peak_there_is_no_mfu(run: RunFolder) -> None:
    lines: list[str] = []
    with log_of(run, lines) as log:
        log.log(record(10, peak=None))
    assert "| mfu - |" in lines[0]
    assert rows(run)[0]["mfu"] is None
    assert "throughput/mfu" not in board(run).Tags()["scalars"]


def test_json_lines_hold_the_record(run: RunFolder) -> None:
    with log_of(run, []) as log:
        log.log(record(10))
        assert rows(run)[0]["step"] == 10, "on disk before the log is closed"
        log.log(EvaluationRecord(10, loss=5.5))
    step, evaluation = rows(run)
    assert step == {
        "kind": "step", "step": 10, "loss": 5.0, "grad_norm": 1.25, "lr": 3e-4, "loss_scale": 1.0, "skipped": False,
        "num_skipped": 0,
        "tokens": 20480, "flops": FLOPS, "seconds": 2.0, "tokens_per_second": 10240.0, "mfu": FLOPS / 2.0 / 4e11,
    }  # fmt: skip
    expected = {"kind": "evaluation", "step": 10, "set": "validation", "loss": 5.5}
    assert evaluation == expected | {"perplexity": pytest.approx(244.6919, abs=1e-4)}


def test_an_overflow_is_said_and_stays_valid_json(run: RunFolder) -> None:
    lines: list[str] = []
    with log_of(run, lines) as log:
        log.log(record(10, loss=float("nan"), grad_norm=float("inf"), loss_scale=32768.0, skipped=True))
    assert "loss nan | grad norm inf" in lines[0]
    assert "loss scale 32768" in lines[0]
    assert lines[0].endswith("skipped (gradients not finite)")
    row = rows(run)[0]
    assert (row["loss"], row["grad_norm"], row["skipped"]) == (None, None, True)


def test_numbers_that_are_not_finite_are_null_at_any_depth(run: RunFolder) -> None:
    nan, inf = float("nan"), float("inf")
    routing = {"layers.1": {"load": [nan, 0.5], "entropy": inf, "drop_rate": 0.0}}
    with log_of(run, []) as log:
        log.log(record(10, routing=routing, num_skipped=3))
        log.log(SourcesRecord(10, {"web": SourceCounts(tokens=64, epoch=0.5, loss=nan)}))
        log.log_event("checkpoint", 10, "said", inner=[{"a": inf, "b": 1}], seconds=nan)
    step, sources, event = rows(run)
    assert step["routing"] == {"layers.1": {"load": [None, 0.5], "entropy": None, "drop_rate": 0.0}}
    assert step["num_skipped"] == 3
    assert sources["sources"] == {"web": {"tokens": 64, "epoch": 0.5, "loss": None}}
    assert (event["inner"], event["seconds"]) == ([{"a": None, "b": 1}], None)


@pytest.mark.parametrize(
    ("loss", "shown", "kept"),
    [
        (5.0, "148.41", 148.4131591),
        (13.0, "442,413.39", 442413.392),
        (88.0, "1.65e+38", 1.6516362549940018e38),
        (709.0, "8.22e+307", 8.218407461554972e307),
        (710.0, "inf", None),
        (float("inf"), "inf", None),
        (float("nan"), "nan", None),
    ],
)
def test_a_perplexity_of_any_loss(run: RunFolder, loss: float, shown: str, kept: float | None) -> None:
    lines: list[str] = []
    with log_of(run, lines) as log:
        log.log(EvaluationRecord(10, loss))
    assert lines[0].endswith(f" | perplexity {shown}")
    assert rows(run)[0]["perplexity"] == (None if kept is None else pytest.approx(kept, rel=1e-8))


def test_tensorboard_reads_scalars_and_config(run: RunFolder) -> None:
    routing = {"layers.1": {"load": [0.5, 0.25, 0.125, 0.125], "entropy": 1.25, "drop_rate": 0.0625}}
    with log_of(run, []) as log:
        log.log(record(10, loss=5.0, routing=routing))
        log.log(record(20, loss=4.5))
        log.log(EvaluationRecord(20, loss=4.75))
    assert scalars(run, "train/loss") == [(10, 5.0), (20, 4.5)]
    assert scalars(run, "evaluation/loss") == [(20, 4.75)]
    assert rows(run)[0]["routing"] == routing and "routing" not in rows(run)[1]
    mixture = {"largest_load": 2.0, "entropy": 1.25, "drop_rate": 0.0625}
    assert {name: scalars(run, f"routing/layers.1/{name}") for name in mixture} == {
        name: [(10, value)] for name, value in mixture.items()
    }
    tags = {"train/grad_norm", "train/lr", "train/loss_scale", "train/skipped"}
    tags |= {"throughput/tokens_per_second", "throughput/mfu", "evaluation/perplexity"}
    assert tags <= set(board(run).Tags()["scalars"])
    (text,) = board(run).Tensors("config/text_summary")
    assert "    model:" in text.tensor_proto.string_val[0].decode()


def test_a_resumed_run_replaces_what_was_lost(run: RunFolder) -> None:
    with log_of(run, []) as log:
        for step in (10, 20, 30):
            log.log(record(step, loss=float(step)))
        log.log(EvaluationRecord(30, loss=3.0))
    with run.metrics.open("a") as file:
        file.write('{"kind": "step", "st')  # the crash
    with log_of(run, [], resumed_step=20) as log:
        log.log(record(30, loss=31.0))
    assert [(row["step"], row["loss"]) for row in rows(run)] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert scalars(run, "train/loss") == [(10, 10.0), (20, 20.0), (30, 31.0)]


def test_a_start_from_the_beginning_drops_everything(run: RunFolder) -> None:
    for loss in (1.0, 2.0):
        time.sleep(1 - time.time() % 1)  # TensorBoard orders the files of different seconds only
        with log_of(run, []) as log:
            log.log(record(1, loss=loss))
    assert [row["loss"] for row in rows(run)] == [2.0]
    assert scalars(run, "train/loss") == [(1, 2.0)]


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5e12),
        ("NVIDIA H100 PCIe", "fp16", 756.5e12),
        ("NVIDIA H200", "bf16", 989.5e12),
        ("NVIDIA H200 NVL", "bf16", 835.5e12),
        ("NVIDIA GH200 480GB", "bf16", 989.5e12),
        ("NVIDIA B200", "bf16", 2.25e15),
        ("NVIDIA GB200", "bf16", 2.5e15),
        ("NVIDIA H20", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        (None, "bf16", None),
    ],
)
def test_peaks_of_known_devices(name: str | None, dtype: str, expected: float | None) -> None:
    assert peak_flops(name, dtype) == expected
    assert peak_flops(name, dtype, peak_tflops=0.5) == 0.5e12
