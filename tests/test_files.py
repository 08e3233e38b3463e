"""Files that are written whole or not at all."""

import errno

import pytest

from tripletjax.learn.files import (
    filled,
    part_of,
    part_within,
    replaced,
    replaced_together,
)
from tripletjax.learn.reports import check_empty


def test_a_replaced_file_has_its_old_content_until_the_end(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")
    part_of(file).write_text("a part of a killed process")
    with replaced(file) as part:
        assert not part.exists()
        part.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file_and_no_part(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("old")

    def interrupted():
        with replaced(file) as part:
            part.write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_new_directory_appears_whole(tmp_path):
    folder = tmp_path / "folder"
    with replaced(folder) as part:
        (part / "below").mkdir(parents=True)
        (part / "below" / "a.txt").write_text("new")
        assert not folder.exists()
    assert (folder / "below" / "a.txt").read_text() == "new"
    assert not part.exists()


def test_several_files_appear_together(tmp_path):
    first, second = tmp_path / "more" / "a.txt", tmp_path / "b"
    with replaced_together() as part:
        part(first).write_text("new")
        part(second).mkdir()
        (part(second) / "c.txt").write_text("new")
        assert not first.exists()
        assert not second.exists()
    assert first.read_text() == (second / "c.txt").read_text() == "new"
    assert {path.name for path in tmp_path.rglob("*.part")} == set()


def test_an_error_leaves_none_of_several_files(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    second.write_text("old")

    def full():
        with replaced_together() as part:
            part(first).write_text("new")
            part(second).write_text("new")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught:
        full()
    assert caught.value.filename == str(second)
    assert [path.name for path in tmp_path.iterdir()] == ["b.txt"]
    assert second.read_text() == "old"


def test_errors_name_the_file_instead_of_its_part(tmp_path):
    file = tmp_path / "a.txt"

    def fail():
        with replaced(file) as part:
            part.open()

    with pytest.raises(FileNotFoundError) as caught:
        fail()
    assert caught.value.filename == str(file)


def test_an_existing_directory_is_filled_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "folder"

    def fill(error: BaseException | None):
        with filled(folder) as part:
            (part / "a.txt").write_text("new")
            if error is not None:
                raise error

    with pytest.raises(KeyboardInterrupt):
        fill(KeyboardInterrupt())
    assert not folder.exists()
    part_within(folder).mkdir(parents=True)
    check_empty(folder)
    with pytest.raises(KeyboardInterrupt):
        fill(KeyboardInterrupt())
    assert [*folder.iterdir()] == []
    place = folder.stat().st_ino
    fill(None)
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    assert folder.stat().st_ino == place
    with pytest.raises(FileExistsError):
        check_empty(folder)
