"""What is asked of ``torch.distributed.checkpoint`` beyond its documented interface; see parallel/contract.py."""

CONTRACT: dict[str, str | None] = {
    "torch.distributed.checkpoint.filesystem._StorageInfo": "(relative_path, offset, length, …)",
    "torch.distributed.checkpoint.metadata._MEM_FORMAT_ENCODING": None,
    "torch.serialization._get_layout": "(name)",
}
