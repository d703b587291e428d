"""What the formats' own checksums and copies tell: a flipped byte, files that changed places."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatrain.convert.checksums import require_checksums
from megatrain.convert.errors import ConversionError
from megatrain.convert.formats import Choices
from megatrain.convert.run import Request, convert
from tests.convert.models import save_model

TRUST = Choices(trust_pickle=True)


def flip_in(path: Path, needle: bytes) -> None:
    """One bit of the number that begins with ``needle``."""
    data = bytearray(path.read_bytes())
    at = data.index(needle)
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama2", tmp_path_factory.mktemp("models") / "source")


@pytest.fixture
def run(tmp_path: Path, source: Path) -> Path:
    convert(Request(source, tmp_path / "run", "megatrain", verify=False))
    return tmp_path / "run"


def refused(folder: Path, target: Path, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        convert(Request(folder, target, "megatrain", verify=False, choices=TRUST))
    assert not target.exists()


def number_of(source: Path, name: str) -> bytes:
    return load_file(source / "model.safetensors")[name].flatten()[:8].numpy().tobytes()


def test_a_flipped_bit_is_told_by_the_crc(tmp_path: Path, source: Path, run: Path) -> None:
    shutil.copytree(source, tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(load_file(source / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    needle = number_of(source, "model.layers.1.self_attn.o_proj.weight")
    flip_in(tmp_path / "bin" / "pytorch_model.bin", needle)
    refused(tmp_path / "bin", tmp_path / "a", r"pytorch_model\.bin is damaged: Bad CRC-32 for file")
    convert(Request(run, tmp_path / "megatron", "megatron", verify=False))
    flip_in(tmp_path / "megatron" / "iter_0000000" / "__0_0.distcp", needle)
    refused(tmp_path / "megatron", tmp_path / "b", r"__0_0\.distcp: decoder.*linear_proj.* is damaged: Bad CRC-32")
    convert(Request(run, tmp_path / "ds", "deepspeed", verify=False))
    flip_in(tmp_path / "ds" / "global_step0" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", needle)
    refused(tmp_path / "ds", tmp_path / "c", r"optim_states\.pt is damaged: Bad CRC-32")


def test_files_without_checksums_are_let_through(tmp_path: Path) -> None:
    """``set_crc32_options(False)`` leaves zeros; files of before PyTorch 1.6 are no archives."""
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(3)}, tmp_path / "without.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save({"a": torch.ones(3)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    for name in ("without.bin", "old.bin"):
        require_checksums(tmp_path / name)


def test_states_of_ranks_that_changed_places_are_refused(tmp_path: Path, run: Path) -> None:
    convert(Request(run, tmp_path / "ds", "deepspeed", verify=False, choices=Choices(zero_ranks=2)))
    first, second = sorted((tmp_path / "ds" / "global_step0").glob("*_optim_states.pt"))
    states = [torch.load(file, weights_only=False) for file in (first, second)]
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    refused(
        tmp_path / "ds", tmp_path / "a", r"rank_0_.* was saved as zero_pp_rank_1_.*: files of two ranks have changed"
    )
    for file, state in zip((second, first), states, strict=True):  # under the other's name: the masters tell
        with open(file, "wb") as stream:
            torch.save(state, stream)
    refused(tmp_path / "ds", tmp_path / "a", r"the optimizer's weight, rounded, is not that of the modules in")


def test_a_universal_parameter_of_another_is_refused(tmp_path: Path, run: Path) -> None:
    convert(Request(run, tmp_path / "universal", "universal", verify=False))
    place = tmp_path / "universal" / "global_step0_universal" / "zero"
    shutil.copy(
        place / "model.layers.0.mlp.up_proj.weight" / "fp32.pt", place / "model.layers.1.mlp.up_proj.weight" / "fp32.pt"
    )
    refused(tmp_path / "universal", tmp_path / "a", r"layers\.1\.mlp\.up_proj\.weight: the optimizer's weight, rounded")


def test_a_megatron_master_of_another_save_is_refused(tmp_path: Path, run: Path) -> None:
    """A weight in BF16 and a master that does not round to it: two saves mixed, each whole in itself."""
    from megatrain.convert.native import NativeReader, NativeWriter

    bare = NativeReader(run / "step-00000000")
    for name, factor in (("one", 1.0), ("two", 1.5)):
        writer = NativeWriter(tmp_path / name, bare.model, 2)
        writer.begin({})
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            for key in bare.names():
                writer.write(kind, key, bare.read("weight", key) * factor)
        writer.finish()
        choices = Choices(dtype=torch.bfloat16)
        convert(Request(tmp_path / name, tmp_path / f"{name}-mcore", "megatron", longest=32, choices=choices))
    folder, other = (tmp_path / f"{name}-mcore" / "iter_0000002" for name in ("one", "two"))
    whole = Request(tmp_path / "one-mcore", tmp_path / "good", "megatrain", verify=False, choices=TRUST)
    assert convert(whole)["left_behind"] == []
    from megatrain.convert.megatron.torch_dist import TorchDistReader

    mine, theirs = TorchDistReader(folder), TorchDistReader(other)
    masters = {index for index in mine._places if "optimizer.state.param." in index.fqn and "linear_proj" in index.fqn}
    assert masters and all(index in theirs._places for index in masters)
    import pickle

    with open(folder / ".metadata", "rb") as file:
        found = pickle.load(file)
    for index in masters:
        place = theirs._places[index]
        shutil.copy(other / place.relative_path, folder / "__9_9.distcp")
        found.storage_data[index] = type(place)("__9_9.distcp", place.offset, place.length)
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    refused(
        tmp_path / "one-mcore", tmp_path / "a", r"linear_proj\.weight: the optimizer's master, rounded, is not the w"
    )
