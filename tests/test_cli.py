"""The command, as its user types it."""

import csv
import dataclasses
import inspect
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import oracles
import pytest
from folders import assert_drawn, shapes, write_digits
from PIL import Image

import tripletjax as tj
from tripletjax import cli, learn
from tripletjax.apps import clustering, verification
from tripletjax.cli import compile_cache
from tripletjax.cli.main import build_parser
from tripletjax.cli.options import COMMANDS
from tripletjax.learn import evaluation
from tripletjax.learn.data.digits import digits
from tripletjax.learn.files import write_json

PARSERS = build_parser()._subparsers._group_actions[0].choices


@pytest.fixture(scope="module")
def trained(own_data_dir, tmp_path_factory):
    """A run of few steps, made by the command."""
    out = tmp_path_factory.mktemp("cli") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out.parent)
        assert cli.main(["train", "--steps", "4", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    return shapes(tmp_path_factory.mktemp("unseen"), kinds=4, each=5)


def test_it_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tripletjax", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in COMMANDS:
        assert name in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_options_have_hyphens_alone(name):
    command = PARSERS[name]
    options = [text for row in command._actions for text in row.option_strings]
    assert "--help" in options
    for option in options:
        assert re.fullmatch(r"--[a-z0-9]+(-[a-z0-9]+)*|-[a-z]", option), option


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_a_help_names_exist(name):
    known = {
        text
        for command in (name, "train", "verify")
        for row in PARSERS[command]._actions
        for text in row.option_strings
    }
    assert {*re.findall(r"--[\w-]+", PARSERS[name].format_help())} <= known


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    summary, _, _ = inspect.getdoc(COMMANDS[name]).partition("\n\n")
    assert " ".join(summary.split()) in " ".join(printed.split())
    assert any(text in printed for text in ("--out", "--port", "OUT."))
    for row in PARSERS[name]._actions:
        assert row.help, row.option_strings


WITHOUT_EXTRAS = """
import sys

class WithoutExtras:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"PIL", "flax", "optax", "tensorflow_datasets"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, WithoutExtras())
from tripletjax import cli
from tripletjax.cli.options import COMMANDS

for arguments in [*([name, "--help"] for name in COMMANDS), ["train"]]:
    try:
        status = cli.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    print(arguments, status)
"""


def test_help_needs_no_extra(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    for name in COMMANDS:
        assert f"{[name, '--help']} 0" in result.stdout
    assert "--backbone-training {frozen,top,all}" in result.stdout
    assert "['train'] 2" in result.stdout
    assert re.search(r"No module named '\w+': it needs pip install", result.stderr)


MINE = "mine --run r --data . --out a.csv"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "required: COMMAND"),
        ("fly", "invalid choice"),
        ("train --data nowhere", "tfds:NAME, got 'nowhere'"),
        ("train --out .", "not an empty directory"),
        ("train --steps 0", "--steps must be at least 1 without --backbone, got 0."),
        ("train --loss some", "invalid choice"),
        ("train --steps 1.5", "--steps must be a whole number, got '1.5'"),
        ("train --margin x", "--margin must be a number, got 'x'"),
        ("train --margin -1", "finite in float32 and at least 0, got -1.0."),
        ("train --margin nan", "--margin must be finite in float32 and at least 0"),
        ("train --margin -1e-3", "at least 0, got -0.001."),
        ("train --margin 1e39", "at least 0, got 1e+39."),
        (
            "train --loss arcface --margin 4",
            "--margin must be at most pi, as an angle, with --loss arcface, got 4.0.",
        ),
        ("train --data=", "--data must not be empty"),
        ("train --out=", "--out must not be empty"),
        ("train --classes 0", "--classes must be at least 2, got 0."),
        ("train --per-class 0", "--per-class must be at least 2, got 0."),
        ("train --size 8193", "--size must be 1 to 8192, got 8193."),
        (
            "train --rotation-classes 0",
            "--rotation-classes must be 1, 2, 4 or 8, got 0.",
        ),
        (
            f"train --seed {2**63}",
            f"--seed must be at least 0 and below 2**63, got {2**63}.",
        ),
        ("train --devices 0", "--devices must be all or at least 1, got 0."),
        ("train --triplets none.csv", "none.csv: no such file or directory"),
        (
            "verify --run r --data . --far 1",
            "--far must be above 0 and below 1, got 1.0.",
        ),
        (
            "identify --run r --gallery . precious --fpir 0",
            "--fpir must be above 0 and below 1, got 0.0.",
        ),
        (
            "search --run r --index . --within 2.1",
            "--within must be 0 to 2, as distances of unit vectors, got 2.1.",
        ),
        ("train --data digits --triplets a.csv", "--data cannot be combined with"),
        ("train --loss hard --triplets a.csv", "--loss cannot be combined with"),
        ("train --triplets-per-batch 4", "--triplets-per-batch requires --triplets"),
        ("train --augment some", "invalid choice"),
        ("train --resume", "--resume requires --out"),
        ("train --memory-warmup 0.2", "--memory-warmup requires --memory."),
        ("train --views 2", "--views requires --backbone, got 2."),
        ("evaluate --run r", "required: --data"),
        ("evaluate --run r --data .", "no trained model"),
        ("evaluate --run r --data none", "folder none does not exist"),
        (
            "evaluate --run r --data . --json precious",
            "precious exists and is not a tripletjax report",
        ),
        ("evaluate --run r --data . --out .", "not an empty directory"),
        ("search --run r", "required: --index"),
        ("search --run r --index .", "no trained model"),
        ("search --run r --index . --together", "--together requires"),
        (
            "search --run r --index . --json precious",
            "precious already exists; give another file",
        ),
        (
            "search --run r --index . --out a.png",
            "--out requires --query or --duplicates",
        ),
        (
            "search --run r --index . --query nowhere.png",
            "there is no image nowhere.png",
        ),
        (
            "search --run r --index . --query a.png --out a.jpg",
            "--out must be a .png file, got a.jpg",
        ),
        ("verify --run r", "give two images, or --data FOLDER"),
        ("verify --run r a --data .", "give two images, or --data"),
        ("verify --run r a", "images must be two, got 1"),
        ("verify --run r a b --far 0.1", "--far requires --data"),
        ("verify --run r a b", "no trained model"),
        (
            "verify --run r --data . --json precious",
            "precious exists and is not a tripletjax report",
        ),
        ("cluster --run r", "required: --index"),
        ("cluster --run r --index .", "no trained model"),
        ("cluster --run r --index . --out groups.png", "--out must be a .csv file"),
        (
            "cluster --run r --index .. --copy-to precious",
            "precious already exists; give another folder",
        ),
        (
            "cluster --run r --index . --copy-to a --link-to b",
            "--link-to cannot be combined with --copy-to.",
        ),
        ("cluster --run r --index . --threshold -1", "--threshold must be 0 to 2"),
        (
            "cluster --run r --index . --out a.csv --json a.png",
            "a.png must be one output alone; give another file.",
        ),
        (
            "identify --run r --gallery . precious --out a.png --json a.png",
            "a.png must be one output alone; give another file.",
        ),
        (
            "search --run r --index . --query precious --out a.png --json a.png",
            "a.png must be one output alone; give another file.",
        ),
        ("search --run r --index . --rerank", "requires --query"),
        (
            "evaluate --run r --data 'two\nlines'",
            r"evaluate: folder two\nlines does not exist.",
        ),
        ("mine --run r --data .", "required: --out"),
        (
            "mine --run r --data . --out a.txt",
            "--out must be a .csv file, got 'a.txt'.",
        ),
        ("mine --run r --data . --out a.csv", "no trained model"),
        (f"{MINE} --json precious", "precious already exists; give another file"),
        (f"{MINE} --json a.csv", "the report must be a file of its own, got a.csv"),
        (f"{MINE} --seed 1", "--seed requires --random."),
        (f"{MINE} --random", "--random requires --range-max."),
        (
            f"{MINE} --range-min 3 --range-max 3",
            "--range-max must be above --range-min, got 3 and 3.",
        ),
        (f"{MINE} --margin nan", "--margin must be finite in float32, got nan."),
        (f"{MINE} -k 0", "-k must be at least 1, got 0."),
        ("serve --run r", "required: --index"),
        ("serve --run r --index .", "no trained model"),
        ("export --run r", "required: --out"),
        ("export --run r --out a.onnx", "no trained model"),
        ("train --relevance some", "invalid choice"),
        (
            "train --relevance folders --triplets a.csv",
            "--relevance cannot be combined with --triplets",
        ),
        ("identify --run r a", "required: --gallery"),
        ("identify --run r --gallery .", "give images to name, or --data"),
        ("identify --run r --gallery . nowhere.png", "there is no image nowhere.png"),
        ("identify --run r --gallery . precious", "no trained model"),
        (
            "identify --run r --gallery . precious --closed --within 1",
            "--closed cannot be combined with --within.",
        ),
        (
            "identify --run r --gallery . --data . --out a.png",
            "--out requires images to name",
        ),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(
    arguments, words, tmp_path, monkeypatch, capsys
):
    (tmp_path / "precious").write_text("kept")
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(shlex.split(arguments))
    except SystemExit as stopped:
        status = stopped.code
    assert status == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
    assert (tmp_path / "precious").read_text() == "kept"


def test_without_a_name_runs_have_those_of_their_data(tmp_path, monkeypatch):
    from tripletjax.learn.runs import train

    places = []

    def interrupted(config, out, **options):
        places.append(out)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    monkeypatch.chdir(tmp_path)
    Path("runs", "unseen").mkdir(parents=True)
    for data in ("unseen", "digits"):
        assert cli.main(["train", "--data", data]) == 130
    assert places == [Path("runs", "unseen-2"), Path("runs", "digits")]


@pytest.mark.slow
def test_an_evaluation_tells_what_the_core_does(trained, unseen, tmp_path, capsys):
    out, file = tmp_path / "report", tmp_path / "more" / "report.json"
    command = ["evaluate", "--run", str(trained), "--data", str(unseen)]
    assert cli.main([*command, "--out", str(out), "--json", str(file)]) == 0
    told = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert report == json.loads((out / "report.json").read_text())
    for name in ("roc", "distances", "neighbors"):
        assert_drawn(out / f"{name}.png")

    files = sorted(unseen.glob("*/*/*"))
    labels = np.unique([file.parent for file in files], return_inverse=True)[1]
    assert (report["images"], report["classes"]) == (20, 4)
    x = np.asarray(learn.load_embedder(trained)(files), np.float64)
    expected = oracles.retrieval(x, labels, (1, 2, 4, 8))
    assert f"MAP@R{report['retrieval']['map_at_r']:27.2f} %" in told
    close = {"rtol": 1e-4, "atol": 1e-4}
    np.testing.assert_allclose(
        report["retrieval"]["map_at_r"], 100 * expected["map_at_r"], **close
    )
    recall = report["retrieval"]["recall_at_k"]
    for k, share in expected["recall_at_k"].items():
        np.testing.assert_allclose(recall[str(k)], 100 * share, **close)
    pairs = report["verification"]
    assert (pairs["positives"], pairs["negatives"]) == (40, 150)
    # Of 150 negatives a share of 0.1 % is less than one.
    assert [round(at["far"], 6) for at in pairs["at_far"]] == [10, 1]
    rows, columns = np.triu_indices(20, 1)
    distances = np.linalg.norm(x[rows] - x[columns], axis=1)
    metrics = tj.verification.evaluate_pairs(distances, labels[rows] == labels[columns])
    np.testing.assert_allclose(
        pairs["equal_error_rate"], 100 * float(metrics.equal_error_rate), **close
    )


@pytest.mark.slow
def test_what_an_evaluation_skips_and_finds_is_named(trained, unseen, tmp_path):
    folder = shapes(tmp_path / "more", kinds=2, each=3)
    (folder / "group0" / "kind0" / "broken.png").write_bytes(b"\x89PNG none")
    Image.new("L", (9, 9)).save(folder / "group0" / "kind0" / "blank.png")
    (folder / "notes.txt").write_text("of no class")
    same = folder / "group1" / "kind1" / "0.png"
    (same.parent / "copy.png").write_bytes(same.read_bytes())
    report = evaluation.evaluate(trained, folder)
    assert report["images"] == 7
    skipped = "\n".join(report["skipped"])
    for name in ("broken.png", "blank.png", "notes.txt"):
        assert name in skipped
    assert any("1 image is a copy" in note for note in report["notes"])
    assert "2 images are skipped" in report["notes"]
    assert "1 entry that is no image of a class is skipped" in report["notes"]
    with pytest.raises(ValueError, match="at least 2 folders of readable"):
        evaluation.evaluate(trained, folder / "group0")


@pytest.mark.slow
def test_an_evaluation_of_a_few_images(trained, tmp_path):
    """Their nine different pairs show no false accept rate of 10 %."""
    report = evaluation.evaluate(
        trained, shapes(tmp_path / "few", kinds=2, each=3), out=tmp_path / "out"
    )
    assert report["verification"]["at_far"] == []
    assert report["verification"]["negatives"] == 9


def test_histograms_count_every_pair_from_both_sides():
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels = np.arange(30) % 7
    same, different, rows = evaluation.histograms(x, labels)
    assert rows == 30
    alike = labels[:, None] == labels
    distances = np.linalg.norm(x[:, None] - x, axis=-1)
    apart = ~np.eye(30, dtype=bool)
    for counts, mask in ((same, alike & apart), (different, ~alike)):
        assert counts.sum() == mask.sum()
        expected = np.histogram(distances[mask], evaluation.STEPS, (0, 2))[0]
        assert np.abs(np.cumsum(counts - expected)).max() <= 1


@pytest.mark.slow
def test_verification_and_naming(trained, tmp_path, capsys):
    """As their users type it: a threshold first, then two images, then names."""
    people = shapes(tmp_path / "people", kinds=8, each=9)
    gallery = shapes(tmp_path / "gallery", kinds=6, each=2, seed=1)
    probes = shapes(tmp_path / "probes", kinds=8, each=2, seed=2)
    run = shutil.copytree(trained, tmp_path / "run")
    images = [str(file) for file in sorted((probes / "group1" / "kind1").iterdir())]
    verify = ["verify", "--run", str(run)]
    identify = ["identify", "--run", str(run), "--gallery", str(gallery)]

    assert cli.main([*verify, *images]) == 2
    assert "no threshold was chosen" in capsys.readouterr().err
    assert cli.main([*identify, *images]) == 2
    assert (
        "or --embedder. Or give --within DISTANCE, or --closed."
        in capsys.readouterr().err
    )
    assert cli.main([*verify, "--data", str(people), "--far", "1e-5"]) == 0
    output = capsys.readouterr().out
    assert "1,000,000 are needed" in output
    assert "stays in use" not in output
    assert not (run / "calibration").exists()
    shutil.rmtree(run / "verifications")

    assert cli.main([*verify, "--data", str(people)]) == 0
    told = capsys.readouterr().out
    report = json.loads((run / "verifications" / "people" / "report.json").read_text())
    threshold = report["calibration"]["threshold"]
    assert f"threshold {threshold:.4f}" in told
    assert report["verification"]["negatives"] == 2268
    # Once more: another directory, and the threshold before is kept.
    assert cli.main([*verify, "--data", str(people), "--far", "0.1"]) == 0
    assert "the earlier one is in calibration-before" in capsys.readouterr().out
    assert (run / "verifications" / "people-2" / "errors.png").exists()
    # Without a new threshold the one in use stays.
    assert cli.main([*verify, "--data", str(people), "--far", "1e-5"]) == 0
    assert f"The threshold in {run / 'calibration'} stays in use." in (
        capsys.readouterr().out
    )
    assert not (run / "calibration-before-2").exists()

    file = tmp_path / "two.json"
    assert cli.main([*verify, *images, "--json", str(file)]) == 0
    decision = json.loads(file.read_text())
    x = learn.load_embedder(run)(images)
    np.testing.assert_allclose(decision["distance"], np.linalg.norm(x[0] - x[1]), 1e-4)
    assert decision["calibration"]["far"] == 0.1
    word = "same" if decision["same"] else "different"
    assert capsys.readouterr().out.startswith(word)

    sheet, file = tmp_path / "more" / "names.png", tmp_path / "names.json"
    more = ["--out", str(sheet), "--json", str(file)]
    assert cli.main([*identify, *images, *more]) == 0
    told = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert "12 images in the index (12 added)" in told
    assert (report["classes"], report["images"]) == (6, 12)
    # By their names, images of six of the eight classes are those of the gallery.
    assert report["others"]["left_out"] == 54
    assert [one["query"] for one in report["probes"]] == images
    for one in report["probes"]:
        assert (one["name"] is None) == (one["distance"] > report["threshold"])
    assert_drawn(sheet)
    for options, words in (
        (["--closed"], "closed set: every probe is named after its nearest class"),
        (["--within", "0.01", "--means"], "threshold 0.0100"),
        (["--fpir", "0.6"], "false positives at this gallery"),
    ):
        assert cli.main([*identify, *images, *options]) == 0
        assert words in capsys.readouterr().out
    assert cli.main([*identify, "--data", str(probes), "--json", str(file)]) == 0
    assert "identified at rank 1" in capsys.readouterr().out
    report = json.loads(file.read_text())["evaluation"]
    assert (report["known"], report["unknown"]) == (12, 4)


@pytest.mark.slow
def test_groups_of_digits(trained, tmp_path, capsys):
    """As its users type it: a threshold by verify, then groups of other digits."""
    images, labels = digits()
    for folder, rows in (("people", range(1200, 1500)), ("index", range(1500, 1797))):
        for row in rows:
            file = tmp_path / folder / f"digit {labels[row]}" / f"{row}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[row, ..., 0]).save(file)
    run, folder = shutil.copytree(trained, tmp_path / "run"), tmp_path / "index"
    cluster = ["cluster", "--run", str(run), "--index", str(folder)]
    assert cli.main(cluster) == 2
    assert capsys.readouterr().err.endswith(
        "with the same --run or --embedder. Or give --threshold DISTANCE.\n"
    )
    assert (
        cli.main(["verify", "--run", str(run), "--data", str(tmp_path / "people")]) == 0
    )
    capsys.readouterr()

    table, file, links = (tmp_path / name for name in ("a.csv", "a.json", "links"))
    more = ["--out", str(table), "--json", str(file), "--link-to", str(links)]
    assert cli.main([*cluster, "--evaluate", *more]) == 0
    output = capsys.readouterr().out
    report = json.loads(file.read_text())
    assert "297 images in the index (297 added)" in output
    assert "%, on 300 images of tripletjax verify" in report["origin"]
    assert report["groups"] == len(report["paths"]) > 2
    with table.open(newline="") as opened:
        rows = {row["path"]: row for row in csv.DictReader(opened)}
    for number, paths in enumerate(report["paths"], start=1):
        assert {rows[path]["group"] for path in paths} == {str(number)}
        assert {rows[path]["size"] for path in paths} == {str(len(paths))}
    metrics = report["evaluation"]
    names = sorted(rows)
    expected = clustering.measure(
        np.array([int(name[6]) for name in names]),
        np.array([int(rows[name]["group"]) for name in names]),
    )
    np.testing.assert_allclose(metrics["bcubed_f"], 100 * expected.bcubed_f)
    assert (metrics["images"], metrics["classes"]) == (297, 10)
    # Even a few steps of training tell most digits apart.
    assert metrics["bcubed_f"] > 40
    assert f"BCubed F              {metrics['bcubed_f']:.2f} %" in output
    assert_drawn(table.with_suffix(".png"))
    assert sum(one.is_symlink() for one in links.rglob("*.png")) == 297

    # The index is known; the files that exist are not written over.
    assert cli.main([*cluster, "--threshold", "0", "--json", str(file)]) == 0
    assert "297 images in the index (no change)" in capsys.readouterr().out
    assert json.loads(file.read_text())["origin"] == "threshold of --threshold"
    for option, path in (("--out", table), ("--copy-to", links)):
        assert cli.main([*cluster, option, str(path)]) == 2
        assert f"{path.name} already exists" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    cluster[-1] = str(tmp_path / "empty")
    assert cli.main(cluster) == 2
    assert "at least 2 readable images to group, got 0" in capsys.readouterr().err


@pytest.mark.slow
def test_reranked_hits_and_metrics(trained, unseen, tmp_path, capsys):
    query = sorted((unseen / "group1" / "kind1").iterdir())[0]
    file = tmp_path / "hits.json"
    command = ["search", "--run", str(trained), "--index", str(unseen), "-k", "5"]
    more = ["--query", str(query), "--rerank", "--json", str(file)]
    assert cli.main([*command, *more]) == 0
    assert "  re-ranked " in capsys.readouterr().out
    files = sorted(unseen.rglob("*.*"))
    x, own = learn.load_embedder(trained)(files), files.index(query)
    others = np.delete(x, own, axis=0)
    distances, rows = tj.retrieval.k_reciprocal_distances(
        x[own : own + 1], others, k=19
    )
    left = [str(one.relative_to(unseen)) for one in files if one != query]
    hits = json.loads(file.read_text())["queries"][0]["hits"]
    assert [hit["path"] for hit in hits] == [left[row] for row in rows[0][:5]]
    for hit, distance in zip(hits, distances[0]):
        np.testing.assert_allclose(hit["reranked_distance"], distance, 1e-4)
        np.testing.assert_allclose(
            hit["distance"],
            np.linalg.norm(x[own] - others[left.index(hit["path"])]),
            1e-3,
        )

    report = tmp_path / "report.json"
    evaluate = ["evaluate", "--run", str(trained), "--data", str(unseen)]
    evaluate += ["--out", str(tmp_path / "out"), "--rerank", "--json", str(report)]
    assert cli.main(evaluate) == 0
    output = capsys.readouterr().out
    assert "20 queries, and with the 19 nearest re-ranked" in output
    metrics = json.loads(report.read_text())
    line = (
        f"  {'MAP@R':<24}{metrics['retrieval']['map_at_r']:>8.2f} %"
        f"{metrics['reranked']['map_at_r']:>8.2f} %"
    )
    assert line in output.splitlines()


def test_metrics_of_ranks_are_those_of_the_core():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 12, 60)
    labels[0] = 99
    x = draw.normal(size=(60, 4)).astype(np.float32)
    _, nearest = tj.retrieval.nearest_neighbors(x, x, 30, positions=np.arange(60))
    metrics = evaluation.metrics_of_ranks(labels, np.asarray(nearest))
    expected = evaluation.retrieval(x, labels)
    for name in ("map_at_r", "r_precision", "queries"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    for k, value in expected["recall_at_k"].items():
        np.testing.assert_allclose(metrics["recall_at_k"][k], value, rtol=1e-5)
    few = evaluation.metrics_of_ranks(labels, np.asarray(nearest)[:, :2])
    assert (few["map_at_r"], few["r_precision"]) == (None, None)
    assert few["recall_at_k"]["1"] == metrics["recall_at_k"]["1"]
    alone = evaluation.metrics_of_ranks(np.arange(60), np.asarray(nearest))
    assert (alone["queries"], alone["map_at_r"]) == (0, None)
    assert {*alone["recall_at_k"].values()} == {None}


@pytest.mark.slow
def test_a_threshold_is_not_of_classes_that_were_trained_on(trained, tmp_path):
    people = shapes(tmp_path / "people", kinds=8, each=9)
    embedder = learn.load_embedder(trained)
    made = embedder.record
    names = tuple(f"group{kind % 2}/kind{kind}" for kind in range(8))

    def of_run(seen, data):
        requested = dataclasses.replace(made.requested, data=str(data))
        record = dataclasses.replace(
            made, requested=requested, label_names=names, seen_names=seen
        )
        embedder_of_run = dataclasses.replace(embedder, record=record)
        return verification.evaluate(embedder_of_run, people, replicates=10).report

    report = of_run(names[:3], people)
    assert report["classes"] == 5
    assert "3 classes of the folder are left out" in " ".join(report["notes"])
    with pytest.raises(ValueError, match="--split classes, which holds some out"):
        of_run(names, people)
    report = of_run(names[:3], tmp_path)
    assert report["classes"] == 8
    assert "3 classes have names of classes" in " ".join(report["notes"])


@pytest.mark.slow
def test_mined_triplets_are_trained_on(trained, tmp_path, capsys):
    folder = tmp_path / "digits"
    (wrong,) = write_digits(folder, per_class=20, swapped={(0, 1)})
    out = tmp_path / "mined" / "triplets.csv"
    mine = ["mine", "--run", str(trained), "--data", str(folder), "--out", str(out)]
    assert cli.main([*mine, "-k", "2", "--margin", "0", "--skip-label-errors"]) == 0
    output = capsys.readouterr().out
    names = (
        "triplets.csv",
        "triplets.json",
        "triplets_label_errors.csv",
        "triplets_label_errors.png",
    )
    assert {path.name for path in out.parent.iterdir()} == {*names}
    for name in names:
        assert f"written: {out.parent / name}" in output
    report = json.loads((out.parent / "triplets.json").read_text())
    assert f"{report['triplets']:,} triplets of {report['anchors']:,} anchors" in output
    assert report["images"] == 200
    assert report["distances"]["nearer_negatives"] == 0
    classes = {folder / e["path"]: e["nearest_class"] for e in report["label_errors"]}
    assert classes[wrong] == "0"
    assert len(classes) < 10
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    assert cli.main(mine) == 2
    assert f"{out} already exists; give another file." in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in out.parent.iterdir()}

    run = tmp_path / "run"
    train = ["train", "--triplets", str(out), "--steps", "2", "--out", str(run)]
    assert cli.main(train) == 0
    summary = json.loads((run / "summary.json").read_text())
    counts = summary["counts"]
    assert counts.pop("left_out") == counts.pop("skipped") == 0
    assert sum(counts.values()) == report["triplets"]


def test_interrupts_exit_130(monkeypatch, capsys, tmp_path):
    from tripletjax.learn.runs import train

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run", interrupted)
    assert cli.main(["train", "--out", str(tmp_path / "run")]) == 130
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    folder = Path(tmp_path)
    arguments = ["--run", str(folder), "--data", str(folder)]
    assert cli.main(["evaluate", *arguments]) == 130


def test_an_interrupt_that_python_drops_comes_again(monkeypatch, capsys, tmp_path):
    class Dropped:
        def __del__(self):
            raise KeyboardInterrupt

    def drop(*_, **__):
        Dropped()
        for _ in range(1000):
            time.sleep(0.001)

    monkeypatch.setattr(evaluation, "evaluate", drop)
    arguments = ["evaluate", "--run", str(tmp_path), "--data", str(tmp_path)]
    assert cli.main(arguments) == 130
    assert capsys.readouterr().err.split() == ["tripletjax", "evaluate:", "stopped."]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError("Unable to allocate 9 GiB"), "not enough memory: Unable to"),
        (
            jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.\nMore"),
            "not enough memory: Out of memory.",
        ),
        (OSError(28, "No space left", "a.png"), "a.png: no space left"),
        (ValueError("json + data must be 3"), "--json + --data must be 3"),
        (ValueError("data are few"), "evaluate: data are few"),
        (ValueError("data must be more"), "evaluate: --data must be more"),
    ],
)
def test_errors_of_the_library_are_one_line(error, words, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(evaluation, "evaluate", fail)
    assert cli.main(["evaluate", "--run", "r", "--data", "."]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tripletjax evaluate: ")
    assert words in line


@pytest.mark.slow
def test_a_search_shows_what_the_index_finds(trained, unseen, tmp_path, capsys):
    queries = sorted((unseen / "group1" / "kind1").iterdir())[:2]
    sheet, file = tmp_path / "more" / "hits.png", tmp_path / "hits.json"
    command = ["search", "--run", str(trained), "--index", str(unseen)]
    # Other tests have an index of the folder in the run.
    command += ["--database", str(tmp_path / "index")]
    more = ["-k", "3", "--out", str(sheet), "--json", str(file)]
    assert cli.main([*command, "--query", *map(str, queries), *more]) == 0
    told = capsys.readouterr().out
    assert "20 images in the index (20 added)" in told
    report = json.loads(file.read_text())
    embed = learn.load_embedder(trained)
    files = sorted(unseen.rglob("*.*"))
    x = embed(files)
    places = [files.index(query) for query in queries]
    distances, nearest = tj.retrieval.nearest_neighbors(
        x[np.array(places)], x, 3, positions=np.array(places)
    )
    for found, query, near, d in zip(report["queries"], queries, nearest, distances):
        assert found["query"] == [str(query)]
        paths = [str(files[i].relative_to(unseen)) for i in near]
        assert [hit["path"] for hit in found["hits"]] == paths
        np.testing.assert_allclose([hit["distance"] for hit in found["hits"]], d, 1e-4)
        for path in paths:
            assert path in told
    assert_drawn(sheet)
    # What is there is not written over.
    assert cli.main([*command, "--query", str(queries[0]), "--out", str(sheet)]) == 2
    capsys.readouterr()
    # Of images that are the same, and of another state of the run.
    table = tmp_path / "groups.csv"
    copy = shutil.copy(queries[0], queries[0].with_name("copy.png"))
    try:
        assert cli.main([*command, "--duplicates", "--within", "0"]) == 0
        assert "1 group of 2 images within 0" in capsys.readouterr().out
        assert cli.main([*command, "--duplicates", "--out", str(table)]) == 0
        assert "copy.png" in table.read_text()
        assert cli.main(command) == 0
        assert "21 images in the index (no change)" in capsys.readouterr().out
    finally:
        Path(copy).unlink()
    assert cli.main([*command, "--query", str(file)]) == 2
    assert "hits.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("skipped", "entries", "lines"),
    [
        (
            {"unreadable": 1, "blank": 1, "in several classes": 2},
            {},
            "4 images are left out (unreadable: 1, blank: 1, in several classes: 2).\n"
            "config.json names each entry with its reason.\n",
        ),
        (
            {"blank": 1},
            {"folders without images": 2},
            "1 image is left out (blank: 1).\n"
            "Other entries that are left out: folders without images: 2.\n"
            "config.json names each entry with its reason.\n",
        ),
        ({}, {}, "parameters; images: 8 train.\nRun directory: "),
    ],
)
def test_skipped_images_are_counted_by_their_reason(
    skipped, entries, lines, tmp_path, monkeypatch, capsys
):
    def run(config, out, **options):
        counts = {"train": 8, "skipped": sum(skipped.values())}
        summary = {"counts": counts, "skipped": skipped, "parameters": 5}
        summary["skipped_entries"] = entries
        out.mkdir()
        write_json(out / "summary.json", summary)
        return {"trained": {}}

    monkeypatch.setattr("tripletjax.learn.runs.train.run", run)
    assert cli.main(["train", "--out", str(tmp_path / "run")]) == 0
    assert lines in capsys.readouterr().out


# Output.


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_that_the_output_cannot_encode_are_replaced(
    monkeypatch, tmp_path, encoding
):
    report = {
        "images": 2,
        "classes": 2,
        "notes": ["a class \u0401\u043b\u043a\u0430", "a file \udcff"],
        "retrieval": dict.fromkeys(
            ("queries", "map_at_r", "r_precision", "mean_average_precision"), 1.0
        )
        | {"recall_at_k": {}, "queries": 2},
        "verification": {
            "equal_error_rate": 1.0,
            "area_under_roc": 1.0,
            "at_far": [],
            "positives": 1,
            "negatives": 1,
        },
        "collapse": {"mean_distance": 1.0, "distance_std": 1.0, "effective_rank": 1.0},
    }
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: report)
    printed = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", printed)
    folder = tmp_path / "\ub618\ubc29"
    arguments = ["--run", str(tmp_path), "--data", str(folder)]
    assert cli.main(["evaluate", *arguments]) == 0
    printed.flush()
    lines = printed.buffer.getvalue().decode(encoding).splitlines()
    shown = folder.name if encoding == "utf-8" else "??"
    assert lines[0].endswith(shown)
    assert lines[1].endswith(
        "class ????" if encoding != "utf-8" else "\u043b\u043a\u0430"
    )
    assert lines[2].endswith("file ?")
    # The stream is the caller's.
    assert printed.errors == "strict"


@pytest.mark.slow
def test_files_are_written_before_lines_are_printed(trained, tmp_path, monkeypatch):
    folder = shapes(tmp_path / "\u0401\u043b\u043a\u0430", kinds=2, each=3)
    query = str(folder / "group0" / "kind0" / "0.png")
    gallery = ["identify", "--run", str(trained), "--gallery", str(folder), "--closed"]
    search = ["search", "--run", str(trained), "--index", str(folder)]

    class Closed(io.StringIO):
        """An output that ends at the first result, as that of ``| head``."""

        def write(self, text):
            if "0.png" in text:
                raise BrokenPipeError("closed")
            return len(text)

    monkeypatch.setattr(sys, "stdout", Closed())
    for number, command in enumerate(
        (
            [*search, "--query", query],
            [*search, "--duplicates", "--within", "2"],
            [*gallery, query],
        )
    ):
        file = tmp_path / f"{number}.json"
        options = ["--json", str(file), "--database", str(tmp_path / "db")]
        assert cli.main([*command, *options]) == 141
        assert query.rpartition("/")[2] in file.read_text()


# Compiled programs.


@pytest.fixture
def no_compile_cache(monkeypatch):
    """JAX without a cache, as users have it; afterwards with that of the tests."""
    names = [
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    ]
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], None)
    monkeypatch.delenv(compile_cache.VARIABLE)
    with warnings.catch_warnings():
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_compiled_programs_lie_in_the_users_cache_folder(
    no_compile_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = compile_cache.keep_programs()
    assert folder.parent == tmp_path / "cache" / "tripletjax"
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_compilation_cache_max_size == compile_cache.MAX_SIZE
    # Settings of JAX come first.
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert compile_cache.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


def test_the_folder_of_compiled_programs_is_chosen_or_there_is_none(
    no_compile_cache, tmp_path, monkeypatch
):
    for off in ("off", "0", str(tmp_path / "file" / "cache")):
        (tmp_path / "file").write_text("no folder")
        monkeypatch.setenv(compile_cache.VARIABLE, off)
        assert compile_cache.keep_programs() is None
        assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path / "named"))
    assert compile_cache.keep_programs().parent == tmp_path / "named"


def test_programs_that_a_killed_process_left_half_written_are_removed(
    no_compile_cache, tmp_path, monkeypatch
):
    monkeypatch.setenv(compile_cache.VARIABLE, str(tmp_path))
    folder = compile_cache.keep_programs()
    jax.config.update("jax_compilation_cache_dir", None)
    for name in ("whole-cache", "whole-atime", "torn-cache", "new-cache"):
        (folder / name).write_bytes(b"x")
    os.utime(folder / "torn-cache", (0, 0))
    os.utime(folder / "whole-cache", (0, 0))
    compile_cache.keep_programs()
    assert sorted(file.name for file in folder.iterdir()) == [
        "new-cache",
        "whole-atime",
        "whole-cache",
    ]


@pytest.mark.slow
def test_a_second_command_compiles_nothing_again(trained, unseen, tmp_path):
    query = next(unseen.rglob("*.png"))
    # Programs that a fast machine compiles in less time are kept, too.
    code = "import sys; from tripletjax.cli import compile_cache, main;"
    code += "compile_cache.MIN_TIME = 0; sys.exit(main())"
    command = [sys.executable, "-W", "error", "-c", code, "search"]
    command += ["--run", str(trained), "--index", str(unseen), "--query", str(query)]
    drop = "JAX_COMPILATION_CACHE_DIR", compile_cache.VARIABLE
    env = {k: v for k, v in os.environ.items() if k not in drop}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_EXPLAIN_CACHE_MISSES": "1"}

    def programs():
        for name in ("one", "two"):
            done = subprocess.run(
                [*command, "--database", str(tmp_path / name)],
                env=env,
                capture_output=True,
                text=True,
                check=True,
            )
            yield sorted(path.name for path in (tmp_path / "cache").rglob("*-cache"))
            missed = "COMPILATION CACHE MISS for 'jit__embed'" in done.stderr
            assert missed == (name == "one"), done.stderr

    first, second = programs()
    assert any(name.startswith("jit__embed") for name in first)
    assert second == first
