"""Which files of a folder are listed, and which entries are left out with a reason."""

import os
import socket
from pathlib import Path

import pytest

from tripletjax.learn import files
from tripletjax.learn.data import folder_listing, image_files
from tripletjax.learn.data.class_folders import find_classes
from tripletjax.learn.data.folder_listing import find_files

# The first bytes of a PNG image, which decide that a file is one.
PNG = (
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\1\0\0\0\1\1\0\0\0\0\x37\x6e\xf9\x24"
    b"\0\0\0\nIDATx\x01\x63\x68\0\0\0\x82\0\x81\x77\xcd\x72\xb6\0\0\0\0IEND\xaeB`\x82"
)


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "tree", "ant/1.png", "bee/1.png", "cow/1.png")


def make_tree(folder, *paths):
    for path in paths:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PNG)
    return folder


def paths_of(listing, folder):
    return [file.relative_to(folder).as_posix() for file in listing.files]


def reasons_of(listing):
    return {path.as_posix(): reason for path, reason in listing.skipped}


ALL = ["ant/1.png", "bee/1.png", "cow/1.png"]


@pytest.mark.parametrize(
    ("link", "target", "reason"),
    [
        ("ant/see-also", "../cow", "a link to cow"),
        ("aaa", "bee", "a link to bee"),
        ("ant/0.png", "../cow/1.png", "a link to cow/1.png"),
        ("ant/up", "..", "a link to the folder itself"),
        ("ant/above", "../..", "a link to a folder that holds this one"),
        ("ant/gone.png", "nowhere.png", "a broken link to nowhere.png"),
        ("ant/round", "round", "a broken link to round"),
    ],
)
def test_links_add_nothing_that_is_listed_already(tree, link, target, reason):
    (tree / link).symlink_to(target)
    listing = find_files(tree)
    assert paths_of(listing, tree) == ALL
    assert reasons_of(listing) == {link: reason}
    found = find_classes(tree)
    assert found.classes == ["ant", "bee", "cow"]
    assert found.skipped == (f"{link}: {reason}",)


def test_links_out_of_the_folder_are_followed_once(tree, tmp_path):
    far = make_tree(tmp_path / "far", "dog/1.png", "dog/old/2.png", "elk/1.png")
    (far / "elk" / "back").symlink_to(tree)
    (tree / "dog").symlink_to(far / "dog")
    (tree / "elk").symlink_to(far / "elk")
    (tree / "old").symlink_to(far / "dog" / "old")
    (tree / "one").mkdir()
    (tree / "one" / "9.png").symlink_to(far / "elk" / "1.png")
    listing = find_files(tree)
    assert paths_of(listing, tree) == [*ALL, "dog/1.png", "dog/old/2.png", "elk/1.png"]
    assert reasons_of(listing) == {
        "elk/back": "a link to the folder itself",
        "old": "a link to dog/old",
        "one/9.png": "a link to elk/1.png",
    }


def test_links_into_hidden_folders_are_followed(tree):
    make_tree(tree, ".store/7.png", ".store/dog/1.png")
    (tree / "ant" / "7.png").symlink_to("../.store/7.png")
    (tree / "dog").symlink_to(".store/dog")
    assert paths_of(find_files(tree), tree) == [
        "ant/1.png",
        "ant/7.png",
        *ALL[1:],
        "dog/1.png",
    ]


def test_a_folder_may_be_given_by_a_link(tree, tmp_path):
    (tmp_path / "alias").symlink_to(tree)
    (tree / "bee" / "loop").symlink_to(tmp_path / "alias")
    listing = find_files(tmp_path / "alias")
    assert paths_of(listing, tmp_path / "alias") == ALL
    assert reasons_of(listing) == {"bee/loop": "a link to the folder itself"}


@pytest.mark.parametrize("special", ["pipe", "socket", "device"])
def test_only_regular_files_are_opened(tree, special, monkeypatch):
    odd, reason = tree / "ant" / "odd.png", f"a {special}, not a file"
    if special == "pipe":
        os.mkfifo(odd)
        reason = "a named pipe, not a file"
    elif special == "device":
        odd.symlink_to("/dev/zero")
    else:
        monkeypatch.chdir(odd.parent)
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind(odd.name)
    listing = find_files(tree)
    assert paths_of(listing, tree) == ALL
    assert reasons_of(listing) == {"ant/odd.png": reason}
    # Files that are named one by one, as in a file of triplets.
    for function in (image_files.open_image, files.digest_of_file):
        with pytest.raises(OSError, match="it is not a regular file"):
            function(odd)
    assert not image_files.is_image(odd)


@pytest.fixture
def closed(monkeypatch):
    """Closes folders of a name, also to those who may read everything."""
    scandir, names = os.scandir, set()

    def closed_scandir(path="."):
        if Path(path).name in names:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(folder_listing.os, "scandir", closed_scandir)
    return names


def test_unreadable_folders_are_skipped_and_named(tree, closed):
    make_tree(tree, "lost+found/1.png", "ant/deep/2.png")
    closed |= {"lost+found", "deep"}
    listing = find_files(tree)
    assert paths_of(listing, tree) == ALL
    assert reasons_of(listing) == {
        "ant/deep": "it cannot be read (Permission denied)",
        "lost+found": "it cannot be read (Permission denied)",
    }
    assert listing.may_hold(Path("ant/deep/2.png"))
    assert not listing.may_hold(Path("ant/deeper/2.png"))
    closed.add("tree")
    with pytest.raises(PermissionError):
        find_files(tree)


def test_hidden_folders_with_images_are_named(tree):
    make_tree(tree, ".22/1.png", ".38/deep/1.JPG", "ant/@eaDir/1.png", ".git/config")
    (tree / ".hidden.png").write_bytes(PNG)
    listing = find_files(tree)
    assert paths_of(listing, tree) == ALL
    assert reasons_of(listing) == {}
    (note,) = listing.notes
    assert "their names are hidden or a system's: .22, .38, ant/@eaDir;" in note
    assert find_classes(tree).left_out == (note,)
    make_tree(tree, *(f".{number}/1.png" for number in range(4)))
    (note,) = find_files(tree).notes
    assert ": .0, .1, .2, .22, .3 and 2 more;" in note
