"""What version 0.1 wrote is read: sections ``model`` of one flat list, in configs, run folders and checkpoints."""

from pathlib import Path
from typing import Any

import pytest

from megatrain.checkpoint.state import saved_model
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.config.changes import changes
from megatrain.config.load import from_yaml, load_config
from megatrain.config.reading.problems import ConfigError
from megatrain.config.show import to_yaml
from megatrain.convert.model_file import read_model
from megatrain.spec.older import NEW_KEYS, of_this_version
from tests.checkpoint.odd import model_state, save_run
from tests.configs import model_spec

# as a run of version 0.1 kept them
LLAMA: dict[str, Any] = {
    "family": "llama", "num_layers": 1, "hidden_size": 8, "num_heads": 2, "num_kv_heads": 1, "head_width": 4,
    "attention_bias": False, "ffn_hidden_size": 8, "num_experts": None, "experts_per_token": 2,
    "expert_hidden_size": None, "num_shared_experts": 0, "num_dense_layers": 0, "expert_interval": 1,
    "expert_capacity": None, "router_score": "softmax", "router_normalize": True, "router_scale": 1.0,
    "router_groups": 1, "router_groups_per_token": 1, "router_balance_loss": 0.01, "router_z_loss": 0.0,
    "router_balance_rate": 0.0, "vocab_size": 16, "vocab_padding": 0, "max_seq_len": 8, "tie_embeddings": False,
    "norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": "none", "rope_scaling_factor": 1.0,
    "rope_original_max_seq_len": None, "rope_short_factors": None, "rope_long_factors": None,
    "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_beta_fast": 32.0, "rope_beta_slow": 1.0,
    "rope_attention_factor": None, "init_std": 0.02, "dropout": 0.0, "attention_dropout": 0.0,
    "document_attention": "dense",
}  # fmt: skip
SPEC = model_spec(
    {"num_layers": 1, "hidden_size": 8, "attention.num_heads": 2, "attention.num_kv_heads": 1, "vocab_size": 16}
    | {"feed_forward.hidden_size": 8, "max_seq_len": 8}
)


def test_every_key_of_then_has_one_of_now() -> None:
    assert set(NEW_KEYS) <= set(LLAMA)
    now = of_this_version(LLAMA)
    assert (now["attention"]["num_heads"], now["rope"]["factor"], now["experts"]["num_experts"]) == (2, 1.0, 0)
    assert of_this_version(now) is now, "what is of this version stays"


def test_a_checkpoint_of_then_is_the_same_model(tmp_path: Path) -> None:
    path = save_run(tmp_path, state={**model_state(2), "model": LLAMA})
    assert saved_model(CheckpointReader(path)) == SPEC


def test_a_run_folder_and_a_model_file_of_then(tmp_path: Path) -> None:
    text = to_yaml(load_config([], ["--parallel.dp=1", "--data.seq_len=8"]).with_derived(1).config)
    shapes = "\n".join(f"  {key}: {'null' if value is None else str(value).lower()}" for key, value in LLAMA.items())
    before, _, after = text.partition("model:\n")
    rest = after[after.index("\nparallel:") :]
    assert from_yaml(f"{before}model:\n{shapes}{rest}").model == SPEC
    (tmp_path / "model.yaml").write_text(f"model:\n{shapes}\n")
    assert read_model(tmp_path, None) == SPEC


def test_a_resume_tells_what_really_changed() -> None:
    config = load_config([], []).with_derived(1).config.model_copy(update={"model": SPEC})
    assert changes({"model": LLAMA}, config) == []
    (change,) = changes({"model": {**LLAMA, "rope_theta": 5e5}}, config)
    assert (change.key, change.before, change.now) == ("model.rope.theta", 5e5, 10000.0)


@pytest.mark.parametrize(("old", "new"), NEW_KEYS.items())
def test_an_old_key_in_a_config_is_refused_with_the_new_one(old: str, new: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config([], [f"--model.{old}=1"])
    (problem,) = caught.value.problems
    assert problem.cure == f"write model.{new}, as it is called since version 0.2"
