"""All that is asked of DeepSpeed, and of torch's builder of operators, beyond their documented interfaces.

By dotted name: the parameters that a function must have, or None for what is no function and must be set in the
module. A release that moves one of them fails a test (tests/test_contracts.py) and not a run of some layout.
"""

_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"
_ZERO = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
_BF16 = "deepspeed.runtime.bf16_optimizer.BF16_Optimizer"
_STAGE3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"
_SCALER = "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"
_GROUPS = "deepspeed.utils.groups"
_OFFLOAD = "deepspeed.runtime.zero.parameter_offload"
_PARTITION = "deepspeed.runtime.zero.partition_parameters"
_FRAGMENT = "deepspeed.utils.tensor_fragment.tensor_fragment"

CONTRACT: dict[str, str | None] = {
    # the engine
    f"{_ENGINE}.optimizer": None,
    f"{_ENGINE}.basic_optimizer": None,
    f"{_ENGINE}.step": "(self, lr_kwargs=None)",
    f"{_ENGINE}.was_step_applied": "(self)",
    f"{_ENGINE}.get_global_grad_norm": "(self)",
    f"{_ENGINE}.destroy": "(self)",
    # ZeRO 1 and 2
    f"{_ZERO}.clip_grad": None,
    f"{_ZERO}.loss_scale": None,
    f"{_ZERO}.loss_scaler": None,
    f"{_ZERO}.device": None,
    f"{_ZERO}.model_parallel_group": None,
    f"{_ZERO}.bit16_groups": None,
    f"{_ZERO}.setup_buckets": "(self)",
    f"{_ZERO}.use_grad_accum_attribute": None,
    f"{_ZERO}.grad_accum": None,
    f"{_ZERO}.fill_grad_accum_attribute": "(self)",
    f"{_ZERO}._fill_param_grad_accum_attribute": "(self, param)",
    f"{_ZERO}.scaled_global_norm": "(self, norm_type=2)",
    f"{_ZERO}.get_grad_norm_direct": "(self, gradients, params, norm_type=2)",
    f"{_ZERO}._zero_padding": None,
    f"{_ZERO}.dp_process_group": None,
    f"{_ZERO}.unscale_and_clip_grads": "(self, grad_groups_flat, total_norm)",
    f"{_ZERO}._hp_optimizer_states_linked": None,
    f"{_ZERO}._lazy_init_hp_params_optimizer_state": "(self)",
    f"{_ZERO}.update_lp_params": "(self)",
    # BF16 weights with FP32 sums
    f"{_BF16}.clip_grad": None,
    f"{_BF16}.mpu": None,
    f"{_BF16}.bf16_groups": None,
    f"{_BF16}.fp32_groups_gradients": None,
    f"{_BF16}.fp32_groups_has_gradients": None,
    f"{_BF16}._hp_grad": None,
    f"{_BF16}._update_hp_grad": "(self, lp, group_idx, param_idx, clear_lp_grads)",
    f"{_BF16}.accumulate_hp_grads_and_remove_lp": "(self, lp_param, group_idx, param_idx)",
    f"{_BF16}.get_grads_for_norm": "(self, for_clipping=False)",
    f"{_BF16}._hp_optimizer_states_linked": None,
    f"{_BF16}._lazy_init_hp_params_optimizer_state": "(self)",
    f"{_BF16}.update_lp_params": "(self)",
    # ZeRO 3
    f"{_STAGE3}.clip_grad": None,
    f"{_STAGE3}.loss_scale": None,
    f"{_STAGE3}.loss_scaler": None,
    f"{_STAGE3}.fp32_partitioned_groups_flat": None,
    f"{_STAGE3}.parameter_offload": None,
    f"{_STAGE3}.persistent_parameters": None,
    f"{_STAGE3}._z3_optimizer": None,
    f"{_PARTITION}.ds_tensor": None,
    f"{_PARTITION}.ds_shape": None,
    f"{_PARTITION}.partition": None,
    f"{_PARTITION}.all_gather": None,
    f"{_OFFLOAD}.DeepSpeedZeRoOffload.partition_all_parameters": "(*args, **kwargs)",
    f"{_OFFLOAD}.FWD_MODULE_STACK": None,
    "deepspeed.runtime.zero.partitioned_param_coordinator.PartitionedParameterCoordinator"
    "._PartitionedParameterCoordinator__params_to_release": "(*args, **kwargs)",
    # where a parameter lies in the flat partitions
    "deepspeed.utils.mixed_precision_linkage._hp_mapping": None,
    f"{_FRAGMENT}.lp_fragment_address": None,
    f"{_FRAGMENT}.optim_fragment": None,
    f"{_FRAGMENT}.get_hp_fragment": "(self, optim_state_key=None)",
    "deepspeed.utils.safe_get_full_fp32_param": "(param)",
    "deepspeed.utils.safe_get_full_optimizer_state": "(param, optim_state_key)",
    "deepspeed.utils.safe_get_local_fp32_param": "(param)",
    "deepspeed.utils.safe_get_local_optimizer_state": "(param, optim_state_key)",
    "deepspeed.utils.safe_set_local_fp32_param": "(param, value)",
    "deepspeed.utils.safe_set_local_optimizer_state": "(param, value, optim_state_key)",
    # the loss scaler
    f"{_SCALER}.update_scale": "(self, overflow)",
    f"{_SCALER}.raise_error_at_min_scale": None,
    f"{_SCALER}.cur_scale": None,
    f"{_SCALER}.cur_iter": None,
    f"{_SCALER}.last_overflow_iter": None,
    f"{_SCALER}.cur_hysteresis": None,
    # experts
    "deepspeed.moe.layer.MoE.set_deepspeed_parallelism": "(self, use_data_before_expert_parallel_=False)",
    f"{_GROUPS}._EXPERT_PARALLEL_GROUP": None,
    f"{_GROUPS}._EXPERT_PARALLEL_GROUP_RANKS": None,
    f"{_GROUPS}._EXPERT_DATA_PARALLEL_GROUP": None,
    f"{_GROUPS}._EXPERT_DATA_PARALLEL_GROUP_RANKS": None,
    # starting
    "deepspeed.ops.__compatible_ops__": None,
    "torch.utils.cpp_extension._get_build_directory": "(name, verbose)",
    # whole weights
    "torch._foreach_norm": None,
    "torch._foreach_mul_": None,
}
