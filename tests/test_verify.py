"""Same or different: measured on a folder, and by a threshold of one's own."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import jax
import numpy as np
import pytest
from folders import assert_drawn, prepare_digits, shapes
from PIL import Image
from sklearn.linear_model import LogisticRegression

import tripletjax as tj
from tripletjax.apps import verification
from tripletjax.apps.embedders import embedder_of, vectors_of
from tripletjax.apps.verification import evaluation, intervals
from tripletjax.apps.verification import pair_distances as pairs_module
from tripletjax.apps.verification import report as verification_report
from tripletjax.apps.verification.calibration import (
    Calibration,
    TooFewPairsError,
    calibrate,
    check_enough,
)
from tripletjax.apps.verification.pair_distances import PairDistances, distances_of
from tripletjax.learn.embedder import Embedder


def unit(images):
    """Small pixels as unit vectors, with what a file is mixed in."""
    x = np.stack([np.asarray(i.convert("L").resize((6, 5))) for i in images])
    x = x.reshape(len(images), -1).astype(np.float32) - 60
    return x / np.linalg.norm(x, axis=1, keepdims=True)


EMBEDDER = embedder_of(unit, key="pixels")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp("verify") / "people", kinds=8, each=9)


@pytest.fixture(scope="module")
def found(folder):
    return verification.evaluate(EMBEDDER, folder, replicates=200)


def test_rates_are_those_of_all_pairs(folder, found):
    files = sorted(folder.rglob("*.*"))
    assert [*found.files] == files
    x = vectors_of(EMBEDDER, [Image.open(file) for file in files])
    labels = np.unique([file.parent for file in files], return_inverse=True)[1]
    first, second = np.triu_indices(len(x), 1)
    d = np.linalg.norm(x[first] - x[second], axis=1)
    same = labels[first] == labels[second]
    expected = tj.verification.evaluate_pairs(d, same, fars=(0.1, 0.01, 0.001))
    told = found.report["verification"]
    assert (told["positives"], told["negatives"]) == (8 * 36, 72 * 71 // 2 - 8 * 36)
    np.testing.assert_allclose(
        told["equal_error_rate"], 100 * expected.equal_error_rate, rtol=1e-4
    )
    np.testing.assert_allclose(
        [one["tar"] for one in told["at_far"]], 100 * expected.tar_at_far, rtol=1e-4
    )
    # At the threshold, what it says holds, and no larger one holds it.
    chosen = found.calibration
    accepted = d[~same] <= chosen.threshold
    assert accepted.mean() <= 0.01
    following = np.min(d[d > chosen.threshold])
    assert (d[~same] <= following).mean() >= accepted.mean()
    np.testing.assert_allclose((d[same] <= chosen.threshold).mean(), chosen.tar)
    assert (chosen.images, chosen.classes) == (72, 8)
    assert (chosen.same, chosen.different) == (same.sum(), (~same).sum())


def test_intervals_hold_the_rates_and_are_those_of_replicates(found):
    intervals, told = found.report["intervals"], found.report["verification"]
    for name in ("equal_error_rate", "area_under_roc"):
        low, high = intervals[name]
        assert low <= told[name] <= high
    # A rate of 0.001 is not shown by 2,268 pairs.
    assert [one["far"] for one in intervals["at_far"]] == [10, 1]
    pairs = found.pairs
    drawn = [
        tj.verification.bootstrap(
            key,
            pairs.same,
            pairs.labels[pairs.same_images[:, 0]],
            pairs.different,
            pairs.labels[pairs.different_images],
            fars=(0.1, 0.01),
            replicates=100,
        )
        for key in jax.random.split(jax.random.key(0), 2)
    ]
    values = np.concatenate([one.area_under_roc for one in drawn])
    np.testing.assert_allclose(
        intervals["area_under_roc"], 100 * np.nanquantile(values, (0.025, 0.975))
    )


def test_the_probability_is_a_logistic_regression(found):
    chosen, pairs = found.calibration, found.pairs
    d = np.concatenate([pairs.same, pairs.different]).astype(np.float64)[:, None]
    same = np.arange(len(d)) < len(pairs.same)
    fitted = LogisticRegression(class_weight="balanced").fit(d, same)
    x = np.linspace(0, 2, 9)
    np.testing.assert_allclose(
        chosen.probability(x), fitted.predict_proba(x[:, None])[:, 1], rtol=1e-6
    )
    assert (np.diff(chosen.probability(x)) < 0).all()


def test_folds_share_no_class(found):
    pairs = found.pairs
    # A number for each pair, so that every distance names its pair.
    count = len(pairs.same)
    numbered = dataclasses.replace(
        pairs, same=np.arange(count), different=count + np.arange(len(pairs.different))
    )
    number, same, fold, folds = intervals._folds_of_classes(numbered, pairs.labels)
    assert folds == 4
    images = np.concatenate([pairs.same_images, pairs.different_images])[number]
    classes = [{*pairs.labels[images[fold == k]].ravel()} for k in range(folds)]
    assert all(len(of_fold) >= 2 for of_fold in classes)
    assert sum(map(len, classes)) == len(set.union(*classes))
    for k in range(folds):
        assert same[fold == k].mean() == 0.5
    distances, same, fold, _ = intervals._folds_of_classes(pairs, pairs.labels)
    expected = tj.verification.k_fold_accuracy(distances, same, folds=4, fold=fold)
    told = found.report["k_fold"]
    np.testing.assert_allclose(told["accuracy"], 100 * expected.accuracy, rtol=1e-5)
    assert told["pairs"] == len(distances)


def test_the_worst_pairs_are_of_every_two_classes_one(found):
    pairs = found.pairs
    (images, distances), (rejects, far) = found.worst
    assert distances[0] == pairs.different.min()
    assert far[0] == pairs.same.max()
    assert (np.diff(distances) >= 0).all()
    assert (np.diff(far) <= 0).all()
    who = [tuple(sorted(pairs.labels[two])) for two in images]
    assert len({*who}) == len(who) == evaluation.WORST
    assert len({*pairs.labels[rejects[:, 0]]}) == len(rejects)


def test_a_threshold_decides_about_two_images(folder, found, tmp_path):
    chosen = found.calibration
    one, other = (Image.open(file) for file in found.files[:2])
    decision = verification.decide(EMBEDDER, one, other, chosen)
    x = vectors_of(EMBEDDER, [one, other])
    np.testing.assert_allclose(decision.distance, np.linalg.norm(x[0] - x[1]), 1e-5)
    assert decision.same == (decision.distance <= chosen.threshold)
    assert verification.decide(EMBEDDER, one, one, chosen).same
    # It is kept, and read again.
    assert chosen.write(tmp_path) is None
    again = Calibration.read(tmp_path, EMBEDDER.key)
    assert again.summary() == chosen.summary()
    np.testing.assert_array_equal(again.vectors, chosen.vectors)
    np.testing.assert_array_equal(again.names, chosen.names)
    # The one before is not lost.
    assert chosen.write(tmp_path).name == "calibration-before"
    assert chosen.write(tmp_path).name == "calibration-before-2"
    with pytest.raises(ValueError, match="of another state of the run"):
        Calibration.read(tmp_path, "other")
    (tmp_path / "calibration" / "calibration.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        Calibration.read(tmp_path, EMBEDDER.key)
    shutil.rmtree(tmp_path / "calibration")
    with pytest.raises(FileNotFoundError, match="no threshold was chosen"):
        Calibration.read(tmp_path, EMBEDDER.key)


def test_rates_that_are_not_shown_are_refused(folder):
    check_enough(10_000, 0.001)
    with pytest.raises(TooFewPairsError, match="9,999 pairs"):
        check_enough(9_999, 0.001)
    for far in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="far must be a share"):
            verification.evaluate(EMBEDDER, folder, far=far)


def test_without_enough_pairs_there_is_no_threshold(tmp_path):
    small = shapes(tmp_path / "small", kinds=3, each=3)
    for name, far, needed in (
        ("default", {}, "1,000"),
        ("same", {"far": verification.FAR}, "1,000"),
        ("finer", {"far": 0.001}, "10,000"),
    ):
        result = verification.evaluate(EMBEDDER, small, replicates=10, **far)
        assert result.calibration is None
        assert result.report["calibration"] is None
        (note,) = (n for n in result.report["notes"] if n.startswith("no threshold: "))
        assert f"27 pairs of different classes: {needed} are needed" in note
        verification_report.write(result, tmp_path / name)
    alone = shapes(tmp_path / "alone", kinds=3, each=1)
    with pytest.raises(ValueError, match="no pair of the same class"):
        verification.evaluate(EMBEDDER, alone)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        verification.evaluate(EMBEDDER, tmp_path / "none")


def test_copies_in_different_classes_leave_no_threshold(tmp_path):
    folder = shapes(tmp_path / "few", kinds=3, each=2)
    one = folder / "group0" / "kind0" / "0.png"
    for kind in ("group1/kind1", "group0/kind2"):
        shutil.copy(one, folder / kind / "copy.png")
    (folder / "group0" / "kind0" / "empty.png").touch()
    zeros = embedder_of(lambda images: np.ones((len(images), 2)), key="ones")
    for embedder in (EMBEDDER, zeros):
        found = verification.evaluate(embedder, folder, replicates=10)
        verification_report.write(found, tmp_path / embedder.key / "out")
        told = "\n".join(verification_report.format_report(found.report))
        assert "copies of others" in told
        assert "empty.png" in told
    # With enough pairs of them it is chosen below all distances.
    pairs = PairDistances.of_all(np.ones((80, 2), np.float32), np.arange(80) % 8)
    metrics = pairs.evaluate((0.01,))
    chosen = calibrate(
        pairs,
        embedder="ones",
        data="nowhere",
        far=0.01,
        threshold=float(metrics.thresholds[0]),
        tar=float(metrics.tar_at_far[0]),
        vectors=np.ones((80, 2), np.float32),
        names=(np.arange(80) % 8).astype(str),
    )
    assert (chosen.threshold, chosen.tar) == (-1, 0)
    json.dumps(chosen.summary(), allow_nan=False)


def test_classes_that_were_trained_on_are_left_out(folder, monkeypatch):
    seen = frozenset({"group0/kind0", "group1/kind3"})
    monkeypatch.setattr(
        evaluation, "_not_trained_on", lambda *of: (seen, ["2 left out"])
    )
    found = verification.evaluate(EMBEDDER, folder, replicates=10)
    assert (found.report["images"], found.report["classes"]) == (54, 6)
    assert not {*found.calibration.names} & seen
    assert "2 left out" in found.report["notes"]


def test_classes_of_the_folder_of_a_run_are_left_out(folder, tmp_path):
    def embedder_of_run(data, seen, triplets=None):
        requested = SimpleNamespace(data=data, triplets=triplets)
        record = SimpleNamespace(
            requested=requested, label_names=tuple("abcd"), seen_names=tuple(seen)
        )
        return mock.Mock(spec=Embedder, record=record)

    left_out = functools.partial(evaluation._not_trained_on, folder=folder, name=None)
    names, notes = left_out(embedder_of_run(str(folder / ".." / folder.name), "ab"))
    assert names == {"a", "b"}
    assert notes == [
        "2 classes of the folder are left out: the run was trained on them; 2 were "
        "held out"
    ]
    with pytest.raises(ValueError, match="trained on the classes of"):
        left_out(embedder_of_run(str(folder), "abc"))
    for other in (
        embedder_of_run(str(tmp_path / "other"), "abcd"),
        embedder_of_run(str(folder), "abcd", triplets="triplets.csv"),
        EMBEDDER,
    ):
        assert left_out(other) == (frozenset(), [])
    named = evaluation._not_trained_on(
        embedder_of_run("tfds:lfw", "ab"), tmp_path, "tfds:lfw"
    )
    assert named[0] == {"a", "b"}


def test_vectors_that_are_not_finite_are_named(folder):
    nan = embedder_of(lambda images: [[np.nan]] * len(images), key="nan")
    with pytest.raises(ValueError, match="must return finite vectors, got NaN"):
        verification.evaluate(nan, folder)


def test_vectors_of_any_length_are_compared_and_shown(folder, tmp_path):
    far = embedder_of(lambda images: 50 * unit(images), key="far")
    found = verification.evaluate(far, folder, replicates=10)
    assert 2 < found.calibration.threshold < 100
    verification_report.write(found, tmp_path / "out")


def test_pictures_and_lines_of_a_report(found, tmp_path):
    verification_report.write(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == found.report
    for name in ("roc", "distances", "errors"):
        assert_drawn(tmp_path / "out" / f"{name}.png")
    told = "\n".join(verification_report.format_report(found.report))
    assert "72 images of 8 classes" in told
    assert f"{found.report['verification']['equal_error_rate']:.2f} %" in told


def labeled_faces(root, people=6, each=3):
    """A folder as Labeled Faces in the Wild has it, and its file of pairs."""
    draw = np.random.default_rng(0)
    for person in range(people):
        look = draw.integers(0, 200, (8, 8, 3))
        for number in range(each):
            noise = draw.integers(0, 55, (8, 8, 3))
            name = f"Person_{person}"
            file = root / "faces" / name / f"{name}_{number + 1:04d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.uint8(look + noise)).resize((32, 32)).save(file)
    lines = ["2\t3"]
    for fold in range(2):
        ours = range(3 * fold, 3 * fold + 3)
        lines += [f"Person_{p}\t1\t2" for p in ours]
        lines += [f"Person_{p}\t1\tPerson_{(p + 1) % people}\t3" for p in ours]
    (root / "pairs.txt").write_text("\n".join(lines) + "\n")
    return root / "faces", root / "pairs.txt"


@pytest.mark.slow
def test_given_pairs_in_their_folds(tmp_path):
    folder, file = labeled_faces(tmp_path)
    found = verification.evaluate(EMBEDDER, folder, pairs_file=file, replicates=10)
    told = found.report["verification"]
    assert (told["positives"], told["negatives"]) == (6, 6)
    # Images of no pair are not read: of each person the first, and the second or third.
    assert found.report["images"] == 18
    first = [f"Person_{p}/Person_{p}_0001.png" for p in range(6)]
    second = [f"Person_{p}/Person_{p}_0002.png" for p in range(6)]
    third = [f"Person_{(p + 1) % 6}/Person_{(p + 1) % 6}_0003.png" for p in range(6)]
    x, y, z = (
        vectors_of(EMBEDDER, [Image.open(folder / path) for path in paths])
        for paths in (first, second, third)
    )
    d = np.concatenate([np.linalg.norm(x - y, axis=1), np.linalg.norm(x - z, axis=1)])
    np.testing.assert_allclose(
        np.concatenate([found.pairs.same, found.pairs.different]), d, rtol=1e-5
    )
    same, fold = np.arange(12) < 6, np.array([0, 0, 0, 1, 1, 1] * 2)
    expected = tj.verification.k_fold_accuracy(
        d.astype(np.float32), same, folds=2, fold=fold
    )
    assert found.report["k_fold"]["folds"] == 2
    np.testing.assert_allclose(
        found.report["k_fold"]["accuracy"], 100 * expected.accuracy, rtol=1e-5
    )
    # What cannot be read is said; what is missing is an error.
    broken = folder / "Person_0" / "Person_0_0002.png"
    broken.write_bytes(b"\x89PNG none")
    less = verification.evaluate(EMBEDDER, folder, pairs_file=file, replicates=10)
    assert less.report["verification"]["positives"] == 5
    assert "1 pair of skipped images is left out" in " ".join(less.report["notes"])
    # The single outer folder of an archive changes nothing.
    (tmp_path / "archive").mkdir()
    folder.rename(tmp_path / "archive" / "lfw")
    again = verification.evaluate(
        EMBEDDER, tmp_path / "archive", pairs_file=file, replicates=10
    )
    assert again.report["verification"] == less.report["verification"]
    (tmp_path / "archive" / "lfw").rename(folder)
    broken.unlink()
    with pytest.raises(FileNotFoundError, match="1 image that does not exist in"):
        verification.evaluate(EMBEDDER, folder, pairs_file=file, replicates=10)


@pytest.mark.slow
def test_a_prepared_dataset_is_measured_as_a_folder(own_data_dir):
    prepare_digits()
    with verification.folder_of("elsewhere") as folder:
        assert folder == Path("elsewhere")
    with verification.folder_of("tfds:prepared_digits:test") as folder:
        found = verification.evaluate(
            EMBEDDER, folder, name="tfds:prepared_digits:test", replicates=10
        )
        verification_report.write(found, folder / "out")
    assert not folder.exists()
    assert found.report["data"] == found.calibration.data == "tfds:prepared_digits:test"
    assert (found.report["images"], found.report["classes"]) == (899, 10)


@pytest.mark.parametrize("sizes", [[60, 50, 1, 1], [3] * 40])
def test_of_many_pairs_some_are_drawn(sizes, monkeypatch):
    monkeypatch.setattr(pairs_module, "MOST", 700)
    labels = np.repeat(np.arange(len(sizes)), sizes)
    labels = labels[np.random.default_rng(0).permutation(len(labels))]
    x = np.random.default_rng(1).normal(size=(len(labels), 3)).astype(np.float32)
    pairs = PairDistances.of_all(x, labels)
    n = len(labels)
    assert pairs.all_same == sum(s * (s - 1) // 2 for s in sizes)
    assert pairs.all_same + pairs.all_different == n * (n - 1) // 2
    assert len(pairs.same) == min(pairs.all_same, 700)
    assert len(pairs.different) == 700
    for images, alike in ((pairs.same_images, True), (pairs.different_images, False)):
        assert (images[:, 0] < images[:, 1]).all()
        assert len({*map(tuple, images.tolist())}) == len(images)
        assert ((labels[images[:, 0]] == labels[images[:, 1]]) == alike).all()
    np.testing.assert_allclose(
        pairs.same,
        np.linalg.norm(x[pairs.same_images[:, 0]] - x[pairs.same_images[:, 1]], axis=1),
        rtol=1e-6,
    )
    metrics = pairs.evaluate((0.1,))
    assert metrics.positives == pairs.all_same


def test_no_pairs_have_no_distances():
    assert distances_of(np.zeros((3, 2), np.float32), np.zeros((0, 2), int)).size == 0
    pairs = PairDistances.of_all(np.zeros((2, 2), np.float32), np.array([0, 1]))
    with pytest.raises(ValueError, match="no two images of one class"):
        calibrate(
            pairs.__class__(**vars(pairs) | {"all_different": 10_000}),
            embedder="e",
            data="nowhere",
            far=0.01,
            threshold=0.0,
            tar=0.0,
            vectors=np.zeros((2, 2), np.float32),
            names=np.array(["a", "b"]),
        )
