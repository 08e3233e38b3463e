"""Search in a folder of images, kept up to date."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import filelock
import numpy as np
import pytest
from folders import assert_drawn, shapes
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tripletjax as tj
from tripletjax.apps import search
from tripletjax.apps.embedders import embedder_of, vectors_of
from tripletjax.apps.images import decode_path as of_text
from tripletjax.apps.images import encode_path as as_text
from tripletjax.apps.search import duplicates, rejections, reranking
from tripletjax.apps.search import report as search_report
from tripletjax.apps.search import table as search_table
from tripletjax.apps.search import update as update_module
from tripletjax.learn.data import folder_listing
from tripletjax.learn.files import write_json


class Thumbnails:
    """Tiny pixels as vectors of integers, so that ties are frequent; counts images."""

    def __init__(self, side=3, levels=4):
        self.side, self.levels, self.seen = side, levels, 0

    def __call__(self, images):
        self.seen += len(images)
        size = (self.side, self.side)
        x = np.stack([np.asarray(i.convert("L").resize(size)) for i in images])
        return (x // (256 // self.levels)).reshape(len(images), -1)


def opened(folder, database, function=None, key="thumbnails"):
    function = function or Thumbnails()
    index = search.Index(folder, database, embedder_of(function, key=key))
    return index, function


@pytest.fixture
def folder(tmp_path):
    return shapes(tmp_path / "pictures", kinds=4, each=6)


def paths_in(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*"))


def content(file, value, size=(24, 20)):
    """A picture with something in it, that is another for every value."""
    pixels = np.random.default_rng(value).integers(0, 256, (*size[::-1], 3))
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.uint8(pixels)).save(file)


def folder_of_copies(folder, names):
    """One picture under several names."""
    for name in names:
        content(folder / f"{name}.png", 0)
    return folder


def test_hits_are_the_nearest_neighbors_with_ties_by_path(folder, tmp_path):
    index, _ = opened(folder, tmp_path / "db")
    assert index.update().added == len(index) == 24
    paths, x = index.vectors()
    assert paths == paths_in(folder)
    for k in (1, 5, 24, 30):
        distances, places = tj.retrieval.nearest_neighbors(x, x, min(k, 24))
        for hits, near, d in zip(index.search(x, k), places, distances):
            assert [hit.path for hit in hits] == [paths[i] for i in near]
            np.testing.assert_allclose([hit.distance for hit in hits], d, atol=1e-6)
    assert {hit.path for hit in index.search(x[:1], 24)[0]} == {*paths}


def test_all_ties_are_looked_at_before_the_first_by_path_is_taken(tmp_path):
    folder = tmp_path / "pictures"
    index, _ = opened(folder_of_copies(folder, "bcdefgh"), tmp_path / "db")
    index.update()
    # It comes last in the table.
    folder_of_copies(folder, "a")
    index.update()
    _, x = index.vectors()
    (hits,) = index.search(x[:1], 2)
    assert [hit.path for hit in hits] == ["a.png", "b.png"]


def test_what_is_searched_for_is_narrowed_down(folder, tmp_path):
    index, _ = opened(folder, tmp_path / "db")
    index.update()
    paths, x = index.vectors()
    label = "group1/kind3"
    (hits,) = index.search(x[:1], 50, classes=[label])
    assert sorted(hit.path for hit in hits) == [p for p in paths if label in p]
    assert {hit.label for hit in hits} == {label}
    (all_of_them,) = index.search(x[:1], 50)
    within = all_of_them[7].distance
    (hits,) = index.search(x[:1], 50, within=within)
    assert hits == [hit for hit in all_of_them if hit.distance <= within]
    (hits,) = index.search(x[:1], 3, leave_out=[paths[:2]])
    assert hits == [h for h in all_of_them if h.path not in paths[:2]][:3]
    assert index.search(x[:0]) == []


def test_an_index_follows_its_folder(folder, tmp_path):
    index, function = opened(folder, tmp_path / "db")
    index.update()
    again = index.update()
    assert (again.images, again.added, again.changed, again.moved) == (24, 0, 0, 0)
    assert function.seen == 24
    content(folder / "group0" / "new.png", 1)
    content(folder / "group0" / "kind0" / "0.png", 2)
    (folder / "group1" / "kind1" / "0.png").rename(folder / "group1" / "moved.png")
    (folder / "group1" / "kind1" / "3.png").unlink()
    (folder / "group1" / "kind1" / "broken.png").write_bytes(b"\x89PNG\r\n")
    (folder / "group1" / "kind1" / "empty.png").write_bytes(b"")
    told = index.update()
    assert (told.added, told.changed, told.moved, told.removed) == (1, 1, 1, 2)
    assert function.seen == 26
    assert [line.split(":")[0] for line in told.skipped] == [
        "group1/kind1/broken.png",
        "group1/kind1/empty.png",
    ]
    assert not any("0x" in line for line in told.skipped)
    # What was good and is broken is no longer found.
    content(folder / "group1" / "kind1" / "empty.png", 3)
    (folder / "group0" / "new.png").write_bytes(b"")
    told = index.update()
    assert told.images == len(index) == 24
    paths, x = index.vectors()
    skipped = {"group0/new.png", "group1/kind1/broken.png"}
    assert paths == [p for p in paths_in(folder) if p not in skipped]
    fresh, _ = opened(folder, tmp_path / "other")
    fresh.update()
    np.testing.assert_array_equal(fresh.vectors()[1], x)


def test_contents_that_change_places(tmp_path, monkeypatch):
    # Committed one by one: what the first file held is gone when the second needs it.
    one_by_one = functools.partial(update_module.read_ahead, size=1)
    monkeypatch.setattr(update_module, "read_ahead", one_by_one)
    folder = tmp_path / "pictures"
    for number in range(9):
        content(folder / f"{number}.png", number, size=(3, 3))
    index, function = opened(folder, tmp_path / "db")
    index.update()
    first, second, last = (folder / f"{number}.png" for number in (0, 1, 8))
    was = first.read_bytes()
    first.write_bytes(last.read_bytes())
    second.write_bytes(was)
    content(last, 1000, size=(3, 3))
    told = index.update()
    assert (told.images, told.skipped, function.seen) == (9, (), 11)
    fresh, _ = opened(folder, tmp_path / "other")
    fresh.update()
    assert fresh.vectors()[0] == index.vectors()[0]
    np.testing.assert_array_equal(fresh.vectors()[1], index.vectors()[1])


def test_a_folder_that_is_renamed_is_not_embedded_again(folder, tmp_path):
    index, function = opened(folder, tmp_path / "db")
    index.update()
    folder = folder.rename(tmp_path / "renamed")
    index, _ = opened(folder, tmp_path / "db", function)
    told = index.update()
    assert (told.added, told.moved, function.seen) == (0, 24, 24)
    assert "pictures does not exist" in told.notes[0]
    assert "its index is kept (--remove-missing removes it)" in told.notes[0]
    assert "its index is removed" in index.update(remove_missing=True).notes[0]
    assert index.update().notes == ()
    assert index.vectors()[0] == paths_in(folder)
    # One that is there keeps its own.
    copy = shutil.copytree(folder, tmp_path / "copy")
    other, _ = opened(copy, tmp_path / "db", function)
    other.update()
    index, _ = opened(folder, tmp_path / "db", function)
    assert len(index) == len(other) == 24


def test_an_index_of_another_embedder_is_refused(folder, tmp_path):
    index, _ = opened(folder, tmp_path / "db")
    index.update()
    with pytest.raises(ValueError, match=r"another embedder.*Remove .*\.lance"):
        opened(folder, tmp_path / "db", key="other")
    # Of other folders it is left alone.
    other = shapes(tmp_path / "others", kinds=2, each=2)
    index, function = opened(other, tmp_path / "db", Thumbnails(side=2), key="other")
    index.update()
    assert function.seen == 4


def test_an_approximate_search_finds_nearly_the_same(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(400):
        content(folder / f"{number}.png", number, size=(4, 4))
    index, _ = opened(folder, tmp_path / "db", Thumbnails(levels=256))
    index.build_approximate()
    index.update()
    assert not index.has_approximate
    index.build_approximate()
    assert index.has_approximate
    _, x = index.vectors()
    exact = index.search(x, 5)
    near = index.search(x, 5, approximate=True)
    shared = [len({*a} & {*b}) / 5 for a, b in zip(exact, near)]
    assert 0.2 <= np.mean(shared) <= 1
    # What comes later is found, too.
    content(folder / "later.png", 1000, size=(4, 4))
    index.update()
    (vector,) = vectors_of(index.embedder, [Image.open(folder / "later.png")])
    (hits,) = index.search(vector[None], 1, approximate=True)
    assert hits[0].path == "later.png"
    assert index.search(x, 5) == index.search(x, 5, approximate=False)


def test_reranked_hits_keep_the_limits_of_a_search(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reranking, "CANDIDATES", 24)
    index, _ = opened(folder, tmp_path / "db", Thumbnails(levels=256))
    assert reranking.search_reranked(index, np.ones((1, 9))) == [[]]
    index.update()
    paths, x = index.vectors()
    rest = [path for path in paths if path.startswith("group1/") and path != paths[12]]
    limits = {"classes": ["group1"], "leave_out": [[paths[12]], [paths[12]]]}
    queries = x[[0, 12]] / 100
    reranked = reranking.search_reranked(index, queries, 24, **limits)
    for query, hits in zip(queries, reranked):
        assert {one.hit.path for one in hits} == {*rest}
        expected, order = tj.retrieval.k_reciprocal_distances(
            query[None], x[[paths.index(path) for path in rest]], k=len(rest)
        )
        assert [one.hit.path for one in hits] == [rest[row] for row in order[0]]
        np.testing.assert_allclose([one.distance for one in hits], expected[0], 1e-4)
    within = float(np.median([one.hit.distance for one in reranked[0]]))
    near, _ = reranking.search_reranked(index, queries, 3, within=within, **limits)
    assert near == [one for one in reranked[0] if one.hit.distance <= within][:3]
    with pytest.raises(ValueError, match="k must be at least 1"):
        reranking.search_reranked(index, queries, 0)


def test_near_duplicates_are_linked(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(9):
        content(folder / f"{number}.png", number)
    for number, copies in ((0, 3), (5, 1)):
        for copy in range(copies):
            shutil.copy(folder / f"{number}.png", folder / f"{number}-{copy}.png")
    index, _ = opened(folder, tmp_path / "db", Thumbnails(side=8, levels=256))
    assert index.duplicates(0.0) == []
    index.update()
    assert index.duplicates(0.0) == [
        ["0-0.png", "0-1.png", "0-2.png", "0.png"],
        ["5-0.png", "5.png"],
    ]
    paths, x = index.vectors()
    d = np.linalg.norm(x[:, None] - x[None], axis=-1)
    within = float(np.sort(d[d > 0])[4])
    linked = {path: {path} for path in paths}
    for i, j in zip(*np.nonzero(d <= within)):
        both = linked[paths[i]] | linked[paths[j]]
        linked |= dict.fromkeys(both, both)
    expected = {tuple(sorted(group)) for group in linked.values() if len(group) > 1}
    assert {*map(tuple, index.duplicates(within))} == expected


def test_equal_vectors_are_at_no_distance(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(40):
        content(folder / f"{number}.png", number // 2)

    def unit(images):
        x = Thumbnails(side=8, levels=256)(images) + np.pi
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    index, _ = opened(folder, tmp_path / "db", unit)
    index.update()
    assert len(index.duplicates(0.0)) == 20


def test_near_duplicates_are_no_duplicates(tmp_path):
    folder = tmp_path / "pictures"
    for number in range(4):
        content(folder / f"{number}.png", number)

    def nearly(images):
        x = np.ones((len(images), 4)) / 2
        x[:, 0] += 4e-6 * np.arange(len(images))
        return x

    index, _ = opened(folder, tmp_path / "db", nearly)
    index.update()
    assert index.duplicates(3e-6) == []
    assert len(index.duplicates(5e-6)[0]) == 4


@given(st.binary(min_size=1, max_size=12).filter(lambda b: b"\0" not in b))
def test_any_path_can_be_written_down(name):
    name = name.replace(b"/", b"_")
    path = Path(os.fsdecode(b"a/" + name))
    text = as_text(path)
    assert text.encode().decode() == text
    assert of_text(text) == path


def test_odd_names(tmp_path):
    folder = tmp_path / "it's a folder"
    names = ["a 'quoted' name.png", "back\\slash.png", "\u732b.png", "\\x41.png"]
    names.append(os.fsdecode(b"not-utf-8-\xff.png"))
    for number, name in enumerate(names):
        content(folder / "so so" / name, number)
    (folder / "link").symlink_to(folder)
    index, _ = opened(folder, tmp_path / "db")
    assert index.update().images == 5
    paths, x = index.vectors()
    for path in paths:
        assert index.file_of(path).exists()
        assert index.path_of(index.file_of(path)) == path
    (folder / "so so" / names[-1]).unlink()
    (folder / "so so" / names[0]).unlink()
    assert index.update().removed == 2
    assert len(index) == 3
    (hits,) = index.search(x[:1], classes=["so so"])
    assert len(hits) == 3
    assert index.path_of(tmp_path / "elsewhere.png") is None


def test_two_at_once_wait_for_one_another(folder, tmp_path):
    index, _ = opened(folder, tmp_path / "db")
    told = []
    with filelock.FileLock(tmp_path / "db" / "lock"):
        thread = threading.Thread(
            target=index.update, kwargs={"waiting": lambda: told.append("waits")}
        )
        thread.start()
        while not told:
            time.sleep(0.01)
        assert len(index) == 0
    thread.join()
    assert len(index) == 24


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 0}, "k must be at least 1"),
        (
            {"classes": ["group0/kind0", "kind0"]},
            "classes must be folders of the index, got 'kind0'",
        ),
        ({"within": -1.0}, "within must be at least 0"),
        ({"vectors": np.zeros((1, 2))}, "must have 9 dimensions, got 2"),
        ({"vectors": np.zeros(9)}, r"must be \[q, d\]"),
        ({"vectors": np.full((1, 9), np.nan)}, "must be finite"),
    ],
)
def test_bad_searches_are_named(folder, tmp_path, change, words):
    index, _ = opened(folder, tmp_path / "db")
    index.update()
    with pytest.raises(ValueError, match=words):
        index.search(**{"vectors": np.zeros((1, 9))} | change)


def test_bad_embedders_are_named(folder, tmp_path):
    with pytest.raises(ValueError, match="key must name the function"):
        embedder_of(Thumbnails())
    index, _ = opened(folder, tmp_path / "db", lambda images: np.zeros(3))
    with pytest.raises(ValueError, match=r"must return vectors \[24, d\]"):
        index.update()
    nan = opened(folder, tmp_path / "db", lambda images: [[np.nan]] * len(images))
    with pytest.raises(ValueError, match="finite vectors, got NaN"):
        nan[0].update()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        opened(tmp_path / "nowhere", tmp_path / "db")


def test_what_is_found_is_told_and_drawn(folder, tmp_path):
    index, _ = opened(folder, tmp_path / "db")
    index.update()
    inside, outside = folder / "group0" / "kind0" / "0.png", tmp_path / "b.png"
    content(outside, 7)
    found = search_report.search_files(index, [inside, outside], k=4)
    assert found[0]["class"] == "group0/kind0"
    assert "group0/kind0/0.png" not in [hit["path"] for hit in found[0]["hits"]]
    for hit in found[0]["hits"]:
        assert hit["right"] == (hit["class"] == "group0/kind0")
    assert found[1]["class"] is None
    lines = [*search_report.ranked_lines(found)]
    assert lines[1] == str(inside)
    assert lines[2].split()[0] == "1"
    together = search_report.search_files(index, [inside, outside], k=4, together=True)
    x = vectors_of(index.embedder, [Image.open(inside), Image.open(outside)])
    mean = x.mean(axis=0, keepdims=True)
    mean /= np.linalg.norm(mean)
    own = [["group0/kind0/0.png"]]
    assert [hit["path"] for hit in together[0]["hits"]] == [
        hit.path for hit in index.search(mean, 4, leave_out=own)[0]
    ]
    search_report.draw_hits(index, found, tmp_path / "more" / "hits.png")
    assert_drawn(tmp_path / "more" / "hits.png")
    search_report.write_groups([["a, b.png", "c.png"]], tmp_path / "groups.csv")
    assert (tmp_path / "groups.csv").read_text().splitlines() == [
        "group,path",
        '1,"a, b.png"',
        "1,c.png",
    ]
    # Where all lie in one folder, nobody knows what is right.
    flat = tmp_path / "flat"
    for number in range(3):
        content(flat / os.fsdecode(b"\xff%d.png" % number), number)
    loose, _ = opened(flat, tmp_path / "db")
    loose.update()
    query = flat / os.fsdecode(b"\xff0.png")
    (told,) = search_report.search_files(loose, [query], k=2)
    assert told["query"][0].endswith(r"\xff0.png")
    assert told["class"] is None
    assert [hit["right"] for hit in told["hits"]] == [None, None]
    search_report.draw_hits(loose, [told], tmp_path / "flat.png")
    write_json(tmp_path / "flat.json", told)
    assert json.loads((tmp_path / "flat.json").read_text()) == told
    with pytest.raises(OSError, match=r"groups\.csv cannot be read"):
        search_report.search_files(index, [tmp_path / "groups.csv"], k=1)


UPDATE = """
import sys, time
import numpy as np
from tripletjax.apps import search
from tripletjax.apps.embedders import embedder_of

def slowly(images):
    time.sleep(0.02)
    return np.stack([np.asarray(i.resize((3, 3))).ravel() for i in images])

embedder = embedder_of(slowly, key="slowly")
print("begins", flush=True)
print(search.Index(sys.argv[1], sys.argv[2], embedder).update().images)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "kills"), [(0, 3), pytest.param(1, 7, marks=pytest.mark.full)]
)
def test_killed_at_any_moment_the_next_update_completes_it(tmp_path, seed, kills):
    folder, draw = tmp_path / "pictures", random.Random(seed)
    for number in range(3000):
        content(folder / f"{number % 7}" / f"{number}.png", number, size=(4, 4))
    command = [sys.executable, "-c", UPDATE, str(folder), str(tmp_path / "db")]
    for kill in range(kills):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begins\n"
        time.sleep(draw.random() * 1.2)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        # Meanwhile the folder changes.
        content(folder / "0" / f"{7 * kill}.png", 10_000 + kill, size=(4, 4))
        (folder / "1" / f"{7 * kill + 1}.png").rename(folder / f"{kill}.png")
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "begins\n3000\n"
    embedder = embedder_of(
        lambda images: np.stack([np.asarray(i.resize((3, 3))).ravel() for i in images]),
        key="slowly",
    )
    paths, x = search.Index(folder, tmp_path / "db", embedder).vectors()
    assert paths == paths_in(folder)
    images = [Image.open(folder / path) for path in paths]
    np.testing.assert_array_equal(x, vectors_of(embedder, images))


def test_images_of_an_unreadable_folder_stay_in_the_index(
    folder, tmp_path, monkeypatch
):
    index, function = opened(folder, tmp_path / "db")
    index.update()
    (folder / "group0" / "kind0" / "0.png").unlink()
    scandir = os.scandir

    def closed_scandir(path="."):
        if Path(path).name == "kind1":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(folder_listing.os, "scandir", closed_scandir)
        changes = index.update()
    assert (changes.images, changes.removed) == (23, 1)
    assert changes.skipped == ("group1/kind1: it cannot be read (Permission denied)",)
    assert index.update().added == 0
    assert function.seen == 24


def test_links_change_no_path_of_the_index(folder, tmp_path):
    (folder / "group0" / "see-also").symlink_to("../group1/kind1")
    index, _ = opened(folder, tmp_path / "db")
    changes = index.update()
    assert changes.skipped == ("group0/see-also: a link to group1/kind1",)
    assert index.vectors()[0] == [p for p in paths_in(folder) if "see-also" not in p]
    # A query through a link is the image that is in the index.
    query = folder / "group0" / "see-also" / "0.png"
    assert index.path_of(query) == "group1/kind1/0.png"
    assert index.path_of(folder / "group0" / "nothing.png") == "group0/nothing.png"


def test_rejected_files_are_read_once(folder, tmp_path, monkeypatch):
    place = folder / "group0" / "kind0"
    whole = (place / "0.png").read_bytes()
    (place / "half.png").write_bytes(whole[: len(whole) // 2])
    (place / "notes.txt").write_text("no image")
    Image.new("L", (9, 9)).save(place / "blank.png")
    with (place / "clip.mp4").open("wb") as clip:
        clip.write(b"\0\0\0\x20ftypisom")
        clip.truncate(2**31)
    index, _ = opened(folder, tmp_path / "db")
    first = index.update()
    assert {line.split(":")[0] for line in first.skipped} == {
        f"group0/kind0/{name}" for name in ("half.png", "notes.txt", "clip.mp4")
    }
    read, read_image_file = [], update_module.read_image_file

    def counted(file):
        read.append(file.name)
        return read_image_file(file)

    monkeypatch.setattr(update_module, "read_image_file", counted)
    again = index.update()
    assert sorted(again.skipped) == sorted(first.skipped)
    assert read == []
    # What changes is read again, and what is gone is forgotten.
    (place / "half.png").write_bytes(whole[:60])
    (place / "clip.mp4").unlink()
    (place / "notes.txt").write_bytes(whole)
    last = index.update()
    assert read == ["half.png", "notes.txt"]
    assert (last.images, last.added + last.moved) == (26, 1)
    assert [line.split(":")[0] for line in last.skipped] == ["group0/kind0/half.png"]
    # An image that is known and becomes none is no longer found.
    (place / "notes.txt").write_text("no image")
    for _ in range(2):
        assert index.update().images == 25
    # Without its file, or with another decoder, everything is read again.
    (kept,) = (tmp_path / "db").glob("*.rejected.json")
    for damage in (b"{", b"[]", b'{"reader": 1}', b"\xff"):
        kept.write_bytes(damage)
        read.clear()
        index.update()
        assert sorted(read) == ["half.png", "notes.txt"]
    monkeypatch.setattr(rejections, "formats", lambda: ("PNG", "HEIF"))
    read.clear()
    index.update()
    assert sorted(read) == ["half.png", "notes.txt"]


def test_classes_are_folders_at_any_depth(tmp_path):
    folder = tmp_path / "letters"
    paths = ["Greek/a/1.png", "Greek/b/1.png", "Greekish/a/1.png", "Gr'k/a/1.png"]
    for number, path in enumerate([*paths, "loose.png"]):
        content(folder / path, number)
    index, _ = opened(folder, tmp_path / "db")
    index.update()
    _, x = index.vectors()
    for classes, expected in (
        (["Greek"], paths[:2]),
        (["Greek/"], paths[:2]),
        (["./Greek//a/"], paths[:1]),
        (["Gr'k/", "Greekish"], paths[2:]),
        (["Greek", "Greek/b"], paths[:2]),
        (["."], [*paths, "loose.png"]),
        ([""], ["loose.png"]),
        ([], []),
    ):
        (hits,) = index.search(x[:1], 9, classes=classes)
        assert sorted(hit.path for hit in hits) == sorted(expected), classes
    with pytest.raises(ValueError, match="got 'Gre/'"):
        index.search(x[:1], classes=["Gre/"])


# Missing files.


def test_an_unmounted_disk_empties_no_index(folder, tmp_path):
    index, function = opened(folder, tmp_path / "db")
    index.update()
    folder.rename(tmp_path / "disk")
    folder.mkdir()
    with pytest.raises(FileNotFoundError, match=r"24 of the 24 .*--remove-missing"):
        index.update()
    folder.rmdir()
    # A copy of it is indexed meanwhile, and the folder comes back.
    copy = shutil.copytree(tmp_path / "disk", tmp_path / "copy")
    other, _ = opened(copy, tmp_path / "db", function)
    assert other.update().moved == 24
    (tmp_path / "disk").rename(folder)
    again = opened(folder, tmp_path / "db", function)[0].update()
    assert (again.images, again.added, again.moved, function.seen) == (24, 0, 0, 24)


def test_more_than_half_of_an_index_is_removed_only_by_request(folder, tmp_path):
    index, function = opened(folder, tmp_path / "db")
    index.update()
    kept = sorted(folder.rglob("*.*"))[12:]
    shutil.rmtree(folder / "group0")
    # Half of them are removed without a question.
    assert index.update().removed == 12
    for file in (*kept[:4], *kept[6:9]):
        file.unlink()
    content(folder / "new.png", 1)
    with pytest.raises(FileNotFoundError, match="7 of the 12 images"):
        index.update()
    # Those that moved are not missing.
    kept[9].rename(folder / "moved.png")
    told = index.update(remove_missing=True)
    assert (told.moved, told.removed, told.images, function.seen) == (1, 8, 6, 25)
    assert index.vectors()[0] == paths_in(folder)


@pytest.mark.parametrize("way", ["empty", "link"])
def test_an_index_keeps_what_lies_below_a_folder_that_is_away(folder, tmp_path, way):
    index, function = opened(folder, tmp_path / "db")
    index.update()
    place, aside = folder / "group0" / "kind0", tmp_path / "aside"
    place.rename(aside)
    words = "is empty"
    if way == "link":
        place.symlink_to(tmp_path / "nowhere")
        words = "is a broken link"
    else:
        place.mkdir()
    told = index.update()
    assert told.notes == (
        f"group0/kind0 {words}: the index keeps 6 images below it (--remove-missing "
        "removes them)",
    )
    assert (told.images, told.removed, len(index)) == (24, 0, 24)
    place.unlink() if way == "link" else place.rmdir()
    aside.rename(place)
    assert index.update().images == function.seen == 24
    # By request they go; a folder that is not there is no folder that is away.
    place.rename(aside)
    place.mkdir()
    assert index.update(remove_missing=True).removed == 6
    place.rmdir()
    aside.rename(place)
    index.update()
    shutil.rmtree(place)
    assert index.update().removed == 6


def test_copies_of_images_in_a_folder_that_is_away(folder, tmp_path, monkeypatch):
    """An unreadable folder keeps them; an emptied one has moved them."""
    first, second = folder / "group0" / "kind0", folder / "group0" / "kind2"
    index, _ = opened(folder, tmp_path / "db")
    index.update()
    list_folder = os.scandir

    def closed(place):
        if place == folder / "group0":
            raise PermissionError(13, "Permission denied")
        return list_folder(place)

    shutil.copy(first / "0.png", folder / "group1" / "copy.png")
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        told = index.update()
        assert told.notes == (
            "group0 cannot be read (Permission denied): the index keeps 12 images "
            "below it (--remove-missing removes them)",
        )
        assert (told.images, told.removed) == (25, 0)
        assert index.update(remove_missing=True).removed == 12
    assert index.update().images == 25
    for file in [*second.iterdir()]:
        file.rename(first / f"moved-{file.name}")
    told = index.update()
    assert (told.images, told.removed, told.notes) == (25, 6, ())


# Damaged and read-only indexes.


def cut(files):
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "manifests cut": lambda table: cut(table.glob("_versions/*.manifest")),
    "no manifests": lambda table: shutil.rmtree(table / "_versions"),
    "data cut": lambda table: cut(table.glob("data/*")),
    "no data": lambda table: shutil.rmtree(table / "data"),
    "empty data": lambda table: [f.write_bytes(b"") for f in table.glob("data/*")],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_one_line_and_stands_in_no_other_folders_way(
    tmp_path, damage
):
    database = tmp_path / "db"
    for name in ("one", "two"):
        content(tmp_path / name / "a.png", 1)
        content(tmp_path / name / f"{name}.png", 2)
    index, function = opened(tmp_path / "one", database)
    index.update()
    (table,) = database.glob("*.lance")
    DAMAGES[damage](table)

    def used():
        index, _ = opened(tmp_path / "one", database)
        content(tmp_path / "one" / "new.png", 3)
        index.update()
        index.search(index.vectors()[1])

    with pytest.raises(OSError, match="cannot be") as raised:
        used()
    assert f"Remove {table}: the index is made again" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert ".rs:" not in str(raised.value)
    # Another folder is indexed, also where it could be the damaged one renamed.
    shutil.rmtree(tmp_path / "one")
    seen = function.seen
    other, _ = opened(tmp_path / "two", database, function)
    told = other.update()
    assert (told.images, function.seen - seen, len(told.notes)) == (2, 2, 1)
    assert f"Remove {table}" in told.notes[0]
    shutil.rmtree(table)
    assert other.update().notes == ()


def keep_only(table, *kept):
    """Removes all parts of a table but these."""
    for part in table.iterdir():
        if part.name not in kept:
            shutil.rmtree(part)


def unlink_manifests(table):
    """Leaves a manifest under the name that it has until it is complete."""
    keep_only(table, "_transactions", "_versions")
    first, *others = sorted((table / "_versions").iterdir())
    first.rename(first.with_name(f"{first.name}#1"))
    for file in others:
        file.unlink()


# States of a table in the order in which LanceDB creates it.
INTERRUPTED = {
    "empty": keep_only,
    "transaction": lambda table: keep_only(table, "_transactions"),
    "manifest": unlink_manifests,
}


@pytest.mark.parametrize("state", INTERRUPTED)
def test_a_table_whose_creation_was_interrupted_is_created_again(
    folder, tmp_path, state
):
    database = tmp_path / "db"
    index, function = opened(folder, database)
    index.update()
    expected = index.vectors()
    (table,) = database.glob("*.lance")
    INTERRUPTED[state](table)
    # Indexes of other folders pass it over.
    copy = shutil.copytree(folder, tmp_path / "copy")
    changes = opened(copy, database, function)[0].update()
    assert (changes.images, changes.notes, function.seen) == (24, (), 48)
    index, _ = opened(folder, database, function)
    assert len(index) == 0
    assert index.search(expected[1][:1]) == [[]]
    assert index.update().images == 24
    again, _ = opened(folder, database, function)
    assert again.vectors()[0] == expected[0]
    np.testing.assert_array_equal(again.vectors()[1], expected[1])


def test_a_full_disk_names_the_database(folder, tmp_path, monkeypatch):
    index, _ = opened(folder, tmp_path / "db")

    def full(*_, **__):
        source = "/root/.cargo/registry/src/index.crates.io/" + 200 * "x"
        raise RuntimeError(f"LanceError(IO): No space left on device, {source}.rs:1:2")

    monkeypatch.setattr(search_table.lancedb.DBConnection, "create_table", full)
    monkeypatch.setattr(type(index._database._lance), "create_table", full)
    with pytest.raises(
        OSError, match=r"written: .*No space left on device\. .*--database DIR"
    ):
        index.update()


def test_an_index_that_can_only_be_read_is_searched(folder, tmp_path, monkeypatch):
    index, function = opened(folder, tmp_path / "db")
    index.update()
    # Files that are no images are read at every update.
    (folder / "notes.txt").write_text("none")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "db").rglob("*")}
    monkeypatch.setattr(search_table.Database, "is_writable", False)
    index, _ = opened(folder, tmp_path / "db", function)
    told = index.update()
    assert (told.images, told.added, len(told.skipped)) == (24, 0, 1)
    paths, x = index.vectors()
    assert index.search(x[:1], 1)[0][0].path == paths[0]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "db").rglob("*")} == before
    content(folder / "new.png", 1)
    with pytest.raises(OSError, match=r"images are new.*another database"):
        index.update()
    (folder / "new.png").unlink()
    (folder / "group0" / "kind0" / "0.png").unlink()
    with pytest.raises(OSError, match=r"1 is missing.*another database"):
        index.update()


def test_a_database_that_cannot_be_made_is_named(folder, tmp_path):
    (tmp_path / "file").write_text("no directory")
    with pytest.raises(OSError, match=r"no index can be created in .*--database DIR"):
        opened(folder, tmp_path / "file" / "db")


# Sizes.


@pytest.mark.parametrize("k", [2**31, 2**32, 10**20])
def test_more_hits_than_images_are_all_images(folder, tmp_path, k):
    index, _ = opened(folder, tmp_path / "db")
    index.update()
    paths, x = index.vectors()
    for hits in index.search(x[:2], k):
        assert sorted(hit.path for hit in hits) == paths
    assert len(index.search(x[:1], k, within=0.0)[0]) >= 1


def test_groups_of_near_equal_frames_need_no_list_of_their_pairs():
    draw = np.random.default_rng(0)
    x = np.repeat(draw.normal(size=(3, 16)), [6000, 1, 1], axis=0)
    x[:6000] += draw.normal(size=(6000, 16)) * 1e-6
    tracemalloc.start()
    group = search.linked_groups(x, 0.1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [*np.unique(group, return_counts=True)[1]] == [6000, 1, 1]
    # A list of the pairs would have 20 bytes for each of 36 million.
    assert peak < 2**28


@pytest.mark.parametrize("pairs", [1, 50, 2**23])
def test_groups_are_those_of_all_links(monkeypatch, pairs):
    monkeypatch.setattr(duplicates, "PAIRS", pairs)
    draw = np.random.default_rng(1)
    x = draw.integers(0, 9, size=(60, 2)).astype(float)
    distances = np.linalg.norm(x[:, None] - x, axis=-1)
    for within in (0.0, 1.0, 1.5, 20.0):
        expected = np.arange(60)
        for _ in range(60):
            linked = np.where(distances <= within, expected, 60)
            expected = linked.min(axis=1)
        np.testing.assert_array_equal(search.linked_groups(x, within), expected)
    assert search.linked_groups(np.zeros((0, 3)), 0.1).shape == (0,)
