"""Naming images by a gallery, or calling them unknown."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from folders import shapes
from PIL import Image
from test_verify import EMBEDDER

import tripletjax as tj
from tripletjax.apps import identification, search, verification
from tripletjax.apps.embedders import vectors_of
from tripletjax.apps.identification import report as identification_report
from tripletjax.apps.identification.evaluation import Strangers
from tripletjax.apps.identification.gallery import Gallery
from tripletjax.apps.verification.calibration import TooFewPairsError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """People to choose a threshold on, a gallery, and images of it and of others."""
    root = tmp_path_factory.mktemp("identify")
    shapes(root / "others", kinds=8, each=9)
    shapes(root / "gallery", kinds=6, each=3, seed=1)
    shapes(root / "probes", kinds=8, each=4, seed=2)
    return root


@pytest.fixture(scope="module")
def index(root):
    index = search.Index(root / "gallery", root / "database", EMBEDDER)
    index.update()
    return index


@pytest.fixture(scope="module")
def calibration(root):
    found = verification.evaluate(EMBEDDER, root / "others", replicates=10)
    names = np.array([f"other/{name}" for name in found.calibration.names])
    return dataclasses.replace(found.calibration, names=names)


def embedded(folder):
    files = sorted(folder.rglob("*.*"))
    names = [file.parent.relative_to(folder).as_posix() for file in files]
    return files, vectors_of(EMBEDDER, [Image.open(file) for file in files]), names


@pytest.mark.parametrize("means", [False, True])
def test_names_are_of_the_nearest_class(root, index, means):
    gallery = Gallery.of(index, means=means)
    assert gallery.names == tuple(sorted(f"group{k % 2}/kind{k}" for k in range(6)))
    files, x, names = embedded(root / "probes")
    references, labels = gallery.references
    if means:
        np.testing.assert_allclose(np.linalg.norm(references, axis=1), 1, rtol=1e-5)
    d = np.linalg.norm(x[:, None] - references, axis=-1)
    of_class = np.stack([d[:, labels == c].min(1) for c in range(6)], axis=1)
    threshold = float(np.median(of_class.min(axis=1)))
    found = identification.identify(gallery, x, threshold=threshold)
    for one, distances in zip(found, of_class):
        order = np.argsort(distances)
        assert one.nearest == gallery.names[order[0]]
        assert one.runner_up == gallery.names[order[1]]
        np.testing.assert_allclose(
            [one.distance, one.runner_up_distance], distances[order[:2]], rtol=1e-4
        )
        assert one.name == (one.nearest if one.distance <= threshold else None)
        assert one.path.startswith(one.nearest)
    assert {one.name for one in found} > {None}
    told = [*identification_report.format_identities(files, found)]
    assert sum("unknown" in line for line in told) == sum(o.name is None for o in found)

    report = identification.evaluate(gallery, x, names, threshold)
    known = np.array([name in gallery.names for name in names])
    right = np.array([one.nearest for one in found]) == names
    named = np.array([one.name is not None for one in found])
    assert (report["known"], report["unknown"]) == (24, 8)
    np.testing.assert_allclose(
        report["rate_at_rank"]["1"], 100 * right[known].mean(), rtol=1e-5
    )
    at = report["at_threshold"]
    np.testing.assert_allclose(at["fpir"], 100 * named[~known].mean())
    np.testing.assert_allclose(at["fnir"], 100 * (1 - (named & right)[known].mean()))
    # A rate of 0.1 is not shown by 8 unknown ones, and nothing is said of it.
    assert [one["fpir"] for one in report["at_fpir"]] in ([], [100.0])
    assert "identified at rank 1" in "\n".join(
        identification_report.format_evaluation(report)
    )


def test_an_image_of_the_gallery_is_not_taken_for_itself(index):
    gallery = Gallery.of(index)
    x, path = gallery.vectors[:1], gallery.paths[0]
    (itself,) = identification.identify(gallery, x, threshold=1.0)
    assert itself.distance < 1e-5
    assert itself.path == path
    (other,) = identification.identify(gallery, x, threshold=1.0, own=[path])
    assert other.distance > 1e-3
    assert other.path != path
    alone = dataclasses.replace(
        gallery, vectors=x, labels=gallery.labels[:1], paths=(path,)
    )
    (one,) = identification.identify(alone, x, threshold=1.0)
    assert (one.runner_up, one.runner_up_distance) == (None, None)
    with pytest.raises(ValueError, match="must have an image besides the probe"):
        identification.identify(alone, x, threshold=1.0, own=[path])
    (always,) = identification.identify(gallery, -x, threshold=float("inf"))
    assert always.name == always.nearest


def test_strangers_tell_the_rate_at_this_gallery(index, calibration):
    gallery = Gallery.of(index)
    strangers = Strangers.of(gallery, calibration)
    assert (len(strangers.distances), strangers.left_out) == (72, 0)
    d = np.linalg.norm(calibration.vectors[:, None] - gallery.vectors, axis=-1)
    np.testing.assert_allclose(strangers.distances, np.sort(d.min(axis=1)), rtol=1e-4)
    assert strangers.count_named(calibration.threshold) == (
        (d.min(axis=1) <= calibration.threshold).sum()
    )
    # The larger the gallery, the more.
    small = gallery
    for path in gallery.paths[:-4]:
        small = small.without(path)
    fewer = Strangers.of(small, calibration)
    threshold = float(np.median(strangers.distances))
    assert fewer.count_named(threshold) < strangers.count_named(threshold)
    for fpir in (0.14, 0.3, 0.9):
        at = strangers.threshold_at(fpir)
        assert strangers.count_named(at) == int(fpir * 72)
    with pytest.raises(TooFewPairsError, match=r"fpir 0\.1 requires 100 .*got 72"):
        strangers.threshold_at(0.1)
    with pytest.raises(ValueError, match="fpir must be between 0 and 1, got 0"):
        strangers.threshold_at(0.0)
    tied = Strangers(np.repeat([0.5, 1.0], 20), 0)
    assert tied.count_named(tied.threshold_at(0.3)) == 0
    assert tied.count_named(tied.threshold_at(0.7)) == 20


def test_the_known_are_no_strangers(index, calibration):
    gallery = Gallery.of(index)
    names = calibration.names.copy()
    names[:5] = gallery.names[0]
    vectors = calibration.vectors.copy()
    vectors[10] = gallery.vectors[3]
    changed = dataclasses.replace(calibration, names=names, vectors=vectors)
    strangers = Strangers.of(gallery, changed)
    assert (len(strangers.distances), strangers.left_out) == (66, 6)
    report = identification_report.make_gallery_report(gallery, 0.5, changed, strangers)
    assert "6 images of" in "\n".join(identification_report.format_gallery(report))
    all_known = dataclasses.replace(
        calibration, names=np.array([gallery.names[0]] * len(names))
    )
    strangers = Strangers.of(gallery, all_known)
    report = identification_report.make_gallery_report(
        gallery, 0.5, all_known, strangers
    )
    assert report["others"]["fpir"] is None
    assert "no other class was calibrated" in "\n".join(
        identification_report.format_gallery(report)
    )


def test_few_shot_classification_is_naming_without_a_threshold(root, index):
    gallery = Gallery.of(index, means=True)
    _, x, names = embedded(root / "probes")
    known = np.isin(names, gallery.names)
    found = identification.identify(gallery, x[known], threshold=float("inf"))
    right = np.mean([one.name for one in found] == np.array(names)[known])
    numbers = {name: number for number, name in enumerate(gallery.names)}
    references, labels = gallery.references
    expected = tj.retrieval.few_shot_accuracy(
        references,
        labels,
        x[known],
        np.array([numbers[n] for n in names if n in numbers]),
    )
    np.testing.assert_allclose(right, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["group0/kind0", "nobody"])
def test_probes_that_are_all_known_or_all_unknown(index, name):
    gallery = Gallery.of(index)
    x = np.repeat(gallery.vectors[:1], 12, axis=0)
    report = identification.evaluate(gallery, x, [name] * 12, 0.5)
    assert report["known"] + report["unknown"] == 12
    assert 0 in (report["known"], report["unknown"])
    json.dumps(report, allow_nan=False)
    assert [*identification_report.format_evaluation(report)]


def test_copies_in_the_gallery_are_said(index):
    gallery = Gallery.of(index)
    names = [gallery.names[label] for label in gallery.labels]
    report = identification.evaluate(gallery, gallery.vectors, names, 0.5)
    assert report["copies"] == len(gallery.paths)
    assert "are copies of images of the gallery" in "\n".join(
        identification_report.format_evaluation(report)
    )


def test_a_gallery_of_one_image_per_person_in_one_folder(root, tmp_path):
    files, _, names = embedded(root / "gallery")
    people = dict(zip(names[::3], files[::3]))
    known = tmp_path / "known"
    known.mkdir()
    for name, file in people.items():
        shutil.copy(file, known / f"{name.rpartition('/')[2]}.png")
    (known / "list.txt").write_text("no image")
    index = search.Index(known, tmp_path / "database", EMBEDDER)
    index.update()
    with pytest.raises(ValueError, match="one folder per class, but 6 images lie in"):
        Gallery.of(index)
    gallery = Gallery.of(index, flat=True)
    assert gallery.names == tuple(f"kind{k}" for k in range(6))
    assert gallery.notes == ("images lie in one folder: their names are classes",)
    # A probe of the gallery is compared with the others alone, which is printed.
    own = [f"kind{k}.png" for k in range(6)]
    found = identification.identify(gallery, gallery.vectors, threshold=np.inf, own=own)
    elsewhere = identification.identify(
        gallery, gallery.vectors, threshold=np.inf, own=["no/such.png", *[None] * 5]
    )
    for k, (alone, copy) in enumerate(zip(found, elsewhere)):
        assert alone.own == own[k]
        assert alone.name != f"kind{k}"
        assert (copy.own, copy.name, copy.distance) == (None, f"kind{k}", 0)
    probes = [known / name for name in own]
    left_out = "  (this image of the gallery is left out)"
    assert all(
        s.endswith(left_out)
        for s in identification_report.format_identities(probes, found)
    )
    assert not any(
        left_out in s
        for s in identification_report.format_identities(probes, elsewhere)
    )
    assert (
        identification_report.make_probe_reports(probes, found)[2]["own"] == "kind2.png"
    )
    # Probes in one folder have the names of the gallery, with or without a number.
    assert [
        *map(gallery.name_of_probe, ("kind1", "kind1_02", "kind1 (2)", "eve_2"))
    ] == [*["kind1"] * 3, "eve_2"]


@pytest.mark.slow
def test_verification_of_images_in_one_folder(root, tmp_path):
    files, _, names = embedded(root / "gallery")
    flat = tmp_path / "flat"
    flat.mkdir()
    numbers = [1 + names[:i].count(name) for i, name in enumerate(names)]
    for file, name, number in zip(files, names, numbers):
        short = name.rpartition("/")[2]
        shutil.copy(file, flat / f"{short}_{number:04d}{file.suffix}")
    ours = verification.evaluate(EMBEDDER, flat, far=0.2, replicates=10)
    others = verification.evaluate(EMBEDDER, root / "gallery", far=0.2, replicates=10)
    for key in ("images", "classes", "verification"):
        assert ours.report[key] == others.report[key]
    assert "their names are classes" in ours.report["notes"][0]
    pairs = tmp_path / "pairs.txt"
    pairs.write_text("2\nkind0 1 2\nkind1 2 3\nkind0 1 kind1 1\nkind2 1 kind3 1\n")
    given = verification.evaluate(EMBEDDER, flat, pairs_file=pairs, replicates=10)
    assert (len(given.pairs.same), len(given.pairs.different)) == (2, 2)
    for file in flat.glob("*_000[23].*"):
        file.unlink()
    with pytest.raises(
        ValueError, match=r"no pair of the same class.*ann_1\.png, ann_2"
    ):
        verification.evaluate(EMBEDDER, flat, replicates=10)
