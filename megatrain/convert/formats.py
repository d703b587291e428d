"""The formats that the converter knows: how each is recognised, read, written and run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.folder import checkpoint_at
from megatrain.convert.deepspeed.experts import expert_files
from megatrain.convert.deepspeed.modules import ModulesReader
from megatrain.convert.deepspeed.read import (
    UniversalReader,
    ZeroReader,
    is_universal,
    is_zero,
    tag_folder,
    zero_states,
)
from megatrain.convert.deepspeed.write import UniversalWriter, ZeroWriter
from megatrain.convert.errors import ConversionError
from megatrain.convert.huggingface.model import HuggingFaceReader, HuggingFaceWriter
from megatrain.convert.huggingface.runner import HuggingFaceRunner
from megatrain.convert.huggingface.tokenizer import CONFIG
from megatrain.convert.megatron.model import MegatronReader, MegatronWriter, iteration_folder
from megatrain.convert.native import NativeReader, NativeWriter
from megatrain.convert.own_tokenizer import extras_for, keep_extras
from megatrain.convert.runners import OwnRunner, Runner
from megatrain.convert.table import Reader, Weights, Writer


@dataclass(frozen=True)
class Choices:
    """What a person may choose.

    ``dtype``: of the weights in Hugging Face's and Megatron-core's files; ``vocab_multiple``: pad an imported
    vocabulary to a multiple; ``tokenizer``: a file or folder, by default what lies beside the source;
    ``model_file``: a config that says what model the source is, where its format does not; ``trust_pickle``: the
    source may be opened though it is a pickle; ``zero_ranks``: data-parallel ranks of a ZeRO checkpoint to write,
    and ``tensor_ranks``: of each of these; ``spread_experts``: a Megatron-core checkpoint is for runs that spread
    experts over ranks; ``weights_only``: leave the optimizer's states behind.
    """

    dtype: torch.dtype = torch.float32
    shard_bytes: int = 5 * 10**9
    vocab_multiple: int = 1
    tokenizer: Path | None = None
    model_file: Path | None = None
    trust_pickle: bool = False
    zero_ranks: int = 1
    tensor_ranks: int = 1
    spread_experts: bool = False
    weights_only: bool = False


@dataclass(frozen=True)
class Format:
    """How to tell, read, write and run the models of a format.

    ``write(folder, reader, choices)`` gives the writer for what ``reader`` reads;
    ``runner(reader, dtype)`` the model in FP32, its weights rounded to ``dtype`` before.
    """

    recognises: Callable[[Path], bool]
    read: Callable[[Path, Choices], Reader]
    write: Callable[[Path, Reader, Choices], Writer]
    runner: Callable[[Reader, torch.dtype], Runner]


def detect(path: Path) -> str:
    """The format of what lies at ``path``.

    Raises:
        ConversionError: nothing, or none that is known.
    """
    for name, format in FORMATS.items():
        if format.recognises(path):
            return name
    what = "holds no model in a known format" if path.exists() else "does not exist"
    raise ConversionError(f"{path} {what}; the formats are: {', '.join(FORMATS)}")


def _native_checkpoint(path: Path) -> Path | None:
    """``path`` itself, or the newest checkpoint of the run there; None: there is none."""
    try:
        return checkpoint_at(path)
    except CheckpointError:
        return None


def _read_native(path: Path, choices: Choices) -> Reader:
    checkpoint = _native_checkpoint(path)
    assert checkpoint is not None
    return NativeReader(checkpoint)


def _write_native(folder: Path, reader: Reader, choices: Choices) -> Writer:
    return NativeWriter(folder, reader.model, reader.step, keep_extras(reader, choices.tokenizer, folder))


def _write_hugging_face(folder: Path, reader: Reader, choices: Choices) -> Writer:
    extras, eod_id = extras_for(reader, choices.tokenizer)
    return HuggingFaceWriter(folder, reader.model, choices.dtype, choices.shard_bytes, extras, eod_id)


def _run_hugging_face(reader: Reader, dtype: torch.dtype) -> Runner:
    assert isinstance(reader, HuggingFaceReader)
    return HuggingFaceRunner(reader.path, reader.family, reader.dtype)


def _run_here(reader: Reader, dtype: torch.dtype) -> Runner:
    return OwnRunner(Weights(reader), dtype)


def _read_megatron(path: Path, choices: Choices) -> Reader:
    folder = iteration_folder(path)
    assert folder is not None
    return MegatronReader(folder, choices.model_file, choices.trust_pickle, choices.weights_only)


def _read_deepspeed(path: Path, choices: Choices) -> Reader:
    folder = tag_folder(path)
    if choices.weights_only and expert_files(folder) and not zero_states(folder):
        return ModulesReader(path, choices.model_file, choices.trust_pickle)
    return ZeroReader(path, choices.model_file, choices.trust_pickle)


def _write_megatron(folder: Path, reader: Reader, choices: Choices) -> Writer:
    states = "exp_avg" in reader.kinds and not choices.weights_only
    return MegatronWriter(
        folder,
        reader.model,
        choices.dtype,
        choices.shard_bytes,
        reader.step,
        _adam_settings(reader),
        states,
        choices.spread_experts,
    )


def _write_deepspeed(folder: Path, reader: Reader, choices: Choices) -> Writer:
    return ZeroWriter(
        folder, reader.model, reader.step, choices.zero_ranks, choices.tensor_ranks, _adam_settings(reader)
    )


def _adam_settings(reader: Reader) -> dict[str, Any]:
    return reader.adam if isinstance(reader, NativeReader) else {}


FORMATS = {
    "megatrain": Format(lambda path: _native_checkpoint(path) is not None, _read_native, _write_native, _run_here),
    "huggingface": Format(
        lambda path: (path / CONFIG).is_file(),
        lambda path, choices: HuggingFaceReader(path, choices.vocab_multiple, choices.trust_pickle),
        _write_hugging_face,
        _run_hugging_face,
    ),
    "megatron": Format(lambda path: iteration_folder(path) is not None, _read_megatron, _write_megatron, _run_here),
    "deepspeed": Format(
        is_zero,
        _read_deepspeed,
        _write_deepspeed,
        _run_here,
    ),
    "universal": Format(
        is_universal,
        lambda path, choices: UniversalReader(path, choices.model_file, choices.trust_pickle),
        lambda folder, reader, choices: UniversalWriter(folder, reader.model, reader.step),
        _run_here,
    ),
}
