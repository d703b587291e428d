"""Text from a checkpoint that carries its tokenizer: encoded as for training, moved anywhere, one message a mistake."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.implementations import BertWordPieceTokenizer

from launch.generate import main
from megatrain.checkpoint.store.arrays import CheckpointReader
from megatrain.checkpoint.store.errors import CheckpointError
from megatrain.checkpoint.store.tokenizer_file import CarriedTokenizer, tokenizer_of
from megatrain.checkpoint.tools.inspect import verify
from megatrain.checkpoint.tools.merge import average_factors, merge
from megatrain.convert.native import NativeWriter
from megatrain.inference.generate import generate
from megatrain.inference.prompt import Speech
from megatrain.models.build import build_model
from megatrain.spec.schema import ModelSpec
from tests.configs import model_spec
from tests.data.factory import byte_tokenizer, make_dataset
from tests.pool import Pool
from tests.train.test_saving import config_of, train

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "hello", "world", "##s")
POSITIONS = 12


def wordpiece() -> bytes:
    """A tokenizer.json that puts [CLS] and [SEP] around each text, where it is asked for special tokens."""
    return BertWordPieceTokenizer({word: number for number, word in enumerate(WORDS)}).to_str().encode()


def model_config() -> ModelSpec:
    sizes = {"num_layers": 1, "hidden_size": 16, "attention.num_heads": 2, "vocab_size": 8, "vocab_padding": 1}
    return model_spec({**sizes, "max_seq_len": POSITIONS})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a checkpoint of random weights."""
    writer = NativeWriter(tmp_path / "run" / "checkpoints", model_config(), 3, CarriedTokenizer(wordpiece(), 3))
    writer.begin({})
    for name, parameter in build_model(model_config(), 0).named_parameters():
        writer.write("weight", name, parameter.detach())
    writer.finish()
    return tmp_path / "run"


def test_prompts_are_encoded_and_read_as_in_training(run: Path) -> None:
    speech = Speech.of(CheckpointReader(run / "checkpoints" / "step-00000003"), None)
    assert speech.encode("Hello worlds") == [4, 5, 6], "no [CLS], no [SEP]"
    assert speech.encode("[SEP]") != [3], "text never ends a document"
    assert speech.encode("") == [3], "a document begins behind the end of another"
    assert speech.decode([4], [5, 6]) == " worlds", "the space between words"
    assert speech.eod_id == 3


def test_a_prompt_begins_as_the_documents_of_the_data_do(tmp_path: Path) -> None:
    carried = CarriedTokenizer(wordpiece(), 3, "[CLS]")
    writer = NativeWriter(tmp_path, model_config(), 3, carried)
    writer.begin({})
    for name, parameter in build_model(model_config(), 0).named_parameters():
        writer.write("weight", name, parameter.detach())
    writer.finish()
    reader = CheckpointReader(tmp_path / "step-00000003")
    assert tokenizer_of(reader) == carried
    assert Speech.of(reader, None).encode("Hello worlds") == [2, 4, 5, 6]
    assert Speech.of(reader, None).encode("") == [2]


def test_text_ends_with_the_documents_of_the_data() -> None:
    class Says:
        """A model that goes on with world, ##s and the end, whatever it reads."""

        config = model_config()

        def __call__(self, window: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(window.shape[1], 1, 8)
            logits[-1, 0, [5, 6, 3, 5][window.shape[1] - 1]] = 9.0
            logits[-1, 0, 7] = 20.0  # stands for no token
            return logits

    assert list(generate(Says(), [4], 4, 0.0, 0, stop_id=3)) == [5, 6]  # type: ignore[arg-type]
    assert list(generate(Says(), [4], 4, 1e-42, 0, stop_id=3)) == [5, 6], "as good as 0"  # type: ignore[arg-type]


def test_a_moved_checkpoint_is_all_that_is_needed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(run / "checkpoints" / "step-00000003", tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place in ("../moved", str(tmp_path / "moved")):
        assert main(["--run", place, "--prompt", "hello", "--max-new-tokens", "2", "--temperature", "0"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second and first.startswith("hello")
    assert main(["--run", "../moved", "--prompt", "", "--max-new-tokens", "2"]) == 0


MISTAKES: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "--run or --checkpoint says which model"),
    "not there": (["--run", "nowhere"], "no such folder: nowhere"),
    "a file": (["--run", "file"], "file is a file, not the folder of a checkpoint or a run"),
    "no checkpoints": (["--run", "."], "holds no checkpoint yet"),
    "temperature": (["--run", "run", "--temperature", "-1"], "'-1' is not a number from 0 on"),
    "not a number": (["--run", "run", "--temperature", "nan"], "'nan' is not a number from 0 on"),
    "tokens": (["--run", "run", "--max-new-tokens", "-5"], "'-5' is not a whole number from 1 on"),
    "seed": (["--run", "run", "--seed", "-1"], "'-1' is not a whole number from 0 on"),
    "too long": (["--run", "run", "--prompt", "hello " * 13], "13 tokens long, the model has 12 positions"),
    "bytes": (["--run", "run", "--prompt", "\udcff"], "is not text in UTF-8"),
    "another tokenizer": (["--run", "run", "--tokenizer", "other.json"], "is not the one that the model was trained"),
    "a tokenizer that is none": (["--run", "run", "--tokenizer", "file"], "is no tokenizer.json"),
    "an empty folder": (["--run", "run", "--tokenizer", "empty"], "holds no tokenizer.json"),
    "no tokenizer there": (["--run", "run", "--tokenizer", "nowhere"], "no tokenizer at nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_message(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("hello")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_bytes(byte_tokenizer())
    arguments, message = MISTAKES[mistake]
    try:
        code: Any = main(arguments)
    except SystemExit as error:  # argparse's
        code = error.code
    told = capsys.readouterr()
    assert code == 2 and not told.out
    assert len(re.findall("error: ", told.err)) == 1 and re.search(message, told.err), told.err


def test_a_damaged_or_lost_tokenizer_is_told(run: Path) -> None:
    file = run / "checkpoints" / "step-00000003" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b"world", b"wurld"))
    assert "tokenizer.json is damaged" in verify(CheckpointReader(file.parent), 1)[0]
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        Speech.of(CheckpointReader(file.parent), None)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing, which belongs to the checkpoint"):
        Speech.of(CheckpointReader(file.parent), None)


def test_runs_put_their_tokenizer_into_each_checkpoint(
    pool: Pool, memory_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = memory_path
    make_dataset(folder / "data", vocab_size=300)
    assert pool.run(train, 2, config_of(folder, steps=2)) == ["", ""]
    (folder / "data" / "tokenizer.json").unlink()
    reader = CheckpointReader(folder / "runs/test/checkpoints/step-00000002")
    merged = CheckpointReader(merge([reader, reader], average_factors(2), folder / "merged"))
    for one in (reader, merged):
        found = tokenizer_of(one)
        assert found is not None and (found.content, found.eod_id) == (byte_tokenizer(), 0)
    assert main(["--run", str(folder / "runs/test"), "--prompt", "def", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("def")
