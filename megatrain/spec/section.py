"""What every section of the config file has in common, and the kinds of numbers, paths and names in it."""

import os.path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0)]

PathText = Annotated[str, AfterValidator(os.path.expanduser)]
"""A path. Only a shell replaces ~ by the home folder, and only where a word begins with it: this does it everywhere."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
RunName = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$")]
PATTERNS = {
    r"^[A-Za-z0-9_-]+$": "letters from A to Z and a to z, digits, _ and -",
    r"^[A-Za-z0-9_][A-Za-z0-9._-]*$": "letters from A to Z and a to z, digits, _, - and ., the first neither - nor .",
}
"""What the patterns of names mean, in words."""


class Section(BaseModel):
    """A block of the config file: closed (no unknown keys), strict (no silent casts), frozen, finite numbers only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
