"""Rules of the data: weights, and batches that grow."""

from collections.abc import Iterator
from fractions import Fraction

from megatrain.config.reading.problems import Problem
from megatrain.config.rules.rule import rule
from megatrain.config.schema import RunConfig
from megatrain.spec.derive import num_tokens


@rule("data.train")
def sources_have_weight(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Somebody must give the first sample."""
    sources = config.data.train
    if sources and not any(Fraction(source.weight) for source in sources.values()):
        yield Problem(
            "data.train",
            {name: source.weight for name, source in sources.items()},
            "has weights that sum to 0",
            "at least one weight above 0",
            "give a source a weight above 0, or leave the weights out: all are 1 then",
        )


_LEAST_TEMPERATURE = 0.05


@rule("data.temperature")
def temperature_leaves_numbers(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Tokens of a source are raised to the power of 1 / temperature: 10^15 tokens to that of 20 are 10^300."""
    if config.data.temperature < _LEAST_TEMPERATURE:
        yield Problem(
            "data.temperature",
            config.data.temperature,
            "raises the tokens of a source to a power that no number holds",
            f"{_LEAST_TEMPERATURE} or more; 1 is each source's part, above 1 evens them out",
            "set data.temperature to 1 or more, or give the sources weights of their own",
        )


@rule("data.train", "data.weight_schedule")
def schedule_names_sources(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Changes of weights come in order, speak of sources that are there, and leave one with weight."""
    weights = {name: Fraction(source.weight) for name, source in config.data.train.items()}
    last = 0
    for number, change in enumerate(config.data.weight_schedule):
        key = f"data.weight_schedule.{number}"
        if unknown := sorted(set(change.weights) - set(weights)):
            cure = f"name sources of data.train: {', '.join(weights)}"
            yield Problem(f"{key}.weights", unknown, "are no sources", "names in data.train", cure)
        if change.from_sample <= last:
            cure = "put the changes in the order of their samples"
            text = f"does not come after sample {last}, where the weights change before"
            yield Problem(f"{key}.from_sample", change.from_sample, text, f"more than {last}", cure)
        last = change.from_sample
        weights |= {name: Fraction(weight) for name, weight in change.weights.items()}
        if weights and not any(weights.values()):
            cure = "give a source a weight above 0"
            yield Problem(f"{key}.weights", change.weights, "makes all weights 0", "at least one above 0", cure)


@rule("data.mask_token", "model.vocab_size", "model.vocab_padding")
def mask_token_is_a_token(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """What hides other tokens has a row of the embedding."""
    token, count = config.data.mask_token, num_tokens(config.model)
    if token is not None and token >= count > 0:
        yield Problem(
            "data.mask_token",
            token,
            f"is no token of the model, which has {count} (model.vocab_size - model.vocab_padding)",
            f"0 to {count - 1}",
            f"set model.vocab_size to {token + 1 + config.model.vocab_padding} or more, or choose another token",
        )


@rule("train.ramp", "train.global_batch_size", "data.seq_len")
def ramp_fits(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Stages come in order, and each one's step cuts whole samples of data.seq_len tokens."""
    train, data, last = config.train, config.data, 0  # a ramp may be longer than the run: it is stopped early then
    for number, stage in enumerate(train.ramp):
        key = f"train.ramp.{number}"
        batch, seq_len = stage.global_batch_size or train.global_batch_size, stage.seq_len or data.seq_len
        if stage.until_step <= last:
            yield Problem(
                f"{key}.until_step",
                stage.until_step,
                f"does not come after step {last}, until which the stage before holds",
                f"{last + 1} or more",
                "put the stages in the order of their steps",
            )
        last = stage.until_step
        if data.seq_len % seq_len or batch * seq_len % data.seq_len:
            yield Problem(
                f"{key}.seq_len",
                seq_len,
                f"does not cut whole samples of data.seq_len = {data.seq_len} tokens into {batch} sequences",
                "divisors of data.seq_len, with a batch that is a multiple of the quotient",
                f"set seq_len to {data.seq_len} divided by a whole number that divides {batch}",
            )
