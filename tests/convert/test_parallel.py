"""From and into parallel layouts: a foreign model trained on in one, its checkpoint exported from another."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatrain.convert.formats import Choices
from megatrain.convert.run import Request, convert
from megatrain.spec.keys import flat
from tests.convert.models import save_model
from tests.layouts import Layout, build_engine, global_batch, run_config
from tests.pool import Pool

# FP32: the ranks add in another order than one process
LOSS = 1e-5


def continue_and_save(layout: Layout, model: dict[str, Any], source: str, folder: str) -> tuple[float, list[float]]:
    """Loads an imported model in a layout; its loss, then those of three steps, after which it is saved."""
    from megatrain.checkpoint.load import load_checkpoint
    from megatrain.checkpoint.save import save_checkpoint
    from megatrain.checkpoint.store.folder import newest_checkpoint

    engine = build_engine(run_config(model["family"], layout, model=model))
    path = newest_checkpoint(Path(source))
    assert path is not None
    try:
        state = load_checkpoint(engine, path, lambda data, step: None)
        assert state["step"] == state["optimizer_steps"] == 0
        rank, size = engine.mesh.coordinate("dp"), engine.mesh.topology.dp
        before, tokens = engine.evaluate(global_batch(99, rank, size))[:2]
        losses = [float(engine.train_step(global_batch(step, rank, size), step).loss) for step in (1, 2, 3)]
        save_checkpoint(engine, Path(folder), 3, "test", {"digest": "new data"})
        return float(before) / tokens, losses
    finally:
        engine.close()


def hugging_face_loss(folder: Path) -> float:
    from transformers import AutoModelForCausalLM

    batch = global_batch(99)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(batch.tokens).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten()))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt2", Layout(tp=2, pp=2, zero_stage=0)),
        ("llama3", Layout(tp=2, dp=2, zero_stage=3)),
        ("llama-tied-linear", Layout(pp=2, dp=2, zero_stage=1)),
        ("mixtral", Layout(tp=2, dp=2, ep=2, zero_stage=1)),
        ("qwen3", Layout(tp=2, pp=2, dp=2, sequence_parallel=True, zero_stage=1)),
        pytest.param("qwen3-moe-dense", Layout(pp=2, dp=2, ep=2, zero_stage=1), marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value),
)
def test_import_train_on_and_export(
    pool: Pool, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, layout: Layout
) -> None:
    source = save_model(name, tmp_path / "source")
    choices = Choices(vocab_multiple=8)
    record = convert(Request(source, tmp_path / "imported", "megatrain", longest=32, choices=choices))
    model = flat(record["model"]) | {"dropout": 0.0, "attention.dropout": 0.0}
    arguments = (layout, model, str(tmp_path / "imported"), str(tmp_path / "run"))
    loss, losses = pool.run(continue_and_save, layout.world_size, *arguments)[0]
    assert loss == pytest.approx(hugging_face_loss(source), rel=LOSS), "it starts as the model that it was"
    assert losses[-1] < losses[0]
    for to in ("huggingface", "megatron", "universal"):
        done = convert(Request(tmp_path / "run", tmp_path / to, to, longest=32))
        assert done["status"] == "verified"
        keeps = to != "huggingface"
        assert done["left_behind"] == ([] if keeps else ["exp_avg", "exp_avg_sq"])
        assert (f"exp_avg, exp_avg_sq stay behind: {to} files" in capsys.readouterr().out) is not keeps
    assert hugging_face_loss(tmp_path / "huggingface") < loss, "it has learned on"
    common = torch.load(tmp_path / "megatron" / "iter_0000003" / "common.pt", weights_only=True)
    run = run_config(record["model"]["family"], Layout()).optimizer
    found = {(*group["betas"], group["eps"], group["lr"]) for group in common["optimizer"]["param_groups"]}
    assert found == {(run.beta1, run.beta2, run.eps, run.lr)}, "the run's own"
