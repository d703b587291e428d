"""The tests that see mutants: names of few tests each, cheap and near to a part of the package."""

_LAYOUTS = "tests/parallel/test_layouts.py::test_layout_equals_one_process"
_DOCUMENTS = "tests/parallel/test_layouts.py::test_documents_in_any_layout_equal_one_process"
_CONTEXT = "tests/parallel/test_context.py::test_context_equals_one_process"
_EXPERTS = "tests/parallel/test_mixture.py::test_experts_equal_one_process"
_OPTIMIZERS = "tests/engine/test_optimizers.py::test_optimizer_equals_one_process"
_PRECISION = "tests/engine/test_precision.py::test_"
_RESUME = "tests/checkpoint/test_resume"
_BACK = "tests/convert/test_huggingface.py::test_there_and_back_is_bit_equal"
_MEGATRON = "tests/convert/test_megatron.py::test_"
_DEEPSPEED = "tests/convert/test_deepspeed.py::test_"
_COMPILED = "tests/models/test_mixture.py::test_a_compiled_block_leaves_its_mixture_alone"  # a minute

WITNESSES: dict[str, list[str]] = {
    # one process against plain torch, papers and transformers
    "reference": ["tests/reference/test_training.py", "tests/reference"],
    "rules": [
        "tests/reference/test_training.py::test_run_equals_the_reference"
        "[gpt: adamw, cosine, masked documents, dropout, ramp, rules, clipping]"
    ],
    "loop": ["tests/engine/test_bare_loop.py"],
    "optimizers": ["tests/optim"],
    "schedule": ["tests/optim/test_schedule.py"],
    "norms": ["tests/models/parts/test_norms.py"],
    "mixture": ["tests/models/test_mixture.py", "--deselect", f"{_COMPILED}"],
    "bert": ["tests/models/test_bert.py"],
    "objectives": ["tests/data/test_objectives.py"],
    "window-attention": ["tests/models/test_window_attention.py"],
    "documents": ["tests/models/test_documents.py", "tests/models/test_document_attention.py"],
    "recompute": ["tests/models/test_recompute.py"],
    "huggingface": [_BACK],
    # layouts against one process
    "tp": [f"{_LAYOUTS}[gpt-tp2-pp1-dp1-zero0]", f"{_LAYOUTS}[llama-tp2-pp1-dp1-zero0]"],
    "sp": [f"{_LAYOUTS}[gpt-tp2-pp1-dp1-sp-zero0]", f"{_LAYOUTS}[qwen3-tp2-pp2-dp2-sp-zero1]"],
    "dp": [f"{_LAYOUTS}[llama-tp1-pp1-dp2-zero{stage}]" for stage in range(4)],
    "pp": [f"{_LAYOUTS}[gpt-tp1-pp2-dp1-zero0]", f"{_LAYOUTS}[gpt-tp1-pp2-dp2-zero1]"],
    "schedules": [f"{_LAYOUTS}[gpt-tp1-pp2-dp1-{schedule}-zero0]" for schedule in ("zbv", "interleaved_1f1b")],
    "cp": [
        f"{_CONTEXT}[gpt-tp1-pp1-dp1-cp2-all_gather-zero1]",
        f"{_CONTEXT}[gpt-tp1-pp1-dp1-cp2-ulysses-zero1]",
    ],
    "cp-llama": [f"{_CONTEXT}[llama-tp1-pp1-dp1-cp2-all_gather-zero1]"],
    "tp-dp": [f"{_LAYOUTS}[llama-tp2-pp1-dp2-sp-zero0]"],
    "cp4": [
        "tests/parallel/test_context.py::test_positions_of_each_rank",
        f"{_CONTEXT}[gpt-tp2-pp2-dp1-cp2-all_gather-sp-zero1]",
    ],
    "ep": [
        f"{_EXPERTS}[llama-tp1-pp1-dp2-ep2-zero0]",
        f"{_EXPERTS}[gpt-tp1-pp1-dp2-ep2-zero2]",
        f"{_EXPERTS}[llama-tp1-pp1-dp4-ep2-zero2]",
    ],
    "ep-all": [
        f"{_EXPERTS}[gpt-tp1-pp1-dp1-cp2-all_gather-ep2-zero0]",
        f"{_EXPERTS}[gpt-tp2-pp1-dp1-sp-zero3]",
        f"{_EXPERTS}[llama-tp2-pp1-dp1-sp-zero3]",
        f"{_EXPERTS}[gpt-tp1-pp2-dp2-ep2-zero1]",
    ],
    "experts-tp": [f"{_EXPERTS}[llama-tp2-pp1-dp1-zero3]"],
    "experts-cp": [f"{_EXPERTS}[llama-tp1-pp1-dp1-cp2-all_gather-zero3]"],
    "documents-split": [
        f"{_DOCUMENTS}[llama-tp1-pp1-dp2-cp2-all_gather-zero1]",
        f"{_DOCUMENTS}[gpt-tp2-pp2-dp2-sp-zero1]",
    ],
    "16-bit": [
        f"{_PRECISION}layout_is_near_one_process[tp1-pp2-dp2-zbv-zero1-bf16]",
        f"{_PRECISION}overflow_skips_together_and_halves_the_scale",
        f"{_PRECISION}a_split_backward_sums_in_fp32",
        f"{_PRECISION}gradients_are_added_without_a_copy_to_the_same_bits",
        f"{_PRECISION}an_overflow_at_the_smallest_scale_ends_the_run_on_every_rank",
        f"{_PRECISION}fp32_residual_and_logits",
    ],
    "muon": [f"{_OPTIMIZERS}[muon-tp2-pp1-dp2-sp-zero1]", f"{_OPTIMIZERS}[muon-tp1-pp1-dp4-zero2]"],
    "adafactor": [f"{_OPTIMIZERS}[adafactor-tp2-pp1-dp2-sp-zero1]", f"{_OPTIMIZERS}[adafactor-tp1-pp1-dp4-zero2]"],
    "adafactor-zero0": [f"{_OPTIMIZERS}[adafactor-tp1-pp1-dp2-zero0]"],
    "lion": [f"{_OPTIMIZERS}[lion-tp2-pp1-dp2-zero2]"],
    "dropout-tp": [f"{_CONTEXT}[gpt-tp2-pp1-dp1-cp2-all_gather-zero1]"],
    "dropout-sp": [f"{_CONTEXT}[gpt-tp2-pp1-dp1-cp2-all_gather-sp-zero1]"],
    "ulysses-tp": [f"{_CONTEXT}[gpt-tp2-pp1-dp1-cp2-ulysses-zero1]"],
    "ulysses-heads": ["tests/parallel/test_ulysses.py"],
    "ulysses-gqa": [f"{_CONTEXT}[llama-tp1-pp1-dp1-cp4-ulysses-zero1]"],
    "pp-fp16": [f"{_PRECISION}layout_is_near_one_process[tp1-pp2-dp2-zero1-fp16]"],
    "16-bit-all": [f"{_PRECISION}layout_is_near_one_process"],
    "cpu-bf16": ["tests/engine/test_cpu_bf16.py"],
    "runtime": ["tests/engine/test_runtime.py"],
    "skips": ["tests/engine/test_skipped.py"],
    "cpu-adamw": ["tests/engine/test_base_optimizer.py"],
    "router-precision": ["tests/models/test_router_precision.py"],
    # checkpoints
    "saves": ["tests/checkpoint/test_save.py::test_training_goes_on_during_a_save"],
    "resume": [
        f"{_RESUME}.py::test_16_bit_resume_is_bit_exact[bf16-tp1-pp1-dp2-zero3]",
        f"{_RESUME}.py::test_16_bit_resume_is_bit_exact[fp16-tp2-pp1-dp2-zero2]",
    ],
    "resume-all": [f"{_RESUME}.py::test_resume_between_every_pair_of_layouts"],
    "resume-mixture": [f"{_RESUME}_mixture.py::test_resume_with_another_expert_axis[tp1-pp1-dp2-ep2-zero2]"],
    "resume-optimizers": [
        "tests/engine/test_optimizers.py::"
        f"test_a_resumed_run_has_the_same_bits_and_state_moves_to_another_layout[{name}]"
        for name in ("adafactor", "muon")
    ],
    "store": ["tests/checkpoint/test_store.py", "tests/checkpoint/test_shares.py", "tests/checkpoint/test_parts.py"],
    "merge": ["tests/checkpoint/test_tools.py::test_merge"],
    # conversion
    "hf-llama": [f"{_BACK}[llama3]"],
    "hf-qwen3": [f"{_BACK}[qwen3]"],
    "hf-gpt2": [f"{_BACK}[gpt2]"],
    "hf-moe": [f"{_BACK}[mixtral]", f"{_BACK}[qwen3-moe-dense]"],
    "hf-dense": [f"{_BACK}[qwen3-moe-dense]"],
    "hf-biases": [f"{_BACK}[llama-biases-yarn]"],
    "hf-tied": [f"{_BACK}[llama-tied-linear]"],
    "hf-longrope": [f"{_BACK}[llama-longrope]"],
    "hf-yarn-sizes": [f"{_BACK}[llama-yarn-sizes]"],
    "hf-dynamic": [f"{_BACK}[llama-dynamic]"],
    "hf-refused": ["tests/convert/test_huggingface.py::test_a_model_that_is_not_what_its_config_says_is_refused"],
    "other-side": ["tests/convert/test_other_side.py"],
    "native": ["tests/convert/test_native.py"],
    "megatron": [f"{_MEGATRON}megatron_core_loads_and_computes_the_same[llama2]"],
    "megatron-gpt2": [f"{_MEGATRON}megatron_core_loads_and_computes_the_same[gpt2]"],
    "megatron-moe": [f"{_MEGATRON}megatron_core_loads_and_computes_the_same[mixtral]"],
    "megatron-optimizer": [f"{_MEGATRON}states_of_the_optimizer_go_both_ways[FP32]"],
    "megatron-bf16": [f"{_MEGATRON}states_of_the_optimizer_go_both_ways[BF16, a mixture]"],
    "megatron-spread": [f"{_MEGATRON}states_of_the_optimizer_go_both_ways[distributed, experts spread]"],
    "deepspeed-tensor": [f"{_DEEPSPEED}several_tensor_ranks_are_read_and_written"],
    "deepspeed-experts": [f"{_DEEPSPEED}experts_that_deepspeed_spread_over_ranks_are_read"],
    # data
    "order": ["tests/data/test_order.py"],
    "windows": ["tests/data/test_windows.py", "tests/data/test_loader.py"],
    "rows": ["tests/data/test_document_rows.py"],
    "epochs": ["tests/data/test_epochs.py"],
    "blend": ["tests/data/test_blend.py"],
    "training-data": ["tests/data/test_training.py"],
    "data-run": ["tests/train/test_data_run.py"],
    # the run
    "dry-run": ["tests/train/test_run.py"],
    "show-batch": ["tests/data/test_show_batch.py"],
    "derive": [
        "tests/config/test_ranks.py",
        "tests/config/test_derive.py",
        "tests/config/test_stages.py",
        "tests/config/test_configs.py",
    ],
    "metrics": ["tests/record/test_metrics.py"],
    "plan": ["tests/plan/test_pipeline.py"],
    "topology": ["tests/parallel/test_topology.py"],
}


def tests_of(names: tuple[str, ...]) -> list[str]:
    """The tests of these witnesses, in their order."""
    return [test for name in names for test in WITNESSES[name]]
