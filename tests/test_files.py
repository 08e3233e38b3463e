"""Files that are written whole or not at all."""

import pytest

from tripletjax.learn.files import part_of, replaced


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
