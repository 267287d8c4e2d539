"""Writing files: what is refused, and that a file takes its place whole, as what it was, or not at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from padfree.errors import FileError
from padfree.files.writing import all_or_none, as_path, check_target, replacing


@pytest.mark.parametrize("path", [None, 5, b"name", "", "a\0b", ["a"]])
def test_what_is_no_path_is_refused(path: object) -> None:
    with pytest.raises(FileError, match="is not the path of a file"):
        as_path(path)
    with pytest.raises(FileError, match="is not the path of a file"):
        check_target(path)  # type: ignore[arg-type]


def test_only_plain_files_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    os.mkfifo("pipe")
    (tmp_path / "folder").mkdir()
    os.symlink("pipe", "link")
    os.symlink("none/file", "dangling")
    with socket.socket(socket.AF_UNIX) as served:
        served.bind("socket")
    before = sorted(os.listdir())
    for name in ("pipe", "link", "socket"):  # and no device: if this test fails, the machine would lose it
        with pytest.raises(FileError, match=f"cannot write {name}: it is a device, a pipe or a socket"):
            check_target(name)
        with pytest.raises(FileError, match="not a plain file"), replacing(Path(name)):
            pass
    with pytest.raises(FileError, match="it is a folder"):
        check_target("folder")
    with pytest.raises(FileError, match=r"there is no folder .*none"):
        check_target("dangling")
    assert sorted(os.listdir()) == before
    assert (tmp_path / "pipe").is_fifo()


def test_of_a_link_the_target_is_replaced_and_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    real, link = tmp_path / "there" / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(Path("there") / "real")
    with replacing(link) as temporary:
        temporary.unlink()
        temporary.write_text("new")  # as safetensors does
        temporary.chmod(0o600)
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert real.stat().st_mode & 0o777 == 0o640
    assert os.listdir(real.parent) == ["real"]


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    with replacing(tmp_path / "new") as temporary:
        temporary.chmod(0o600)
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_files_take_their_places_together(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("old")

    def write(fails: bool) -> None:
        with all_or_none():
            for path in (first, second):
                with replacing(path) as temporary:
                    temporary.write_text("new")
                assert not second.exists()
            assert first.read_text() == "old"
            if fails:
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(fails=True)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("first", "old")]
    write(fails=False)
    assert sorted((path.name, path.read_text()) for path in tmp_path.iterdir()) == [("first", "new"), ("second", "new")]
    with replacing(second) as temporary:
        temporary.write_text("alone")
    assert second.read_text() == "alone"
