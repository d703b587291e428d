"""The mutants, by the part of the package that they stand in."""

from tests.mutants.mutant import Mutant
from tests.mutants.rooms import (
    checkpoint,
    convert,
    data,
    encoders,
    engine,
    mixtures,
    models,
    optim,
    parallel,
    public,
    recompute,
    train,
)

ROOMS: dict[str, list[Mutant]] = {
    "public": public.MUTANTS,
    "optim": optim.MUTANTS,
    "models": models.MUTANTS + recompute.MUTANTS,
    "encoders": encoders.MUTANTS,
    "mixtures": mixtures.MUTANTS,
    "engine": engine.MUTANTS,
    "parallel": parallel.MUTANTS,
    "data": data.MUTANTS,
    "checkpoint": checkpoint.MUTANTS,
    "convert": convert.MUTANTS,
    "train": train.MUTANTS,
}
ALL = [mutant for mutants in ROOMS.values() for mutant in mutants]
SAMPLE = [mutants[0] for mutants in ROOMS.values()]
"""One of each part, cheap to see: the first of its list."""
