"""Which class a file is of, by the folders that it lies in or by its name."""

import pytest
from PIL import Image
from test_folder_listing import make_tree

from tripletjax.learn.data.class_folders import find_classes, without_number


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


PEOPLE = [f"{name}/2019-01-0{day}/1.png" for name in ("ann", "bob") for day in (1, 2)]


@pytest.mark.parametrize(
    ("paths", "classes", "outer"),
    [
        (PEOPLE, {"ann", "bob"}, None),
        ([f"photos/{path}" for path in PEOPLE], {"ann", "bob"}, "photos"),
        ([f"a/photos/{path}" for path in PEOPLE], {"ann", "bob"}, "a/photos"),
        (["lfw/ann/1.png", "lfw/bob/1.png"], {"ann", "bob"}, "lfw"),
        # A class is no folder around classes.
        (["ann/1.png", "ann/2.png"], {"ann"}, None),
        (["ann/2019/1.png", "ann/2020/1.png"], {"ann"}, None),
        (["ann/1.png", "ann/old/2.png"], {"ann"}, None),
        (["photos/ann/2019/1.png", "photos/ann/2020/1.png"], {"ann"}, "photos"),
        (["a/Greek/x/1.png", "a/Latin/x/1.png"], {"Greek/x", "Latin/x"}, "a"),
    ],
)
def test_a_single_outer_folder_is_stepped_over(paths, classes, outer, tmp_path):
    folder = make_tree(tmp_path / "data", *paths)
    for note in ("README.txt", f"{outer or '.'}/list.txt"):
        (folder / note).write_text("no image")
    found = find_classes(folder)
    assert {*found.classes} == classes
    assert {*found.paths} == {*paths}
    assert found.root == folder / (outer or ".")
    assert {file.name for file in found.loose} == {"README.txt", "list.txt"}
    stepped = f"{outer} is the only folder: classes are those within it"
    assert (stepped in found.notes) == (outer is not None)


def test_only_images_make_a_folder_a_class(tmp_path):
    folder = make_tree(tmp_path / "data", "Greek/x/1.png", "Latin/x/1.png")
    (folder / "Greek" / "README.txt").write_text("no image")
    found = find_classes(folder)
    assert {"Greek/x", "Latin/x"} < {*found.classes}
    assert "classes from leaf" in found.notes[0]


def test_names_with_backslashes_are_explained(tmp_path):
    folder = make_tree(tmp_path / "data", "photos\\ann\\1.png", "photos\\bob\\1.png")
    for name_of_file in (None, str):
        with pytest.raises(
            ValueError, match=r"backslashes, such as photos\\ann.*Windows"
        ):
            find_classes(folder, name_of_file=name_of_file)


def test_an_error_names_hidden_folders(tmp_path):
    (tmp_path / ".kind").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / ".kind" / "0.png")
    with pytest.raises(ValueError, match=r"has no images in folders; .*hidden.*\.kind"):
        find_classes(tmp_path)
