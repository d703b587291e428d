"""The microscope: what a rank saw, without the run's processes, and who saw a document."""

import json
import re

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_tools.show_batch import main
from megatrain.config.derive import resolve
from megatrain.config.show import to_yaml
from tests.data.factory import byte_tokenizer, write_documents
from tests.data.reading import run_config, training_data

TEXTS = [f"{word} number {number} of its kind" for number in range(40) for word in ("apple", "pear", "plum")]


@pytest.fixture(params=["concatenate", "mask_documents", "pack_documents", "one_document"])
def run(request, tmp_path):
    """A run folder of two sources on 4 ranks, tp 2 x dp 2, whose weights have changed at step 6."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().decode())
    sources = {}
    for number, name in enumerate(("even", "odd")):
        documents = [[*tokenizer.encode(text).ids, 0] for text in TEXTS[number::2]]
        sources[name] = {"path": str(write_documents(tmp_path / name, [np.array(d) for d in documents], 257))}
    options = {"sequences": request.param, "seq_len": 32}
    sizes = {"global_batch_size": 8, "steps": 12}
    before = training_data(sources, sizes, **options)
    sources["odd"]["weight"] = 3
    config = run_config(sources, sizes, **options)
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tp": 2})})
    config = resolve(config, 4)
    data = training_data(sources, sizes, **options)
    data.resume(before.state(6), 6)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "data.json").write_text(json.dumps(data.state(6)))
    return folder, data, tokenizer


def test_it_shows_what_the_rank_read(run, capsys):
    folder, data, tokenizer = run
    for step, rank in ((3, 0), (9, 1), (9, 2), (9, 3)):
        assert main(["--run", str(folder), "--step", str(step), "--rank", str(rank)]) == 0
        shown = capsys.readouterr().out
        batch = data.loader(rank // 2, 2).batch(step - 1)
        assert shown.count("--- sequence") == 4
        for tokens, source in zip(batch.tokens.tolist(), batch.sources.tolist(), strict=True):
            assert tokenizer.decode(tokens, skip_special_tokens=False) in shown
            assert data.names[source] in shown


def test_it_shows_the_labels_of_hidden_tokens(tmp_path, capsys):
    text = "".join(map(chr, range(97, 123)))
    ids = Tokenizer.from_str(byte_tokenizer().decode()).encode(text).ids
    path = str(write_documents(tmp_path / "data", [np.array([*ids, 0])] * 9, 257))
    options = {"objective": "masked", "mask_token": 0, "mask_probability": 0.5, "sequences": "one_document"}
    config = run_config(path, {"global_batch_size": 1}, seq_len=32, **options)
    model = config.model.model_copy(update={"blocks": ["bidirectional"]})
    config = resolve(config.model_copy(update={"model": model}), 1)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    (tmp_path / "data.json").write_text(
        json.dumps(training_data(path, {"global_batch_size": 1}, seq_len=32, **options).state(0))
    )
    assert main(["--run", str(tmp_path), "--step", "1"]) == 0
    *_, shown, labels = capsys.readouterr().out.splitlines()
    told = re.findall(r"(\d+): '(.)'", labels)
    assert labels.startswith(f"labels at {len(told)} of 32 places: ") and len(told) > 3
    assert all(text[int(place)] == letter for place, letter in told)
    assert shown.count("<|endoftext|>") > 32 - len(text) - 1, "the end, padding, and what is hidden"


def test_it_tells_who_read_a_document(run, capsys):
    """Every step that it names shows the document, and no other step does."""
    folder, data, _ = run
    document = TEXTS[2 * 17 + 1]
    assert main(["--run", str(folder), "--find", document]) == 0
    out = capsys.readouterr().out
    assert out.startswith("odd:17 (")
    told = {
        (int(step), int(rank)) for step, rank in re.findall(r"step (\d+): sample \d+, data-parallel rank (\d)", out)
    }
    begin, end = data.datasets["odd"].document_bounds(17)
    seen = set()
    for step in range(12):
        for rank in range(2):
            batch = data.loader(rank, 2).batch(step)
            for sample in batch.sample_ids.numpy():
                source, index = (int(column[0]) for column in data.blend(sample[None]))
                spans = data.samples["odd"].spans(index) if data.names[source] == "odd" else []
                if any(start < end and start + count > begin for start, count in spans):
                    seen.add((step + 1, rank))
    assert told == seen and seen
    assert main(["--run", str(folder), "--document", "odd:17"]) == 0
    assert capsys.readouterr().out == out


def test_what_is_not_there_is_one_message(run, capsys, tmp_path):
    folder, *_ = run
    for arguments, message in (
        (["--run", str(tmp_path), "--step", "1"], "is not the folder of a run: it has no config.yaml"),
        (["--run", "nowhere", "--step", "1"], "--run nowhere is not there (looked for from "),
        (["--run", str(folder), "--step", "13"], "steps count from 1, and the run has 12 of them"),
        (["--run", str(folder), "--step", "0"], "steps count from 1"),
        (["--run", str(folder), "--step", "1", "--rank", "4"], "ranks 0 to 3"),
        (["--run", str(folder), "--document", "odd:999"], "no document odd:999: there are even:0 to 59, odd:0 to 59"),
        (["--run", str(folder), "--find", "cherry"], "no document holds 'cherry'"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
