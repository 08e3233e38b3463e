"""Groups of images by identity, and their metrics."""

import csv
import math
import os

import numpy as np
import oracles
import pytest
from folders import assert_drawn, shapes
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from sklearn.metrics import adjusted_rand_score
from test_verify import EMBEDDER

from tripletjax.apps import clustering, search, verification
from tripletjax.apps.clustering import evaluation
from tripletjax.apps.clustering import report as clustering_report
from tripletjax.apps.clustering.groups import make_groups


def vectors(n, d, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32)


def same_groups(first, second):
    pairs = {*zip(first.tolist(), second.tolist())}
    return len(pairs) == len({*first.tolist()}) == len({*second.tolist()})


def average_linkage(x, threshold):
    """Groups by SciPy, from the matrix of squared distances."""
    tree = linkage(pdist(x.astype(np.float64), "sqeuclidean"), "average")
    return fcluster(tree, threshold**2, "distance")


@pytest.mark.parametrize("neighbors", [1, 3, 16])
@pytest.mark.parametrize(("d", "threshold"), [(8, 0.9), (3, 0.5), (3, 2.0), (3, 1e-3)])
def test_groups_are_those_of_average_linkage_on_the_matrix(d, threshold, neighbors):
    x = vectors(200, d)
    groups = clustering.group_vectors(x, threshold, neighbors=neighbors)
    assert same_groups(groups, average_linkage(x, threshold))
    firsts = [np.flatnonzero(groups == group)[0] for group in groups]
    np.testing.assert_array_equal(groups, firsts)


def test_copies_weigh_as_often_as_they_occur():
    x = vectors(40, 3)
    x = x[np.random.default_rng(1).integers(0, 40, 300)]
    groups = clustering.group_vectors(x, 0.5, neighbors=2)
    assert same_groups(groups, average_linkage(x, 0.5))
    assert same_groups(clustering.group_vectors(x, 0.0), average_linkage(x, 1e-6))


def test_vectors_of_any_length():
    x = 5 + 3 * np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    groups = clustering.group_vectors(x, 4.0, neighbors=4)
    assert same_groups(groups, average_linkage(x, 4.0))
    assert 1 < len(np.unique(groups)) < 100


def test_small_numbers_of_vectors():
    x = vectors(2, 4)
    assert clustering.group_vectors(x[:0], 1.0).tolist() == []
    assert clustering.group_vectors(x[:1], 1.0).tolist() == [0]
    assert clustering.group_vectors(x, math.inf).tolist() == [0, 0]
    assert clustering.group_vectors(x, 0.1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros(3)}, r"x must be vectors \[n, d\]"),
        ({"x": np.full((2, 2), np.nan)}, "x must be finite"),
        ({"threshold": -0.1}, r"threshold must be at least 0, got -0\.1"),
        ({"threshold": math.nan}, "threshold must be at least 0"),
        ({"neighbors": 0}, "neighbors must be at least 1"),
    ],
)
def test_bad_input_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        clustering.group_vectors(**{"x": vectors(4, 2), "threshold": 1.0} | change)


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_their_definitions(seed):
    draw = np.random.default_rng(seed)
    labels, groups = draw.integers(0, 6, 40), draw.integers(0, (2, 8, 30, 9)[seed], 40)
    groups[: 20 * (seed % 2)] = labels[: 20 * (seed % 2)]
    metrics = clustering.measure(labels, groups)
    for name, value in oracles.clustering(labels, groups).items():
        np.testing.assert_allclose(getattr(metrics, name), value, atol=1e-12)
    both = metrics.bcubed_precision, metrics.bcubed_recall
    np.testing.assert_allclose(metrics.bcubed_f, 2 / sum(1 / x for x in both))
    # A draw of classes counts copies apart.
    copies = np.array([0, 2, 1, 3, 0, 1])
    drawn = evaluation._Table.of(labels, groups).measure(copies)
    for name, value in oracles.clustering(labels, groups, copies).items():
        np.testing.assert_allclose(getattr(drawn, name), value, atol=1e-12)


def test_metrics_of_extreme_groups():
    labels = np.array([0, 0, 1, 1, 2])
    perfect = clustering.measure(labels, labels + 7)
    assert (perfect.bcubed_f, perfect.pairwise_f) == (1, 1)
    assert perfect.adjusted_rand_index == 1
    single = clustering.measure(labels, np.arange(5))
    np.testing.assert_allclose(single.bcubed_recall, 3 / 5)
    assert single.bcubed_precision == 1
    assert math.isnan(single.pairwise_precision)
    assert (single.pairwise_recall, single.pairwise_f) == (0, 0)
    assert single.adjusted_rand_index == adjusted_rand_score(labels, np.arange(5)) == 0
    assert math.isnan(clustering.measure(np.arange(5), np.arange(5)).pairwise_f)
    with pytest.raises(ValueError, match=r"got shapes \(5,\) and \(4,\)"):
        clustering.measure(labels, np.arange(4))


def test_intervals_are_of_drawn_classes():
    draw = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 6)
    groups = np.where(draw.random(180) < 0.7, labels, draw.integers(0, 40, 180))
    report = clustering.evaluate(labels, groups, replicates=100)
    assert (report["images"], report["classes"]) == (180, 30)
    assert report["groups"] == len(np.unique(groups))
    for name in evaluation.METRICS:
        low, high = report["intervals"][name]
        assert low < report[name] < high
        assert high - low < 40
    # Classes that no draw can change have no interval around them.
    sure = clustering.evaluate(labels, labels, replicates=10)
    assert sure["intervals"]["bcubed_f"] == [100, 100]
    # One class has no draws that differ.
    single = clustering.evaluate(np.zeros(4, int), np.array([0, 0, 1, 2]))
    assert single["bcubed_recall"] == 37.5
    assert {single["intervals"][name] for name in evaluation.METRICS} == {None}
    alone = clustering.evaluate(np.arange(5), np.arange(5), replicates=5)
    assert (alone["pairwise_f"], alone["intervals"]["pairwise_f"]) == (None, None)


def test_the_threshold_is_the_best_on_the_images_of_a_calibration(tmp_path):
    people = shapes(tmp_path / "people", kinds=8, each=9, seed=3)
    calibration = verification.evaluate(EMBEDDER, people, replicates=10).calibration
    chosen = clustering.choose_threshold(calibration)
    assert chosen.images == 72
    _, labels = np.unique(calibration.names, return_inverse=True)

    def score(threshold):
        groups = clustering.group_vectors(calibration.vectors, threshold)
        return clustering.measure(labels, groups).bcubed_f

    np.testing.assert_allclose(score(chosen.threshold), chosen.bcubed_f)
    assert chosen.bcubed_f >= max(map(score, np.linspace(0, 2, 21)))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    root = tmp_path_factory.mktemp("clustering")
    index = search.Index(
        shapes(root / "pictures", kinds=6, each=5), root / "database", EMBEDDER
    )
    index.update()
    return index


@pytest.fixture(scope="module")
def groups(index):
    # Between two images of one kind and of two kinds.
    return clustering.group_images(index, 0.5)


def test_groups_of_an_index_are_its_kinds(index, groups):
    kinds = np.array([path.rpartition("/")[0] for path in groups.paths])
    _, labels = np.unique(kinds, return_inverse=True)
    metrics = clustering.measure(labels, groups.numbers)
    assert metrics.bcubed_f > 0.9
    assert groups.sizes == sorted(groups.sizes, reverse=True)
    assert sum(groups.sizes) == 30
    _, x = index.vectors()
    for number in range(len(groups)):
        rows = groups.members[number]
        np.testing.assert_array_equal(
            np.flatnonzero(groups.numbers == number), np.sort(rows)
        )
        far = np.linalg.norm(x[rows] - x[rows].mean(axis=0), axis=1)
        assert (np.diff(far) >= 0).all()


def test_groups_of_one_size_are_in_the_order_of_paths():
    paths = ["a", "b", "c", "d", "e"]
    groups = make_groups(paths, np.zeros((5, 2)), np.array([0, 1, 2, 1, 2]), 0.5)
    assert groups.numbers.tolist() == [2, 0, 1, 0, 1]
    assert groups.sizes == [2, 2, 1]
    assert groups.several == 2
    assert groups.paths_of(0) == ["b", "d"]


def test_a_table_and_a_sheet_of_groups(index, groups, tmp_path):
    table, sheet = tmp_path / "new" / "groups.csv", tmp_path / "new" / "groups.png"
    clustering_report.write_table(groups, table)
    with table.open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert sorted(row["path"] for row in rows) == [*groups.paths]
    for row in rows:
        number = groups.numbers[groups.paths.index(row["path"])]
        assert int(row["group"]) == number + 1
        assert int(row["size"]) == groups.sizes[number]
    clustering_report.draw(index, groups, sheet)
    assert_drawn(sheet)


@pytest.mark.parametrize("link", [False, True])
def test_folders_of_groups(index, tmp_path, link):
    before = {file: file.read_bytes() for file in index.folder.rglob("*.*")}
    paths = tuple(index.vectors()[0])
    # Two images of one name, and a third alone.
    chosen = [paths.index(f"group{k % 2}/kind{k}/0.png") for k in range(3)]
    groups = make_groups(
        [paths[row] for row in chosen], np.zeros((3, 2)), np.array([0, 1, 0]), 0.5
    )
    target = tmp_path / "new" / "groups"
    fill = clustering_report.link_groups if link else clustering_report.copy_groups
    fill(index, groups, target)
    files = {file.relative_to(target).as_posix(): file for file in target.rglob("*.*")}
    assert sorted(files) == ["group-1/0-2.png", "group-1/0.png", "single/0.png"]
    for name, row in (
        ("group-1/0.png", chosen[0]),
        ("group-1/0-2.png", chosen[2]),
        ("single/0.png", chosen[1]),
    ):
        original = index.file_of(paths[row])
        assert files[name].is_symlink() == link
        assert files[name].read_bytes() == original.read_bytes()
        assert not link or files[name].resolve() == original.resolve()
    assert {file: file.read_bytes() for file in before} == before
    # The target alone is left beside others.
    assert [*target.parent.iterdir()] == [target]
    with pytest.raises(FileExistsError, match="already exists; give another folder"):
        fill(index, groups, target)
    with pytest.raises(ValueError, match="must lie outside"):
        fill(index, groups, index.folder / "groups")


def test_a_target_appears_whole_or_not_at_all(index, groups, tmp_path, monkeypatch):
    done = []

    def fail(file, copy):
        if len(done) == 3:
            raise OSError("no space left")
        done.append(copy)
        copy.write_bytes(b"")

    monkeypatch.setattr(clustering_report.shutil, "copy2", fail)
    with pytest.raises(OSError, match="no space left"):
        clustering_report.copy_groups(index, groups, tmp_path / "groups")
    assert [*tmp_path.iterdir()] == []
    os.symlink("nowhere", tmp_path / "broken")
    with pytest.raises(FileExistsError):
        clustering_report.copy_groups(index, groups, tmp_path / "broken")


def test_an_index_of_fewer_than_two_images_has_no_groups(tmp_path):
    folder = tmp_path / "few"
    folder.mkdir()
    index = search.Index(folder, tmp_path / "database", EMBEDDER)
    index.update()
    with pytest.raises(ValueError, match="at least 2 readable images to group, got 0"):
        clustering.group_images(index, 0.5)
    Image.fromarray(np.eye(9, dtype=bool)).save(folder / "one.png")
    index.update()
    with pytest.raises(ValueError, match="at least 2 readable images to group, got 1"):
        clustering.group_images(index, 0.5)
