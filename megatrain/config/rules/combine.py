"""Questions to the table of compatibility: what a config, or a few features alone, are refused for."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from megatrain.config.reading.fields import value_at
from megatrain.config.reading.problems import ConfigError, Problem
from megatrain.config.reading.yaml_text import one_line
from megatrain.config.rules.compatibility import CLASSES, REFUSALS, SETTINGS, Refusal, Setting
from megatrain.config.schema import RampStage, RunConfig

Features = Mapping[str, str]
"""Values of some settings, by the settings' names."""

_REFUSED = {pair: refusal for refusal in REFUSALS for pair in refusal.pairs}
_LINKED = {
    name: tuple(
        other
        for other in SETTINGS
        if any({name, other} == {refusal.setting.name, refusal.other.name} for refusal in REFUSALS)
    )
    for name in SETTINGS
}


def refusal_of(one: tuple[str, str], two: tuple[str, str]) -> Refusal | None:
    """Why two (setting, value) do not go together; None where they do."""
    return _REFUSED.get(frozenset({one, two}))


def problem_of(refusal: Refusal, config: RunConfig, world_size: int | None = None) -> Iterator[Problem]:
    """A rule (rules.py): the problem of a config that has both features of ``refusal``."""
    setting, other = refusal.setting, refusal.other
    raw, other_raw = value_at(config, setting.key), value_at(config, other.key)
    if setting.value_of(raw) not in refusal.values or other.value_of(other_raw) not in refusal.other_values:
        return
    if not (_is_used(setting, config) and _is_used(other, config)):
        return
    yield Problem(
        setting.key,
        _plain(raw),
        f"cannot be used with {other.key} = {one_line(_plain(other_raw))}: {refusal.reason}",
        f"{_any_of(_fitting(setting, other, other.value_of(other_raw)))} where {other.key} is "
        f"{_as_is(other.value_of(other_raw))}",
        _cure(refusal, setting.value_of(raw), other.value_of(other_raw)),
    )


def keys_of(refusal: Refusal) -> tuple[str, ...]:
    """The dotted keys that ``problem_of`` reads."""
    settings = refusal.setting, refusal.other
    return (
        *(setting.key for setting in settings),
        *(SETTINGS[setting.used_with[0]].key for setting in settings if setting.used_with),
    )


def refusals_of(features: Features) -> list[str]:
    """Why ``features`` do not go together, each with its cure; none where they do.

    Two of them may be refused, or leave no value to a setting that is not among them: ZeRO 3 alone offloads weights,
    and goes with no pipeline, so ``offload_parameters`` and ``pp`` do not go together.
    """
    direct = [
        _sentence(one, two, refusal)
        for one, two in combinations(features.items(), 2)
        if (refusal := refusal_of(one, two))
    ]
    if direct:
        return direct
    left = values_left(features)
    if left.lacking is None:
        return []
    together = " and ".join(shown(name, value) for name, value in features.items())
    return ["\n".join([f"{together} leave no value to {left.lacking}:", *_reasons(left, left.lacking, features, 1)])]


@dataclass
class RemainingValues:
    """What some features leave to every setting.

    ``values``: of each setting those that may go with the features; ``because``: of those that may not, (another
    setting, the values of it that were left and do not go with them); ``lacking``: a setting that has no value left,
    or None.
    """

    values: dict[str, tuple[str, ...]]
    because: dict[tuple[str, str], tuple[str, tuple[str, ...]]]
    lacking: str | None = None


def values_left(features: Features) -> RemainingValues:
    """The values that ``features`` leave to each setting. A value drops out if another setting has none that fits it.

    Arc consistency (Mackworth 1977). That every pair which passes is part of a whole case, tests show.
    """
    left = RemainingValues(
        {name: (features[name],) if name in features else setting.values for name, setting in SETTINGS.items()}, {}
    )
    changed = list(features)
    while changed and left.lacking is None:
        other = changed.pop(0)
        for name in _LINKED[other]:
            if _drop_unsupported(left, name, other):
                changed.append(name)
    return left


def _drop_unsupported(left: RemainingValues, name: str, other: str) -> bool:
    """Takes from a setting the values that go with no value left to ``other``; whether there were any."""
    others = left.values[other]
    lost = [value for value in left.values[name] if all(refusal_of((name, value), (other, own)) for own in others)]
    left.values[name] = tuple(value for value in left.values[name] if value not in lost)
    left.because |= {(name, value): (other, others) for value in lost}
    if not left.values[name]:
        left.lacking = name
    return bool(lost)


def read_features(text: str) -> dict[str, str]:
    """Features as a person writes them, ``zero_stage=2,pp=4`` (names of settings or dotted keys), by setting and value.

    Raises:
        ConfigError: with every name and value that is not known.
    """
    found: dict[str, str] = {}
    problems = []
    by_name = SETTINGS | {setting.key: setting for setting in SETTINGS.values()}
    for part in text.split(","):
        name, _, value = (word.strip() for word in part.partition("="))
        setting = by_name.get(name)
        if setting is None:
            near = difflib.get_close_matches(name, by_name, 1, 0.0)[0]
            problems.append(Problem(name, value, "is no feature", ", ".join(SETTINGS), f"did you mean {near}?"))
        elif (own := _value_in(setting, value)) is None:
            near = difflib.get_close_matches(value, setting.values, 1, 0.0)[0]
            cure = (
                f"write {setting.name}={setting.values[0]} or {setting.name}=4"
                if setting.is_open
                else f"did you mean {near}?"
            )
            problems.append(Problem(name, value, f"is no value of {setting.name}", _any_of(setting.values), cure))
        elif found.setdefault(setting.name, own) != own:
            problems.append(
                Problem(name, value, f"is named twice, also as {found[setting.name]}", "one value", "leave one out")
            )
    if problems:
        raise ConfigError(problems)
    return found


def shown(name: str, value: str) -> str:
    """A feature in words: ``zero_stage = 2``, ``pp > 1``."""
    return f"{name} {value[0]} {value[1:]}" if value.startswith(">") else f"{name} = {value}"


def _is_used(setting: Setting, config: RunConfig) -> bool:
    """Whether the field does anything."""
    if setting.used_with is None:
        return True
    needed = SETTINGS[setting.used_with[0]]
    return needed.value_of(value_at(config, needed.key)) in setting.used_with[1]


def _plain(raw: object) -> object:
    """The value as a file would say it."""
    if isinstance(raw, list):
        return [item.model_dump(exclude_none=True) if isinstance(item, RampStage) else item for item in raw]
    return raw


def _value_in(setting: Setting, text: str) -> str | None:
    if text in setting.values:
        return text
    try:
        number = float(text)
    except ValueError:
        return None
    least = 0.0 if setting.values[0] == "null" else float(setting.values[0]) if setting.is_open else math.inf
    return setting.values[-1] if least < number < math.inf else None


def _reasons(left: RemainingValues, setting: str, features: Features, depth: int) -> Iterator[str]:
    """A line for each value that a setting lost, and below it why the other setting has no more values left."""
    for value in SETTINGS[setting].values:
        if (setting, value) in left.because:
            other, others = left.because[setting, value]
            refusal = refusal_of((setting, value), (other, others[0]))
            assert refusal
            with_others = shown(other, _any_of(others) if len(others) > 1 else others[0])
            yield f"{'    ' * depth}{shown(setting, value)} with {with_others}: {refusal.reason}"
            if other not in features:
                yield from _reasons(left, other, features, depth + 1)


def _sentence(one: tuple[str, str], two: tuple[str, str], refusal: Refusal) -> str:
    first, second = (one, two) if one[0] == refusal.setting.name else (two, one)
    cure = _cure(refusal, first[1], second[1])
    return f"{shown(*first)} with {shown(*second)}: {refusal.reason}\n    cure: {cure}"


def _cure(refusal: Refusal, value: str, other_value: str) -> str:
    """What to set instead, on either side."""
    setting, other = refusal.setting, refusal.other
    ours, theirs = _fitting(setting, other, other_value), _fitting(other, setting, value)
    return f"set {setting.key} to {_any_of(ours)}, or {other.key} to {_any_of(theirs)}"


def _fitting(setting: Setting, other: Setting, value: str) -> list[str]:
    """Values of ``setting`` that go together with ``value`` of ``other``."""
    return [own for own in setting.values if not refusal_of((setting.name, own), (other.name, value))]


def _any_of(values: Sequence[str]) -> str:
    words = [CLASSES[value][1] if value in CLASSES else value for value in values]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _as_is(value: str) -> str:
    return CLASSES[value][0] if value in CLASSES else value
