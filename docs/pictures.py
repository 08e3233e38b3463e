"""The pictures of the applications in the README and these pages.

    tripletjax train --out DIGITS
    tripletjax train --data THREE --out RUN
    python docs/pictures.py --digits DIGITS --run RUN --unseen TWO

THREE and TWO are folders of alphabets of Omniglot: Greek, Katakana and Latin for
training, Sanskrit and Tagalog for the pictures. With `--digits` alone, only the
pictures of the digits are copied.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from tripletjax.apps import clustering, identification, mining, search, verification
from tripletjax.apps.clustering import report as clustering_report
from tripletjax.apps.embedders import embedder_of, vectors_of
from tripletjax.apps.identification import report as identification_report
from tripletjax.apps.images import load_image
from tripletjax.apps.mining import report as mining_report
from tripletjax.apps.search import report as search_report
from tripletjax.apps.verification import report as verification_report
from tripletjax.learn.data.class_folders import find_classes
from tripletjax.learn.embedder import ImageEmbedder

# Every third class is unknown to the gallery; the others have three images there.
UNKNOWN, KNOWN = 3, 3
QUERIES = 4
# Images in the folder of another class, of which the picture has some.
MOVED, PICTURED = 6, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--unseen", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images")
    arguments = parser.parse_args()
    if arguments.digits is not None:
        copy_curves(arguments.digits, arguments.out)
    if arguments.run is not None:
        draw_applications(arguments.run, arguments.unseen, arguments.out)


def copy_curves(run: Path, out: Path) -> None:
    """Copy the curves and the neighbours of the run on digits."""
    shutil.copy(run / "training.png", out / "training_curves.png")
    shutil.copy(run / "neighbors.png", out / "neighbors.png")


def draw_applications(run: Path, unseen: Path, out: Path) -> None:
    """Draw search, verification and identification of the run on unseen characters."""
    embedder = embedder_of(run)
    found = find_classes(unseen)
    classes = {}
    for file, name in zip(found.files, found.classes):
        classes.setdefault(name, []).append(file)
    every = len(classes) // QUERIES

    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        index = search.Index(unseen, root / "index", embedder)
        index.update(progress=True)
        queries = [files[0] for files in [*classes.values()][::every][:QUERIES]]
        hits = search_report.search_files(index, queries, k=5)
        search_report.draw_hits(index, hits, out / "search.png")

        draw_label_errors(embedder, classes, root / "moved", out / "label_errors.png")

        measured = verification.evaluate(embedder, unseen, progress=True)
        for line in verification_report.format_report(measured.report):
            print(line)
        verification_report.draw(measured, root)
        for name in ("distances", "errors"):
            shutil.copy(root / f"{name}.png", out / f"verify_{name}.png")

        probes = []
        for number, (name, files) in enumerate(sorted(classes.items())):
            if number % UNKNOWN != UNKNOWN - 1:
                place = root / "gallery" / name
                place.mkdir(parents=True)
                for file in files[:KNOWN]:
                    shutil.copy(file, place)
            if number % (every // 2) == UNKNOWN - 2:
                probes.append(files[KNOWN])
        gallery_index = search.Index(root / "gallery", root / "index", embedder)
        gallery_index.update()
        gallery = identification.Gallery.of(gallery_index)
        x = vectors_of(embedder, [load_image(file) for file in probes])
        assert measured.calibration is not None
        calibration = measured.calibration
        chosen = clustering.choose_threshold(calibration)
        groups = clustering.group_images(index, chosen.threshold)
        clustering_report.draw(index, groups, out / "groups.png")
        threshold = calibration.threshold
        strangers = identification.Strangers.of(gallery, calibration)
        report = identification_report.make_gallery_report(
            gallery, threshold, calibration, strangers
        )
        for line in identification_report.format_gallery(report):
            print(line)
        named = identification.identify(gallery, x, threshold=threshold)
        for line in identification_report.format_identities(probes, named):
            print(line)
        identification_report.draw(gallery_index, probes, named, out / "identify.png")


def draw_label_errors(
    embedder: ImageEmbedder, classes: dict[str, list[Path]], folder: Path, out: Path
) -> None:
    """Copy the images to a folder, some to a wrong class, and draw likely errors."""
    names, wrong = sorted(classes), set()
    for number, name in enumerate(names):
        for index, file in enumerate(classes[name]):
            move = index == 0 and number % (len(names) // MOVED) == 0
            place = folder / (names[number - len(names) // 2] if move else name)
            place.mkdir(parents=True, exist_ok=True)
            # Drawings of different characters may have the same name.
            copy = place / (f"{Path(name).name}_{file.name}" if move else file.name)
            shutil.copy(file, copy)
            wrong |= {copy} if move else set()
    mined = mining.mine(embedder, folder)
    listed = [mined.images.files[index] for index in mined.label_errors.images]
    print(
        f"{len(wrong)} images moved to a wrong class, {len(wrong & {*listed})} of them "
        f"among {len(listed)} likely label errors"
    )
    mining_report.draw(mined, out, most=PICTURED)


if __name__ == "__main__":
    main()
