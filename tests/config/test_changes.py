"""What a resume tells about its config: every key that differs, and whether losses depend on it."""

from megatrain.config.changes import changes, table
from megatrain.config.schema import RunConfig
from megatrain.spec.derive import resolve_model
from tests.configs import run_config_of


def config_of(**sections: dict) -> RunConfig:
    base = {"data": {"train": {"a": {"path": "old", "weight": 1}}}, "train": {"steps": 10}}
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    config = run_config_of(base)
    return config.model_copy(update={"model": resolve_model(config.model)})


def test_nothing_differs_from_itself() -> None:
    config = config_of()
    assert changes(config.model_dump(mode="json"), config) == []


def test_every_change_is_told_and_those_of_the_numbers_first() -> None:
    saved = config_of().model_dump(mode="json")
    now = config_of(
        parallel={"tp": 2},
        optimizer={"lr": 2e-4},
        schedule={"warmup_steps": 5},
        model={"attention.documents": "per_document", "router.balance_rate": 0.1, "rope.theta": 5e5},
        train={"steps": 20, "log_every": 1, "global_batch_size": 16},
        data={"train": {"a": {"path": "new", "weight": 3}}},
        checkpoint={"keep_last": 2},
    )
    found = {change.key: change.numbers for change in changes(saved, now)}
    assert found == {
        "model.rope.theta": True,
        "model.router.balance_rate": True,
        "optimizer.lr": True,
        "schedule.warmup_steps": True,
        "train.global_batch_size": True,
        "data.train.a.weight": True,
        "parallel.tp": False,
        "model.attention.documents": False,
        "train.steps": False,
        "train.log_every": False,
        "data.train.a.path": False,
        "checkpoint.keep_last": False,
    }
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_key_that_an_older_version_did_not_know_stood_at_its_default() -> None:
    saved = config_of().model_dump(mode="json")
    del saved["train"]["max_skipped_steps"], saved["optimizer"]["lr"]
    saved["train"]["of_an_older_version"] = 3
    found = changes(saved, config_of(optimizer={"lr": 1e-3}))
    assert [(c.key, c.before, c.now) for c in found] == [
        ("optimizer.lr", 3e-4, 1e-3), ("train.of_an_older_version", 3, None),
    ]  # fmt: skip
    assert changes({"model": saved["model"]}, config_of(optimizer={"lr": 1e-3})) == [], "it tells of its model alone"


def test_steps_count_where_the_schedule_ends_with_them() -> None:
    saved = config_of().model_dump(mode="json")
    (name, steps) = changes(saved, config_of(train={"steps": 20}, schedule={"name": "wsd"}))
    assert (name.key, steps.key, steps.numbers) == ("schedule.name", "train.steps", True)


def test_the_table_has_a_line_for_each() -> None:
    saved = config_of().model_dump(mode="json")
    assert table(changes(saved, config_of(optimizer={"lr": 1e-3}, parallel={"tp": 2}))) == [
        "    differs from the checkpoint  then    now    changes the losses",
        "    optimizer.lr                 0.0003  0.001  yes",
        "    parallel.tp                  1       2      no",
    ]
