"""All that is asked of megatron-core and of torch's pipelines beyond their documented interfaces.

By dotted name: the parameters that a function must have (``…``: more may follow, with defaults), or None for what is
no function and must be set in the module. A release that moves one of them fails a test (tests/test_contracts.py).
"""

_STAGE = "torch.distributed.pipelining.stage.PipelineStage"
_SCHEDULES = "torch.distributed.pipelining.schedules"
_STATE = "megatron.core.parallel_state"

CONTRACT: dict[str, str | None] = {
    # a stage, of which a subclass here changes some methods
    f"{_STAGE}.submod": None,
    f"{_STAGE}.has_backward": None,
    f"{_STAGE}.forward_one_chunk": "(self, fwd_chunk_id, args, kwargs=None, …)",
    f"{_STAGE}.backward_weight_one_chunk": "(self, bwd_chunk_id, last_backward=False)",
    f"{_STAGE}.get_local_bwd_output": "(self, mb_index)",
    f"{_STAGE}.set_local_bwd_input": "(self, next_stage_bwd_outputs, mb_index)",
    # a schedule, and its table of actions
    f"{_SCHEDULES}.PipelineScheduleMulti.step": "(self, *args, target=None, losses=None, return_outputs=True, …)",
    f"{_SCHEDULES}.PipelineScheduleSingle.step": "(self, *args, target=None, losses=None, return_outputs=True, …)",
    f"{_SCHEDULES}.PipelineScheduleMulti.eval": "(self, *args, target=None, losses=None, …)",
    f"{_SCHEDULES}.PipelineScheduleSingle.eval": "(self, *args, target=None, losses=None, …)",
    f"{_SCHEDULES}._PipelineScheduleRuntime.pipeline_order": None,
    f"{_SCHEDULES}._PipelineScheduleRuntime._prepare_schedule_with_comms": "(self, actions, …)",
    f"{_SCHEDULES}._Action.sub_actions": None,
    f"{_SCHEDULES}._Action.computation_type": None,
    f"{_SCHEDULES}._Action.stage_index": None,
    "torch.distributed.pipelining._schedule_visualizer.get_schedule_ops": (
        "(schedule, pp_degree, num_microbatches, num_stages_per_rank=None, …)"
    ),
    # megatron-core's groups, and its linear for logits
    f"{_STATE}._TENSOR_MODEL_PARALLEL_GROUP": None,
    f"{_STATE}._GLOBAL_MEMORY_BUFFER": None,
    f"{_STATE}._set_global_memory_buffer": "()",
    f"{_STATE}.set_tensor_model_parallel_world_size": "(world_size)",
    f"{_STATE}.set_tensor_model_parallel_rank": "(rank)",
    f"{_STATE}.destroy_model_parallel": "()",
    "megatron.core.tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce": (
        "(input, weight, bias, gradient_accumulation_fusion, allreduce_dgrad, sequence_parallel, …)"
    ),
    "megatron.core.tensor_parallel.layers.VocabParallelEmbedding.reduce_scatter_embeddings": None,
}
