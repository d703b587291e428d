"""A small file is written whole or not at all."""

from pathlib import Path

from megatrain.disk.durable import write_durably


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"one")
    write_durably(path, b"two")
    assert path.read_text() == "two"
    assert list(tmp_path.iterdir()) == [path]
