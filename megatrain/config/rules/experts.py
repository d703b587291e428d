"""Rules of a mixture of experts: how tokens choose them, and how ranks share them."""

from collections.abc import Iterator

from megatrain.config.reading.problems import Problem
from megatrain.config.rules.model import divisors, listed
from megatrain.config.schema import RunConfig
from megatrain.spec.derive import mixture_layers


def tokens_find_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A token passes each expert once at most."""
    model = config.model
    if model.num_experts is not None and model.experts_per_token > model.num_experts:
        yield Problem(
            "model.experts_per_token",
            model.experts_per_token,
            f"is more than model.num_experts = {model.num_experts}",
            f"1 to {model.num_experts}",
            "lower model.experts_per_token, or raise model.num_experts",
        )


def experts_take_tokens(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """An expert that takes no token never learns."""
    model = config.model
    if model.num_experts is not None and model.expert_capacity == 0:
        yield Problem(
            "model.expert_capacity",
            model.expert_capacity,
            f"drops every token before the experts of model.num_experts = {model.num_experts}",
            "above 0, or null for no limit",
            "set model.expert_capacity to 1 or more (1: the even share), or leave model.num_experts out",
        )


def router_learns(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """A gate that is always 1 hands the token losses' gradient to no score: the router would stay as it began."""
    model = config.model
    if model.num_experts is None or model.experts_per_token > 1:
        return
    if model.num_experts == 1 and model.router_score == "softmax":
        yield Problem(
            "model.num_experts",
            1,
            "is one expert, whose softmax is always 1: the router gets no gradient from the token losses",
            "2 or more",
            "raise model.num_experts, or leave it out for a dense model",
        )
    elif model.router_normalize:
        yield Problem(
            "model.router_normalize",
            True,
            "divides the gate of model.experts_per_token = 1 expert by itself: it is always 1, and the router gets no "
            "gradient from the token losses",
            "false, where a token passes one expert",
            "set model.router_normalize to false (Fedus et al. 2021, eq. 2), or model.experts_per_token to 2 or more",
        )


def groups_share_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """The router's groups are equal, and those that a token may use hold as many experts as it needs."""
    model = config.model
    if model.num_experts is None:
        return
    if model.num_experts % model.router_groups:
        yield Problem(
            "model.router_groups",
            model.router_groups,
            f"does not divide model.num_experts = {model.num_experts}",
            listed(divisors(model.num_experts)),
            "choose one of these; 1 does not limit a token's choice",
        )
        return
    group, groups = model.num_experts // model.router_groups, model.router_groups
    least = -(-model.experts_per_token // group)
    if groups > 1 and least <= groups and not least <= model.router_groups_per_token <= groups:
        yield Problem(
            "model.router_groups_per_token",
            model.router_groups_per_token,
            f"groups of {group} experts, of model.router_groups = {groups}, must hold "
            f"model.experts_per_token = {model.experts_per_token} experts",
            f"{least} to {groups}",
            "choose one of these, or set model.router_groups to 1",
        )


def dense_blocks_leave_room(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Dense blocks come before blocks with experts."""
    model = config.model
    if model.num_experts is None:
        return
    if model.num_dense_layers >= model.num_layers:
        yield Problem(
            "model.num_dense_layers",
            model.num_dense_layers,
            f"leaves none of model.num_layers = {model.num_layers} blocks to model.num_experts = {model.num_experts}",
            f"0 to {model.num_layers - 1}",
            "lower model.num_dense_layers, or leave model.num_experts out for a dense model",
        )
    elif not mixture_layers(model):
        yield Problem(
            "model.expert_interval",
            model.expert_interval,
            f"leaves none of model.num_layers = {model.num_layers} blocks to model.num_experts = {model.num_experts}",
            f"1 to {model.num_layers}",
            "lower model.expert_interval or model.num_dense_layers",
        )


def expert_ranks_divide_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each expert rank holds equally many whole experts."""
    num_experts, ep = config.model.num_experts, config.parallel.ep
    if num_experts is not None and num_experts % ep:
        yield Problem(
            "model.num_experts",
            num_experts,
            f"is not divisible by parallel.ep = {ep}",
            f"multiples of {ep}",
            f"set model.num_experts to {-(-num_experts // ep) * ep}, or parallel.ep to one of "
            f"{listed(divisors(num_experts))}",
        )


def tensor_ranks_divide_experts(config: RunConfig, world_size: int | None) -> Iterator[Problem]:
    """Each tensor rank holds equally many columns of every expert."""
    model, tp = config.model, config.parallel.tp
    width = model.expert_hidden_size  # by default ffn_hidden_size, which has a rule of its own
    if model.num_experts is not None and width is not None and width % tp:
        yield Problem(
            "model.expert_hidden_size",
            width,
            f"is not divisible by parallel.tp = {tp}",
            f"multiples of {tp}",
            f"set model.expert_hidden_size to {-(-width // tp) * tp}, or parallel.tp to one of "
            f"{listed(divisors(width))}",
        )
