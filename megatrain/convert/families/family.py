"""What there is to know about a family of models on Hugging Face's hub."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatrain.convert.table import Line
from megatrain.spec.families import FAMILIES, FamilyName


@dataclass(frozen=True)
class Family:
    """One literal table of names, one of config fields.

    Attributes:
        model_type, architecture: as in ``config.json``.
        ours: the value of ``model.family``.
        lines: which tensors are which.
        prefix: what the names of a file without a head lack.
        blocks: the module that lists the blocks.
        fields: field of ``config.json`` -> (dotted field of ``ModelSpec``, what holds where the file leaves it out).
        fixed: fields that change the arithmetic, with the values that are computed here; the first is written.
        aliases: other spellings of fields.
        modules: the same in the names of the modules of transformers 5, where they are others than the files'.
        dense_blocks: field that lists blocks without experts.
        experts: whether its blocks are mixtures of experts.
        rope_theta: what holds where the file leaves it out.
        window: the field that says how far back attention reaches in every block, null: to the first position; and what
            holds where the file leaves it out.
        head: the rows of the output, which the file of a tied model need not have.
        copies: tensors that are another one under a second name: copy -> what it repeats.
        left_out: how the names of tensors begin that have no place here, and are left behind with a word.
        older: how names ended in older files -> how they end now.
        auto: the class of transformers that loads it.
        output: its module from activations to logits; None: the rows alone.
    """

    model_type: str
    architecture: str
    ours: FamilyName
    lines: tuple[Line, ...]
    prefix: str
    blocks: str
    fields: Mapping[str, tuple[str, Any]]
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    modules: tuple[Line, ...] | None = None
    dense_blocks: str | None = None
    experts: bool = False
    rope_theta: float = 10000.0
    window: tuple[str, int] | None = None
    head: str = "lm_head.weight"
    copies: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    older: Mapping[str, str] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    output: str | None = None

    @property
    def is_rotary(self) -> bool:
        """Whether its positions are rotary."""
        return FAMILIES[self.ours].preset["positions.kind"] == "rotary"
