"""What a tool writes takes no other file's place."""

import os
from pathlib import Path

import pytest

from megatrain.disk.durable import write_durably
from megatrain.disk.small import read_regular
from megatrain.disk.target import require_free, require_target


def test_a_place_is_free_only_where_nothing_stands(tmp_path: Path) -> None:
    require_free(tmp_path / "new")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, kind in (("file", "a file"), ("link", "a link"), ("pipe", "a pipe"), (".", "a folder")):
        with pytest.raises(FileExistsError, match=rf"{tmp_path}\S* is there already \({kind}\): go"):
            require_free(tmp_path / name, "go")
        with pytest.raises(FileExistsError, match="--overwrite"):
            require_target(tmp_path / name, overwrite=False)
    require_target(tmp_path / "file", overwrite=True)
    with pytest.raises(FileExistsError, match="replaces files alone"):
        require_target(tmp_path / "pipe", overwrite=True)


@pytest.mark.timeout(10)
def test_a_durable_write_goes_into_no_pipe_and_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("kept")
    os.mkfifo(tmp_path / ".a.tmp")
    (tmp_path / ".b.tmp").symlink_to("other")
    for name in "ab":
        write_durably(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert (tmp_path / "other").read_text() == "kept"


def test_a_small_file_is_read_within_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(OSError, match="it holds 5 bytes, and what belongs there at most 4"):
        read_regular(path, 4)
    with pytest.raises(OSError, match="a folder, not a regular file"):
        read_regular(tmp_path)
    with pytest.raises(OSError, match="a device, not a regular file"):
        read_regular("/dev/zero")
