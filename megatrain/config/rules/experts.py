"""Rules of a mixture of experts: how tokens choose them, and how ranks share them."""

from collections.abc import Iterator

from megatrain.config.reading.problems import Problem
from megatrain.config.rules.model import divisors, listed
from megatrain.config.rules.rule import rule
from megatrain.config.schema import RunConfig
from megatrain.spec.derive import mixture_layers

_EXPERTS = ("model.experts.num_experts", "model.experts.per_token")


@rule(*_EXPERTS)
def tokens_find_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A token passes each expert once at most."""
    model = config.model
    if model.experts.num_experts and model.experts.per_token > model.experts.num_experts:
        yield Problem(
            "model.experts.per_token",
            model.experts.per_token,
            f"is more than model.experts.num_experts = {model.experts.num_experts}",
            f"1 to {model.experts.num_experts}",
            "lower model.experts.per_token, or raise model.experts.num_experts",
        )


@rule("model.experts.num_experts", "model.experts.capacity")
def experts_take_tokens(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """An expert that takes no token never learns."""
    model = config.model
    if model.experts.num_experts and model.experts.capacity == 0:
        yield Problem(
            "model.experts.capacity",
            model.experts.capacity,
            f"drops every token before the experts of model.experts.num_experts = {model.experts.num_experts}",
            "above 0, or null for no limit",
            "set model.experts.capacity to 1 or more (1: the even share), or leave model.experts.num_experts out",
        )


@rule("model.experts.num_experts", "model.experts.per_token", "model.router.normalize", "model.router.score")
def router_learns(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A gate that is always 1 hands the token losses' gradient to no score: the router would stay as it began."""
    model = config.model
    if not model.experts.num_experts or model.experts.per_token > 1:
        return
    if model.experts.num_experts == 1 and model.router.score == "softmax":
        yield Problem(
            "model.experts.num_experts",
            1,
            "is one expert, whose softmax is always 1: the router gets no gradient from the token losses",
            "2 or more",
            "raise model.experts.num_experts, or leave it out for a dense model",
        )
    elif model.router.normalize:
        yield Problem(
            "model.router.normalize",
            True,
            "divides the gate of model.experts.per_token = 1 expert by itself: it is always 1, and the router gets no "
            "gradient from the token losses",
            "false, where a token passes one expert",
            "set model.router.normalize to false (Fedus et al. 2021, eq. 2), or model.experts.per_token to 2 or more",
        )


@rule("model.experts.num_experts", "model.experts.per_token", "model.router.groups", "model.router.groups_per_token")
def groups_share_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The router's groups are equal, and those that a token may use hold as many experts as it needs."""
    model = config.model
    if not model.experts.num_experts:
        return
    if model.experts.num_experts % model.router.groups:
        yield Problem(
            "model.router.groups",
            model.router.groups,
            f"does not divide model.experts.num_experts = {model.experts.num_experts}",
            listed(divisors(model.experts.num_experts)),
            "choose one of these; 1 does not limit a token's choice",
        )
        return
    group, groups = model.experts.num_experts // model.router.groups, model.router.groups
    least = -(-model.experts.per_token // group)
    if groups > 1 and least <= groups and not least <= model.router.groups_per_token <= groups:
        yield Problem(
            "model.router.groups_per_token",
            model.router.groups_per_token,
            f"groups of {group} experts, of model.router.groups = {groups}, must hold "
            f"model.experts.per_token = {model.experts.per_token} experts",
            f"{least} to {groups}",
            "choose one of these, or set model.router.groups to 1",
        )


@rule("model.experts.num_experts", "model.num_layers", "model.experts.num_dense_layers", "model.experts.interval")
def dense_blocks_leave_room(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Dense blocks come before blocks with experts."""
    model = config.model
    if not model.experts.num_experts:
        return
    if model.experts.num_dense_layers >= model.num_layers:
        yield Problem(
            "model.experts.num_dense_layers",
            model.experts.num_dense_layers,
            f"leaves none of model.num_layers = {model.num_layers} blocks to model.experts.num_experts = "
            f"{model.experts.num_experts}",
            f"0 to {model.num_layers - 1}",
            "lower model.experts.num_dense_layers, or leave model.experts.num_experts out for a dense model",
        )
    elif not mixture_layers(model):
        yield Problem(
            "model.experts.interval",
            model.experts.interval,
            f"leaves none of model.num_layers = {model.num_layers} blocks to model.experts.num_experts = "
            f"{model.experts.num_experts}",
            f"1 to {model.num_layers}",
            "lower model.experts.interval or model.experts.num_dense_layers",
        )


@rule("model.experts.num_experts", "parallel.ep")
def expert_ranks_divide_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each expert rank holds equally many whole experts."""
    num_experts, ep = config.model.experts.num_experts, config.parallel.ep
    if num_experts % ep:
        yield Problem(
            "model.experts.num_experts",
            num_experts,
            f"is not divisible by parallel.ep = {ep}",
            f"multiples of {ep}",
            f"set model.experts.num_experts to {-(-num_experts // ep) * ep}, or parallel.ep to one of "
            f"{listed(divisors(num_experts))}",
        )


@rule("model.experts.num_experts", "model.experts.hidden_size", "parallel.tp")
def tensor_ranks_divide_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each tensor rank holds equally many columns of every expert."""
    model, tp = config.model, config.parallel.tp
    width = model.experts.hidden_size  # by default that of the feed-forward, which has a rule of its own
    if model.experts.num_experts and width is not None and width % tp:
        yield Problem(
            "model.experts.hidden_size",
            width,
            f"is not divisible by parallel.tp = {tp}",
            f"multiples of {tp}",
            f"set model.experts.hidden_size to {-(-width // tp) * tp}, or parallel.tp to one of "
            f"{listed(divisors(width))}",
        )
