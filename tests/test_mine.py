"""Hard triplets of a folder, and images that are likely labelled wrongly."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from folders import assert_drawn, write_digits

import tripletjax as tj
from tripletjax.apps import mining
from tripletjax.apps.embedders import embedder_of
from tripletjax.apps.mining import folder as mining_folder
from tripletjax.apps.mining import report as mining_report
from tripletjax.apps.mining.label_errors import NEAREST, NEIGHBORS, RATIO
from tripletjax.learn.data.digits import digits
from tripletjax.learn.data.triplet_files import load_triplets


def unit(images):
    """Pixels as unit vectors."""
    x = np.stack([np.asarray(image.convert("L")) for image in images])
    x = x.reshape(len(images), -1).astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


EMBEDDER = embedder_of(unit, key="pixels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six digits of 12 images; one image is also in another class, one twice in its."""
    folder = tmp_path_factory.mktemp("mine") / "digits"
    write_digits(folder, per_class=12, classes=6)
    content = (folder / "0" / "0_3.png").read_bytes()
    (folder / "1" / 'a, "copy".png').write_bytes(content)
    (folder / "0" / "0_99.png").write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return mining.mine(EMBEDDER, folder, k=3)


def distances_of(images):
    d = np.linalg.norm(images.x[:, None] - images.x[None], axis=2)
    d[images.first_copy[:, None] == images.first_copy] = 0
    return d


def expected_triplets(images, *, k, range_min=0, range_max=None, margin=None):
    """Triplets and numbers of exclusions, by sorting."""
    d, labels = distances_of(images), images.labels
    triplets, counts = (
        [],
        {"duplicates": 0, "margin": 0, "range_min": 0, "range_max": 0},
    )
    for a in range(len(d)):
        same = labels == labels[a]
        positives = [i for i in np.argsort(d[a], kind="stable") if same[i] and d[a, i]]
        counts["duplicates"] += int(np.sum(~same & (d[a] == 0)))
        order = [i for i in np.argsort(d[a], kind="stable") if not same[i] and d[a, i]]
        least = -np.inf if margin is None else d[a, positives[0]] + margin
        chosen = []
        for rank, i in enumerate(order):
            if d[a, i] < least:
                counts["margin"] += 1
            elif rank < range_min:
                counts["range_min"] += 1
            elif range_max is not None and rank >= range_max:
                counts["range_max"] += 1
            else:
                chosen.append(i)
        triplets += [(a, positives[0], i) for i in chosen[:k]]
    return np.array(triplets), counts


@pytest.mark.parametrize(
    "options", [{"k": 3}, {"k": 2, "margin": 0.05, "range_min": 3, "range_max": 30}]
)
def test_triplets_and_exclusions_are_those_of_sorting(folder, options):
    mined = mining.mine(EMBEDDER, folder, **options)
    expected, counts = expected_triplets(mined.images, **options)
    np.testing.assert_array_equal(mined.triplets, expected)
    excluded = mined.report["excluded"]
    assert {name: excluded[name] for name in counts} == counts
    # Each of the three copies is a duplicate of those in the other class.
    assert excluded["duplicates"] == 4
    d = distances_of(mined.images)
    a, p, n = mined.triplets.T
    np.testing.assert_allclose(
        mined.distances, np.stack([d[a, p], d[a, n]], axis=1), rtol=1e-5
    )
    of_report = mined.report["distances"]
    np.testing.assert_allclose(
        of_report["negative"], np.quantile(d[a, n], of_report["quantiles"]), rtol=1e-5
    )
    nearer = 100 * np.mean(d[a, n] < d[a, p])
    np.testing.assert_allclose(of_report["nearer_negatives"], nearer)


def test_parts_of_anchors_give_the_same_triplets(folder, whole, monkeypatch):
    monkeypatch.setattr(mining_folder, "ANCHORS", 17)
    parts = mining.mine(EMBEDDER, folder, k=3)
    np.testing.assert_array_equal(parts.triplets, whole.triplets)
    np.testing.assert_array_equal(parts.neighbors, whole.neighbors)
    assert parts.report["excluded"] == whole.report["excluded"]
    np.testing.assert_allclose(parts.distances, whole.distances, rtol=1e-6)


def test_random_negatives_are_of_the_ranks_and_repeatable(folder, whole):
    first, again, other = (
        mining.mine(EMBEDDER, folder, k=2, range_max=9, seed=seed) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first.triplets, again.triplets)
    assert not np.array_equal(first.triplets, other.triplets)
    nearest, _ = expected_triplets(whole.images, k=9)
    assert {*map(tuple, first.triplets)} < {*map(tuple, nearest)}


def test_the_file_of_triplets_is_read_for_training(folder, whole, tmp_path):
    files = mining_report.Files.beside(tmp_path / "new" / "triplets.csv")
    written = mining_report.write(whole, files)
    assert written == [file for file in files if file.exists()]
    read = load_triplets(files.triplets, data_dir=tmp_path)
    parts = np.concatenate([read.train, read.validation, read.test])
    assert len(parts) == len(whole.triplets)
    assert not read.skipped
    with files.triplets.open(newline="", encoding="utf-8") as opened:
        rows = [*csv.DictReader(opened)]
    images = whole.images.files
    for row, triplet in zip(rows, whole.triplets, strict=True):
        named = [row[role] for role in ("anchor", "positive", "negative")]
        files_of_row = [(files.triplets.parent / name).resolve() for name in named]
        assert files_of_row == [images[index] for index in triplet]
    assert json.loads(files.report.read_text()) == whole.report


def test_label_errors_are_those_of_a_loop():
    """Few vectors, so that classes have one image, copies, and missing neighbours."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 9, 60)
    labels[:3] = 9, 10, 10
    x = draw.normal(size=(60, 3)).astype(np.float32)
    x[5], x[7] = x[4], x[6]
    k = 12
    distances, neighbors = map(
        np.asarray, tj.retrieval.nearest_neighbors(x, x, k, positions=np.arange(60))
    )
    d = np.linalg.norm(np.float64(x)[:, None] - x, axis=2)
    expected = {}
    for i in range(60):
        own = sorted(d[i, (labels == labels[i]) & (d[i] > 0)])[:NEAREST]
        if not own:
            continue
        near = neighbors[i]
        best = min(
            (
                np.mean(([*d[i, near[labels[near] == c]]] + [d[i, near[-1]]] * 3)[:3]),
                int(np.argmax(labels[near] == c)),
            )
            for c in {*labels[near]} - {labels[i]}
        )
        if best[0] / np.mean(own) <= 0.6:
            expected[i] = best[0] / np.mean(own), near[best[1]]
    errors = mining.find_label_errors(x, labels, distances, neighbors, ratio=0.6)
    assert 5 < len(expected) < 50
    assert {*errors.images} == {*expected}
    ratios, nearest = zip(*(expected[i] for i in errors.images))
    np.testing.assert_allclose(errors.ratio, ratios, rtol=1e-5)
    assert (np.diff(errors.ratio) >= 0).all()
    np.testing.assert_array_equal(errors.nearest, nearest)
    np.testing.assert_array_equal(errors.labels, labels[errors.nearest])


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_most_wrong_labels_are_found(share):
    """Precision and recall measured on pixels of digits: 0.97 and 0.89 or more."""
    images, labels = digits()
    labels = np.array(labels)
    x = images.reshape(len(images), -1) / np.float32(16)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    draw = np.random.default_rng(0)
    wrong = draw.random(len(labels)) < share
    true, labels[wrong] = (
        labels.copy(),
        labels[wrong] + draw.integers(1, 10, wrong.sum()),
    )
    labels %= 10
    distances, neighbors = map(
        np.asarray,
        tj.retrieval.nearest_neighbors(x, x, NEIGHBORS, positions=np.arange(len(x))),
    )
    errors = mining.find_label_errors(x, labels, distances, neighbors)
    assert wrong[errors.images].mean() > 0.95
    assert wrong[errors.images].sum() > 0.85 * wrong.sum()
    right = errors.labels == true[errors.images]
    assert right[wrong[errors.images]].mean() > 0.9
    assert errors.ratio.max() <= RATIO


def test_wrong_labels_are_written_and_can_be_left_out(tmp_path):
    swapped = {(0, 1), (2, 3), (4, 0)}
    wrong = write_digits(tmp_path / "digits", per_class=15, classes=6, swapped=swapped)
    files = mining_report.Files.beside(tmp_path / "out.csv", tmp_path / "a" / "b.json")
    mined = mining.mine(EMBEDDER, tmp_path / "digits", skip_label_errors=True)
    assert mining_report.write(mined, files) == [*files]
    with files.label_errors.open(newline="", encoding="utf-8") as opened:
        rows = [*csv.DictReader(opened)]
    named = {tmp_path / "digits" / row["path"] for row in rows}
    assert named >= {*wrong}
    assert len(named) <= 5
    for row in rows:
        file = Path(row["path"])
        assert row["class"] == file.parent.name
        if tmp_path / "digits" / file in wrong:
            assert row["nearest_class"] == file.name.partition("_")[0]
    assert json.loads(files.report.read_text())["label_errors"]
    left = {mined.images.files[index] for index in np.unique(mined.triplets)}
    assert not left & named
    assert_drawn(files.picture)
    lines = [*mining_report.format_report(mined.report)]
    assert f"{len(rows)} likely label errors" in lines


def test_paths_that_no_line_can_hold_are_skipped(folder, tmp_path):
    for name in ("0", "1"):
        (tmp_path / "digits" / name).mkdir(parents=True)
        for file in sorted((folder / name).iterdir())[:4]:
            (tmp_path / "digits" / name / file.name).write_bytes(file.read_bytes())
    (tmp_path / "digits" / "0" / "a\nb.png").write_bytes(file.read_bytes())
    mined = mining.mine(EMBEDDER, tmp_path / "digits")
    assert mined.report["images"] == 8
    assert "1 image is skipped: each has a path that holds a line" in str(
        mined.report["notes"]
    )


def one_class(folder):
    write_digits(folder, per_class=4, classes=1)


def singles(folder):
    write_digits(folder, per_class=1, classes=3)


def two_classes(folder):
    write_digits(folder, per_class=4, classes=2)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (Path.mkdir, {}, "has no images in folders"),
        (one_class, {}, "at least 2 folders of readable images"),
        (singles, {}, "has no class of two images"),
        (two_classes, {"k": 5}, "k must be at most 4, .* got 5"),
        (two_classes, {"k": 2, "range_min": 3}, "k must be at most 4, .* got 5"),
        (two_classes, {"margin": 3.0}, "no triplet left; excluded pairs: margin 32"),
        (two_classes, {"seed": 0}, "requires range_max"),
    ],
)
def test_bad_input_is_named(make, options, words, tmp_path):
    make(tmp_path / "data")
    with pytest.raises(ValueError, match=words) as raised:
        mining.mine(EMBEDDER, tmp_path / "data", **options)
    assert "\n" not in str(raised.value)
