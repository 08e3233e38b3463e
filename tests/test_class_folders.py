"""Which class a file is of, by the folders that it lies in or by its name."""

import pytest
from test_folder_listing import make_tree

from tripletjax.learn.class_folders import find_classes, without_number


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("ann", "ann"),
        ("ann_0001", "ann"),
        ("ann (2)", "ann"),
        ("ann-2", "ann"),
        ("ann.2", "ann"),
        ("ann2", "ann2"),
        ("ann_b2", "ann_b2"),
        ("0001", "0001"),
        ("_1", "_1"),
    ],
)
def test_names_without_numbers(name, short):
    assert without_number(name) == short


def test_names_of_files_are_classes_where_all_images_lie_in_one_folder(tmp_path):
    folder = make_tree(tmp_path / "known", "ann_1.png", "ann_2.png", "bob.png")
    (folder / "list.txt").write_text("no image")
    (folder / "papers").mkdir()
    (folder / "papers" / "a.txt").write_text("no image")
    with pytest.raises(ValueError, match="one folder per class, but 3 images lie in"):
        find_classes(folder)
    found = find_classes(folder, name_of_file=without_number)
    assert found.paths == ["ann_1.png", "ann_2.png", "bob.png"]
    assert found.classes == ["ann", "ann", "bob"]
    assert [file.name for file in found.loose] == ["list.txt", "a.txt"]
    assert find_classes(folder, name_of_file=str).classes == ["ann_1", "ann_2", "bob"]
    # Beside folders of classes, such images are still an error.
    make_tree(folder, "eve/1.png")
    with pytest.raises(ValueError, match="one folder per class, but 3 images lie in"):
        find_classes(folder, name_of_file=str)
