"""How gradients become updates, when, and where the state of it lies."""

from typing import Annotated, Literal

from pydantic import Field

from megatrain.spec.section import Natural, PathText, Positive, PositiveFloat, Probability, Section


class OptimizerRule(Section):
    """An exception for parameters by name. A field that is not set stays as it is without the rule."""

    pattern: str = Field(description="Canonical names, with * for any text: layers.*.attention.*")
    lr_scale: PositiveFloat | None = Field(None, description="Factor on the learning rate; without any rule 1.")
    weight_decay: Annotated[float, Field(ge=0.0)] | None = Field(None, description="Instead of optimizer.weight_decay.")


class OptimizerConfig(Section):
    """How gradients become updates; decoupled weight decay (Loshchilov & Hutter 2019) in all of them."""

    name: Literal["adamw", "lion", "adafactor", "muon", "cpu_adamw"] = Field(
        "adamw",
        description="adamw; lion (Chen et al. 2023); adafactor (Shazeer & Stern 2018): no first moment, lr relative to "
        "the size of a weight, a factored second moment; muon: orthogonalised momentum for matrices, adamw for "
        "embeddings, head and vectors (Jordan et al. 2024); cpu_adamw: DeepSpeed's, for offload.optimizer (compiled "
        "at the start: needs g++ and ninja).",
    )
    lr: PositiveFloat = Field(3e-4, description="Peak learning rate.")
    beta1: Probability = Field(0.9, description="Decay of the first moment.")
    beta2: Probability = Field(0.95, description="Decay of the second moment.")
    eps: PositiveFloat = Field(1e-8, description="Added to the root of the second moment.")
    weight_decay: Annotated[float, Field(ge=0.0)] = Field(
        0.1, description="Decay of matrices; norms and biases have none."
    )
    muon_momentum: Probability = Field(0.95, description="muon: decay of the momentum of matrices.")
    muon_split_qkv: bool = Field(
        True,
        description="muon: orthogonalise queries, keys and values each by themselves, as its author advises; false: "
        "the matrix in which they are stacked as one.",
    )
    rules: list[OptimizerRule] = Field(
        default_factory=list,
        description="Exceptions by name, a list of {pattern, lr_scale, weight_decay}. Of the rules that fit a name the "
        "last that sets lr_scale gives it, and the last that sets weight_decay gives that.",
    )
    grad_clip: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Largest global gradient norm; 0: no clipping.")


class OffloadConfig(Section):
    """Training state outside the GPU, by DeepSpeed. Where tensors lie changes no number."""

    optimizer: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where master weights and optimizer state lie, and are updated; nvme: ZeRO 3 only."
    )
    parameters: Literal["none", "cpu", "nvme"] = Field(
        "none", description="Where ZeRO 3's weights lie between their uses."
    )
    nvme_path: PathText | None = Field(None, description="Folder on a local disk, for nvme.")


class ScheduleConfig(Section):
    """Learning rate over the steps."""

    name: Literal["cosine", "linear", "inverse_sqrt", "constant", "wsd"] = Field(
        "cosine", description="Shape after the warm-up; wsd is warm-up, stable, decay."
    )
    warmup_steps: Natural = Field(0, description="Steps of linear warm-up from 0 to the peak.")
    decay_steps: Positive | None = Field(
        None,
        description="cosine, linear: step at which the minimum is reached (default: train.steps). "
        "wsd: steps of the final decay (default: a tenth of train.steps).",
    )
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.1, description="Lowest rate as a share of the peak."
    )
