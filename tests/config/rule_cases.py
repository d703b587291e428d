"""What each rule forbids, and what it then says."""

from typing import Any

# overrides, ranks that were started, key, value, what the message says, what the cure says
CASES: list[tuple[str, int | None, str, Any, str, str]] = [
    (
        "model.attention.num_heads=7", None, "model.attention.num_heads", 7,
        "does not divide model.hidden_size = 256", "a multiple of 7",
    ),
    (
        "model.hidden_size=24 model.attention.num_heads=8", None, "model.attention.num_heads", 8,
        "heads of width 3 (model.hidden_size = 24 / num_heads); rotary positions turn pairs", "choose one of these",
    ),
    (
        "model.hidden_size=9 model.attention.num_heads=3", None, "model.attention.num_heads", 3,
        "must be even", "an even model.hidden_size",
    ),
    (
        "model.attention.num_kv_heads=3", None, "model.attention.num_kv_heads", 3,
        "does not divide model.attention.num_heads = 8", "leave it out",
    ),
    (
        "model.attention.num_kv_heads=16", None, "model.attention.num_kv_heads", 16,
        "does not divide model.attention.num_heads = 8", "choose one",
    ),
    (
        "model.attention.head_width=7", None, "model.attention.head_width", 7,
        "is odd; rotary positions turn pairs", "to 8",
    ),
    (
        "model.vocab_padding=50 model.vocab_size=50", None, "model.vocab_padding", 50,
        "leaves no token of model.vocab_size = 50 rows", "count the rows",
    ),
    (
        "model.rope.scaling=llama3 model.rope.low_freq_factor=4.5", None, "model.rope.high_freq_factor", 4.0,
        "is not more than model.rope.low_freq_factor = 4.5", "lower model.rope.low_freq_factor",
    ),
    (
        "model.rope.scaling=longrope model.attention.head_width=4 model.rope.short_factors=[1.0,2.0]", None,
        "model.rope.long_factors", None, "is not 2 numbers, which longrope needs", "choose another model.rope.scaling",
    ),
    (
        "model.rope.scaling=yarn model.rope.beta_slow=32.0", None, "model.rope.beta_fast", 32.0,
        "is not more than model.rope.beta_slow = 32.0", "raise model.rope.beta_fast",
    ),
    (
        "model.rope.scaling=yarn model.rope.theta=1", None, "model.rope.theta", 1.0,
        "no base of frequencies that fall", "set model.rope.theta to 10000",
    ),
    (
        "model.rope.scaling=longrope model.attention.head_width=4 model.rope.short_factors=[1.0,2.0] "
        "model.rope.long_factors=[1.0,2.0] model.rope.original_max_seq_len=1",
        None, "model.rope.original_max_seq_len", 1, "has the logarithm 0", "or set model.rope.attention_factor",
    ),
    (
        'data.train={"a":"x","b":"y"} data.weigh_by=tokens data.temperature=0.049', None, "data.temperature", 0.049,
        "to a power that no number holds", "to 1 or more",
    ),
    (
        "data.objective=masked data.mask_token=96 model.vocab_size=100 model.vocab_padding=4 "
        'model.blocks=["bidirectional"]',
        None, "data.mask_token", 96, "is no token of the model, which has 96", "model.vocab_size to 101 or more",
    ),
    (
        'data.train={"a":{"path":"x","weight":0}}', None, "data.train", {"a": "0"}, "has weights that sum to 0",
        "leave the weights out",
    ),
    (
        'data.train={"a":"x"} data.weight_schedule=[{"from_sample":5,"weights":{"b":1}}]', None,
        "data.weight_schedule.0.weights", ["b"], "are no sources", "name sources of data.train: a",
    ),
    (
        'data.train={"a":"x"} data.weight_schedule=[{"from_sample":5,"weights":{"a":0}}]', None,
        "data.weight_schedule.0.weights", {"a": "0"}, "makes all weights 0", "give a source a weight",
    ),
    (
        'data.train={"a":"x"} data.weight_schedule=[{"from_sample":5,"weights":{}},{"from_sample":5,"weights":{}}]',
        None, "data.weight_schedule.1.from_sample", 5, "does not come after sample 5", "in the order of their samples",
    ),
    (
        'train.ramp=[{"until_step":9},{"until_step":9}]', None, "train.ramp.1.until_step", 9,
        "does not come after step 9", "in the order of their steps",
    ),
    (
        'train.ramp=[{"until_step":9,"seq_len":64,"global_batch_size":2}] data.seq_len=256', None,
        "train.ramp.0.seq_len", 64,
        "does not cut whole samples of data.seq_len = 256 tokens into 2 sequences", "that divides 2",
    ),
    (
        'train.ramp=[{"until_step":9,"global_batch_size":3}] train.micro_batch_size=2 data.seq_len=256', None,
        "train.ramp.0.global_batch_size", 3, "is not divisible by the 2 sequences", "to 2 or 4",
    ),
    ("data.seq_len=2048", None, "data.seq_len", 2048, "more than model.max_seq_len = 1024", "to 1024 or less"),
    (
        "parallel.tp=2 parallel.pp=2", 2, "parallel.tp", 2,
        "more ranks asked for than started: tp 2 × cp 1 × pp 2 × dp 1 = 4 ranks, 2 were started", "--num_gpus 4",
    ),
    ("parallel.dp=8", 1, "parallel.dp", 8, "tp 1 × cp 1 × pp 1 × dp 8 = 8 ranks, 1 was started", "start 8 ranks"),
    ("parallel.dp=2", 4, "parallel.dp", 2, "fewer ranks asked for than started", "leave parallel.dp out"),
    ("parallel.tp=4", 6, "parallel.tp", 4, "6 were started: 2 left over", "start 4 or 8 ranks"),
    ("parallel.tp=2 model.vocab_size=50257", None, "model.vocab_size", 50257, "by parallel.tp = 2", "to 50258"),
    (
        "parallel.tp=8 model.attention.num_kv_heads=4", None, "model.attention.num_kv_heads", 4,
        "is not divisible by parallel.tp = 8", "a size that divides all that it splits: 1, 2, 4",
    ),
    (
        "parallel.tp=2 model.feed_forward.hidden_size=33", None, "model.feed_forward.hidden_size", 33,
        "by parallel.tp = 2", "to 34",
    ),
    (
        "parallel.tp=3 model.vocab_size=9 model.feed_forward.hidden_size=9", None, "model.attention.num_heads", 8,
        "is not divisible by parallel.tp = 3", "all that it splits: 1",
    ),
    (
        "parallel.sequence_parallel=true parallel.tp=2 data.seq_len=31", None, "data.seq_len", 31,
        "is not divisible by parallel.tp = 2", "set data.seq_len to 30",
    ),
    (
        "parallel.cp=2 data.seq_len=250", None, "data.seq_len", 250,
        "is not divisible by parallel.cp = 2 × 2 (parallel.cp_method = all_gather)", "set data.seq_len to 248",
    ),
    (
        "parallel.cp=3 parallel.cp_method=ulysses data.seq_len=255", None, "model.attention.num_heads", 8,
        "is not divisible by parallel.tp = 1 × parallel.cp = 3", "set parallel.cp to one of 1, 2, 4, 8",
    ),
    (
        "parallel.cp=4 parallel.tp=4 parallel.cp_method=ulysses", None, "model.attention.num_heads", 8,
        "by parallel.tp = 4 × parallel.cp = 4", "one of 1, 2, or parallel.cp_method to all_gather",
    ),
    (
        "parallel.cp=3 parallel.tp=2 parallel.sequence_parallel=true parallel.cp_method=ulysses data.seq_len=255 "
        "model.attention.num_heads=12 model.hidden_size=48", None, "data.seq_len", 255,
        "is not divisible by parallel.tp = 2 × parallel.cp = 3, over which", "set data.seq_len to 252",
    ),
    (
        "model.experts.num_experts=4 model.experts.capacity=0.0", None, "model.experts.capacity", 0.0,
        "drops every token before the experts of model.experts.num_experts = 4", "to 1 or more",
    ),
    (
        "parallel.ep=3 model.experts.num_experts=6", 4, "parallel.ep", 3,
        "parallel.cp = 1 × dp = 4 ranks that it shares out", "choose one of these",
    ),
    (
        "model.experts.num_experts=4 model.experts.per_token=5", None, "model.experts.per_token", 5,
        "more than model.experts.num_experts = 4", "lower model.experts.per_token",
    ),
    (
        "model.experts.num_experts=8 model.experts.per_token=1 model.router.score=sigmoid", None,
        "model.router.normalize", True,
        "divides the gate of model.experts.per_token = 1 expert by itself", "set model.router.normalize to false",
    ),
    (
        "model.experts.num_experts=1 model.experts.per_token=1 model.router.normalize=false", None,
        "model.experts.num_experts", 1,
        "is one expert, whose softmax is always 1", "leave it out for a dense model",
    ),
    (
        "model.experts.num_experts=8 model.router.groups=3", None, "model.router.groups", 3,
        "does not divide model.experts.num_experts = 8", "choose one of these",
    ),
    (
        "model.experts.num_experts=8 model.router.groups=4 model.experts.per_token=3", None,
        "model.router.groups_per_token", 1,
        "groups of 2 experts, of model.router.groups = 4, must hold model.experts.per_token = 3", "set model.router",
    ),
    (
        "model.experts.num_experts=4 model.experts.num_dense_layers=4", None, "model.experts.num_dense_layers", 4,
        "leaves none of model.num_layers = 4 blocks", "a dense model",
    ),
    (
        "model.experts.num_experts=4 model.experts.interval=5", None, "model.experts.interval", 5,
        "leaves none of model.num_layers = 4 blocks", "lower model.experts.interval",
    ),
    (
        "parallel.ep=4 model.experts.num_experts=6", None, "model.experts.num_experts", 6,
        "is not divisible by parallel.ep = 4", "to 8, or parallel.ep to one of 1, 2, 3, 6",
    ),
    (
        "parallel.tp=2 model.experts.num_experts=4 model.experts.hidden_size=33", None, "model.experts.hidden_size", 33,
        "is not divisible by parallel.tp = 2", "to 34, or parallel.tp to one of 1, 3, 11, 33",
    ),
    ("parallel.cp=4", 6, "parallel.cp", 4, "6 were started: 2 left over", "start 4 or 8 ranks"),
    ("parallel.pp=5 model.num_layers=4", None, "model.num_layers", 4, "less than the 5 pipeline stages", "use 5"),
    (
        "parallel.pp=2 parallel.stages_per_rank=2", None, "parallel.stages_per_rank", 2,
        "does not fit parallel.pp_schedule = 1f1b", "or parallel.pp_schedule to interleaved_1f1b",
    ),
    (
        "parallel.pp=2 parallel.pp_schedule=interleaved_1f1b", None, "parallel.stages_per_rank", 1,
        "does not fit parallel.pp_schedule = interleaved_1f1b", "set parallel.stages_per_rank to 2",
    ),
    (
        "train.global_batch_size=10 train.micro_batch_size=4", None, "train.global_batch_size", 10,
        "by the 4 sequences that are computed at once: train.micro_batch_size = 4",
        "to 8 or 12, or train.micro_batch_size to one of 1, 2, 5, 10",
    ),
    (
        "train.global_batch_size=10 train.micro_batch_size=2", 4, "train.global_batch_size", 10,
        "× dp = 4", "set train.global_batch_size to 8 or 16",
    ),
    ("train.global_batch_size=1", 2, "train.global_batch_size", 1, "× dp = 2", "set train.global_batch_size to 2"),
    (
        "parallel.pp=4 train.global_batch_size=2", None, "train.global_batch_size", 2,
        "makes 2 micro-batches of a rank in a step: too few for 1f1b with parallel.pp = 4",
        "set train.global_batch_size to 4, lower",
    ),
    (
        "parallel.pp=2 train.global_batch_size=4", 8, "train.global_batch_size", 4,
        "makes 1 micro-batches", "set train.global_batch_size to 8, lower",
    ),
    (
        "parallel.pp=2 parallel.stages_per_rank=2 parallel.pp_schedule=interleaved_1f1b train.global_batch_size=10",
        4, "train.global_batch_size", 10,
        "makes 5 micro-batches of a rank in a step; interleaved_1f1b runs them in 2 equal rounds", "to 8 or 12",
    ),
    (
        "parallel.pp=2 parallel.stages_per_rank=2 parallel.pp_schedule=interleaved_zero_bubble "
        "train.global_batch_size=5", 2, "train.global_batch_size", 5,
        "makes 5 micro-batches of a rank in a step; interleaved_zero_bubble runs them in 2 equal rounds", "to 4 or 6",
    ),
    (
        "parallel.pp=2 parallel.stages_per_rank=2 parallel.pp_schedule=dualpipev train.global_batch_size=3", 2,
        "train.global_batch_size", 3, "too few for dualpipev with parallel.pp = 2, which keeps 4", "to 4, lower",
    ),
    (
        "parallel.pp=2 parallel.stages_per_rank=3 parallel.pp_schedule=zbv model.num_layers=6", None,
        "parallel.stages_per_rank", 3, "does not fit parallel.pp_schedule = zbv", "set parallel.stages_per_rank to 2",
    ),
    (
        "parallel.pp=2 parallel.stages_per_rank=2 parallel.pp_schedule=gpipe", None,
        "parallel.stages_per_rank", 2, "does not fit parallel.pp_schedule = gpipe", "set parallel.stages_per_rank to 1",
    ),
    (
        "parallel.pp=2 parallel.stage_layers=[3,2]", None, "parallel.stage_layers", [3, 2],
        "names 2 stages with 5 blocks together; there are 2 stages", "or leave it out",
    ),
    (
        "parallel.stage_layers=[2,2]", None, "parallel.stage_layers", [2, 2], "there are 1 stages", "correct the list",
    ),
    (
        "offload.optimizer=nvme parallel.zero_stage=3", None, "offload.nvme_path", None,
        "names no folder, and offload.optimizer = nvme", "set offload.nvme_path",
    ),
    (
        "schedule.warmup_steps=20 schedule.decay_steps=20", None, "schedule.decay_steps", 20,
        "the warm-up lasts until schedule.warmup_steps = 20", "leave it out (train.steps = 100)",
    ),
    (
        "precision.dtype=fp16 precision.initial_loss_scale=1000", None, "precision.initial_loss_scale", 1000,
        "power of 2", "to 512 or 1024",
    ),
    (
        "precision.dtype=fp16 precision.min_loss_scale=0.5", None, "precision.min_loss_scale", 0.5,
        "less than 1, where DeepSpeed keeps the loss scale", "to 1; gradients that overflow",
    ),
    (
        "precision.dtype=fp16 precision.initial_loss_scale=0.5", None, "precision.initial_loss_scale", 0.5,
        "less than 1", "set precision.initial_loss_scale to 1",
    ),
    ("precision.dtype=fp16 precision.min_loss_scale=3", None, "precision.min_loss_scale", 3, "power of 2", "to 2 or 4"),
    (
        "precision.dtype=fp16 precision.min_loss_scale=131072", None, "precision.min_loss_scale", 131072,
        "more than precision.initial_loss_scale = 65536", "lower precision.min_loss_scale",
    ),
    ("deepspeed.train_batch_size=8", None, "deepspeed.train_batch_size", 8, "decided by", "train.global_batch_size"),
]  # fmt: skip
