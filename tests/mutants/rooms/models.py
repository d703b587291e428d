"""Mistakes in the models: attention, feed-forwards, norms, positions, experts, the loss, initial weights."""

from tests.mutants.mutant import Mutant

_ONE = ("reference", "huggingface")
_MIXTURE = ("mixture", "reference", "ep")


def _m(file: str, old: str, new: str, kind: str, *see: str) -> Mutant:
    return Mutant(f"models/{file}.py", old, new, kind, see or _ONE)


MUTANTS = [
    # attention
    _m("attention", "key = self.query_norm(query), self.key_norm(key)", "key = self.query_norm(query), key", "dropped"),
    _m(
        "attention",
        "key = turn(query, turns), turn(key, turns)",
        "key = turn(query, turns), key",
        "one of two forgotten",
    ),
    _m(
        "attention", "self.queries_per_group, 1, 1], dim=-2)  #", "1, self.queries_per_group, 1], dim=-2)  #", "swapped"
    ),
    _m(
        "attention",
        "query, key, value = groups.split",
        "query, value, key = groups.split",
        "swapped",
    ),
    _m("attention", "/ math.sqrt(query.shape[-1])", "/ query.shape[-1]", "wrong scale", "reference", "documents"),
    _m("attention", "/ math.sqrt(query.shape[-1])", "", "missing scale", "reference", "documents"),
    _m("attention", ".tril(cols - rows)\n", ".tril(cols - rows + 1)\n", "off by one", "reference", "cp"),
    _m("attention", ".tril(cols - rows)\n", ".tril()\n", "dropped term", "cp"),
    _m("attention", "~visible, -math.inf", "~visible, 0.0", "wrong mask value", "reference", "documents"),
    _m("attention", ".softmax(dim=-1)", ".softmax(dim=-2)", "wrong dim", "reference", "documents"),
    _m("attention", "return self.dropout(weights, keys_B)", "return (weights)", "dropped term", "reference"),
    _m("attention", "visible, is_causal=visible is None", "visible, is_causal=False", "wrong flag"),
    _m("attention", "causal_lower_right(rows, cols)", "None", "wrong mask", "cp"),
    _m(
        "attention",
        "visible_pairs(documents, rows, cols)",
        "visible_pairs(documents, cols, cols)",
        "wrong size",
        "cp",
        "documents-split",
    ),
    _m(
        "attention",
        "repeat_interleave(query.shape[1] // key.shape[1], dim=1)",
        "repeat(1, query.shape[1] // key.shape[1], 1, 1)",
        "wrong order",
        "reference",
        "documents",
    ),
    _m(
        "attention",
        "head_norms else None\n        self.key_norm",
        "head_norms else None\n        self.query_norm",
        "swapped",
        "huggingface",
    ),
    _m(
        "attention",
        "nn.RMSNorm(self.head_width, config.norm_eps)",
        "nn.RMSNorm(self.head_width)",
        "wrong epsilon",
        "reference",
    ),
    _m(
        "document_attention", "value[None], is_causal=True,", "value[None], is_causal=False,", "wrong flag", "documents"
    ),
    _m(
        "document_attention",
        "(positions_BS == 0).cumsum(1)\n\n",
        "(positions_BS == 1).cumsum(1)\n\n",
        "off by one",
        "documents",
    ),
    _m("document_attention", "repeat_interleave(copies, 1)", "repeat(1, copies, 1)", "wrong order", "documents"),
    _m(
        "documents",
        "(positions_BT == 0).cumsum(1), kernel",
        "(positions_BT == 1).cumsum(1), kernel",
        "off by one",
        "documents",
    ),
    _m(
        "documents",
        "positions_BT[:, own_S].transpose(0, 1)",
        "positions_BT[:, : len(own_S)].transpose(0, 1)",
        "wrong part",
        "documents-split",
    ),
    _m(
        "documents",
        "return own_S[:, None] if documents is None else",
        "return own_S[:, None] if True else",
        "ignored input",
        "documents",
    ),
    _m(
        "documents", "numbers[:, cols - rows :, None]", "numbers[:, :rows, None]", "wrong part", "documents-split", "cp"
    ),
    _m("documents", "same.tril(cols - rows)", "same.tril(cols - rows - 1)", "off by one", "documents"),
    # blocks and the whole
    _m(
        "decoder",
        "x = x_SBD + self.attention_dropout(mixed, keys_B)",
        "x = self.attention_dropout(mixed, keys_B)",
        "missing residual",
    ),
    _m(
        "decoder",
        "normed = self.feed_forward_norm(x)",
        "normed = self.feed_forward_norm(x_SBD)",
        "stale input",
    ),
    _m("decoder", "normed = self.feed_forward_norm(x)", "normed = x", "missing norm"),
    _m("decoder", "return x + self.feed_forward_dropout(", "return x_SBD + self.feed_forward_dropout(", "stale input"),
    _m(
        "decoder",
        'config.dropout, f"{site}.feed_forward.output"',
        'config.dropout, f"{site}.attention.output"',
        "same mask twice",
        "reference",
    ),
    _m(
        "decoder",
        'layers.dropout(config.dropout, "embedding")',
        'layers.dropout(0.0, "embedding")',
        "ignored option",
        "reference",
    ),
    _m(
        "decoder",
        'layers.dropout(config.dropout, f"{site}.attention.output")',
        'layers.dropout(config.attention_dropout, f"{site}.attention.output")',
        "wrong option",
        "reference",
    ),
    _m(
        "decoder",
        ".transpose(0, 1) + self.position(own_positions(own_S, documents))",
        ".transpose(0, 1)",
        "missing term",
    ),
    _m("decoder", "        x = self.final_norm(x)\n", "", "missing norm"),
    _m(
        "decoder",
        "hide_tokens_from(num_tokens(self.config), logits_SBV)",
        "hide_tokens_from(num_tokens(self.config) + 1, logits_SBV)",
        "off by one",
        "reference",
        "huggingface",
    ),
    _m("decoder", "if self.config.vocab_padding:", "if False:", "ignored option", "reference", "huggingface"),
    _m(
        "decoder",
        "RMSNorm, SwiGluFeedForward, SwiGluExperts, bias=False, rotary=True, head_norms=True",
        "RMSNorm, SwiGluFeedForward, SwiGluExperts, bias=False, rotary=True, head_norms=False",
        "wrong option",
    ),
    _m(
        "decoder",
        "rotary(positions_SB, self.factory.sequence_length(num_positions))",
        "rotary(positions_SB, num_positions)",
        "local size",
        "reference",
        "cp",
        "cp4",
    ),
    _m(
        "decoder",
        "num_shared_experts * expert_hidden_size(config)",
        "expert_hidden_size(config)",
        "missing factor",
        *_MIXTURE,
    ),
    _m("decoder", "number in mixture_layers(config)", "number + 1 in mixture_layers(config)", "off by one", *_MIXTURE),
    _m("decoder", 'residual_dtype == "fp32"', 'residual_dtype == "never"', "ignored option", "16-bit"),
    _m("decoder", 'logits_dtype == "fp32"', 'logits_dtype == "never"', "ignored option", "16-bit"),
    _m(
        "feed_forward",
        'self.down(F.gelu(self.up(x_SBD), approximate="tanh"))',
        "self.down(F.gelu(self.up(x_SBD)))",
        "another function",
    ),
    _m("feed_forward", "F.silu(gate) * up", "F.silu(up) * gate", "swapped"),
    _m("feed_forward", "F.silu(gate) * up", "F.silu(gate.detach()) * up", "lost gradient"),
    _m("feed_forward", "F.silu(gate) * up", "F.gelu(gate) * up", "another function"),
    _m("norm", "weight, bias, self.eps)", "weight, bias)", "wrong epsilon", "norms"),
    _m("norm", "weight, bias, self.eps)", "weight, None, self.eps)", "dropped term"),
    _m(
        "norm",
        "self.weight.to(x.dtype), self.eps)",
        "self.weight.to(x.dtype))",
        "wrong epsilon",
        "reference",
        "huggingface",
    ),
    _m("norm", "self.weight.to(x.dtype), self.eps)", "None, self.eps)", "dropped term"),
    # the loss and initial weights
    _m("loss", "(losses_SB * has_loss).sum(0)", "(losses_SB * has_loss).mean(0)", "mean for sum"),
    _m("loss", "(losses_SB * has_loss).sum(0)", "losses_SB.sum(0)", "missing mask"),
    _m("loss", "labels_SB != IGNORE", "labels_SB > 0", "wrong mask", "reference", "loop"),
    _m("loss", "labels_BS.transpose(0, 1)", "labels_BS.roll(-1, 1).transpose(0, 1)", "off by one"),
    _m(
        "initial",
        "std /= math.sqrt(2 * config.num_layers)",
        "std /= math.sqrt(config.num_layers)",
        "missing factor",
        "reference",
    ),
    _m(
        "initial",
        "std /= math.sqrt(2 * config.num_layers)",
        "std /= 2 * config.num_layers",
        "missing root",
        "reference",
    ),
    _m("initial", "generator=generator) * std", "generator=generator) * std**2", "variance for deviation", "reference"),
    _m("initial", '    "attention.output.weight",\n', "", "one of several forgotten", "reference"),
    _m("initial", '    "feed_forward.experts.down",\n', "", "one of several forgotten", "reference"),
    _m("initial", 'f"{seed}/{name}"', 'f"{seed}"', "same numbers for all", "reference"),
    _m("initial", 'f"{seed}/{name}"', 'f"{name}"', "ignored seed", "reference"),
    _m("initial", "return torch.ones(shape)", "return torch.zeros(shape)", "wrong start"),
    _m(
        "initial",
        "layers.local_part(whole, parameter)",
        "whole[tuple(map(slice, parameter.shape))]",
        "wrong part",
        "tp",
    ),
    _m(
        "build",
        "blocks[stage], first=stage == 0, last=stage == len(blocks) - 1",
        "blocks[stage], first=stage == 0, last=stage == len(blocks)",
        "off by one",
        "loop",
    ),
    _m(
        "build",
        "        built[-1].embedding.word = built[0].embedding.word  # both ends of the model are here: one table",
        "        pass",
        "two copies of one weight",
        "schedules",
    ),
    # rotary positions
    _m("rotary", "first * cos - second * sin", "first * cos + second * sin", "wrong sign"),
    _m("rotary", "second * cos + first * sin", "second * cos - first * sin", "wrong sign"),
    _m(
        "rotary",
        "theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)",
        "theta ** (torch.arange(0, width, 2, device=device, dtype=torch.float32) / (width // 2))",
        "missing factor",
    ),
    _m(
        "rotary",
        "positions_SB.float()[:, :, None, None] * frequencies",
        "positions_SB.float()[:, :, None, None] + 1",
        "dropped term",
    ),
    _m(
        "rotary",
        "/ config.rope_scaling_factor\n\n\ndef _dynamic",
        "* config.rope_scaling_factor\n\n\ndef _dynamic",
        "inverse",
        "huggingface",
        "reference",
    ),
    _m("rotary", "/ original - (factor - 1)", "/ original - factor", "off by one", "huggingface", "reference"),
    _m("rotary", "max(length, original)", "original", "ignored input", "huggingface", "reference"),
    _m("rotary", "(width / (width - 2))", "(width / (width + 2))", "wrong sign", "huggingface", "reference"),
    _m(
        "rotary",
        "rope_long_factors if length >",
        "rope_long_factors if length <",
        "wrong way",
        "huggingface",
        "reference",
    ),
    _m(
        "rotary", "(turns - low) / (high - low)", "(turns - high) / (high - low)", "swapped", "huggingface", "reference"
    ),
    _m("rotary", "(1 - kept) * frequencies / config", "kept * frequencies / config", "complement", "huggingface"),
    _m(
        "rotary", "(2 * math.pi / frequencies)", "(math.pi / frequencies)", "missing factor", "huggingface", "reference"
    ),
    _m(
        "rotary",
        "math.floor(number(config.rope_beta_fast))",
        "math.ceil(number(config.rope_beta_fast))",
        "rounding",
        "huggingface",
        "reference",
    ),
    _m(
        "rotary",
        "* stretched + frequencies * (1 - stretched)",
        "* (1 - stretched) + frequencies * stretched",
        "complement",
        "huggingface",
        "reference",
    ),
    _m("rotary", "0.1 * math.log(factor) + 1.0", "0.1 * math.log(factor)", "dropped term", "huggingface", "reference"),
    _m("rotary", "angles.sin() * size", "angles.sin()", "one of two forgotten", "huggingface", "reference"),
]
