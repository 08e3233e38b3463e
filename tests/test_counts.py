"""Printed lines with one thing, and with several."""

import pytest

from tripletjax.apps.clustering.report import format_report
from tripletjax.apps.identification.report import format_gallery
from tripletjax.apps.search.update import Changes
from tripletjax.learn.evaluation import note_on_seen_names, note_on_sizes
from tripletjax.learn.training.selection import note_of


def changes(images):
    return str(Changes(images, 0, 0, 0, 0, (), ()))


def gallery(n):
    report = {"classes": n, "images": n, "others": None, "threshold": None}
    return next(format_gallery(report))


def groups(n):
    report = {
        **dict.fromkeys(("images", "groups", "groups_of_several"), n),
        **dict.fromkeys(("single_images", "largest"), n),
        "threshold": 0.5,
        "origin": "",
    }
    return next(format_report(report))


@pytest.mark.parametrize(
    ("line", "one", "two"),
    [
        (
            changes,
            "1 image in the index (no change)",
            "2 images in the index (no change)",
        ),
        (gallery, "gallery: 1 class, 1 image", "gallery: 2 classes, 2 images"),
        (
            groups,
            "1 image in 1 group at threshold 0.5000; groups of several images: 1, "
            "the largest of 1; single images: 1",
            "2 images in 2 groups at threshold 0.5000; groups of several images: 2, "
            "the largest of 2; single images: 2",
        ),
        (
            lambda n: note_of(n, "class")[0].partition(", ")[0],
            "the last checkpoint is kept: validation has 1 class",
            "the last checkpoint is kept: validation has 2 classes",
        ),
        (
            lambda n: note_on_sizes([0, 0, *range(1, n + 1)]),
            "1 class has one image: the image is a negative only",
            "2 classes have one image: the images are negatives only",
        ),
        (
            lambda n: note_on_seen_names("ab"[:n], "abc")[0].partition(",")[0],
            "1 class has the name of a class that the run was trained on",
            "2 classes have names of classes that the run was trained on",
        ),
    ],
)
def test_nouns_agree_with_their_numbers(line, one, two):
    assert line(1) == one
    assert line(2) == two
