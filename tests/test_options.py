"""Options declared as fields: their rules, requests for runs, and records of runs."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from plans import class_batches, make_plan

from tripletjax import learn
from tripletjax.cli import train
from tripletjax.cli.main import build_parser
from tripletjax.cli.options import Train
from tripletjax.learn.data.augment import Augment
from tripletjax.learn.data.sources import parse_source
from tripletjax.learn.runs import defaults, options, plan, preparation, record

CHECKED = [
    (field.name, declared)
    for field, declared in options.options_of(learn.Config)
    if declared.choices is not None or declared.rule is not None
]


def test_errors_name_options_as_their_reader_writes_them():
    error = options.OptionError("{per_class} requires {k}, got {} and {a b}.")
    assert str(error) == "per_class requires k, got {} and {a b}."
    assert error.as_typed == "--per-class requires -k, got {} and {a b}."


@pytest.mark.parametrize(("name", "declared"), CHECKED, ids=[n for n, _ in CHECKED])
def test_every_option_checks_its_own_value(name, declared):
    wrong = "some" if declared.choices is not None else -1
    if name == "box":
        wrong = 0.5, 0, 0.2, 1
    with pytest.raises(options.OptionError, match=f"^{name} must be .*, got "):
        learn.Config(**{name: wrong})


def test_every_option_of_training_is_declared_and_documented():
    command = build_parser()._subparsers._group_actions[0].choices["train"]
    rows = {row.dest: row for row in command._actions}
    for field in dataclasses.fields(learn.Config):
        declared = field.metadata["option"]
        assert (field.name in rows) == (
            declared.in_command or field.name == "augment"
        ), field.name
        assert f"    {field.name}: " in learn.Config.__doc__
        if declared.in_command:
            assert rows[field.name].help == options.help_of(field)


# Requests.


def request(given, *, out=None, resume=False, augment=None):
    return preparation.make_request(given, augment=augment, out=out, resume=resume)


def test_a_request_has_the_given_options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, out = request({"steps": 3, "memory": 4, "memory_warmup": 0.2})
    assert config == learn.Config(steps=3, memory=4, memory_warmup=0.2)
    assert out == Path("runs", "digits")
    assert request({"triplets": "some/chosen.csv"})[1] == Path("runs", "chosen")
    assert request({"data": "tfds:a:test"})[1] == Path("runs", "tfds-a-test")
    assert request({}, out=tmp_path)[1] == tmp_path


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("photos", {"kind": "photos"}),
        ("characters", {"kind": "characters"}),
        ("none", {"augment": Augment()}),
        ("more", {"augment": defaults.SCARCE_CHARACTERS}),
    ],
)
def test_words_for_augmentation(word, expected):
    assert request({}, augment=word)[0] == learn.Config(**expected)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"relevance": "folders", "triplets": "a"}, "relevance cannot be combined"),
        ({"rounds": 1, "triplets": "a"}, "rounds cannot be combined with triplets"),
        ({"triplets_per_batch": 2}, "triplets_per_batch requires triplets"),
        ({"memory_warmup": 0.2}, "memory_warmup requires memory"),
        ({"steps": 0}, "steps must be at least 1 without backbone, got 0"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
    ],
)
def test_wrong_requests(given, words):
    with pytest.raises(options.OptionError, match=words):
        request(given)


def written(folder, config, **changes):
    """The record of a run in a folder."""
    batches = plan.TripletBatchPlan(triplets_per_batch=2)
    made = make_plan(**{"batches": batches} | changes)
    images = record.ImageRecord(
        shape=(8, 8, 1), white=255.0, background="white", mean=(0.5,), std=(0.25,)
    )
    told = record.RunRecord(
        requested=config,
        plan=made,
        images=images,
        data_key="key",
        label_names=("a", "b"),
        seen_names=("a",),
        skipped=(),
        notes=("note",),
    )
    folder.mkdir(exist_ok=True)
    told.write(folder)
    return told


def test_a_resumed_run_has_its_own_options_and_the_given_ones(tmp_path):
    run = tmp_path / "run"
    earlier = learn.Config(margin=0.3, memory=8, box=(0.0, 0.0, 0.5, 1.0))
    written(run, earlier)
    config, out = request({"steps": 9}, out=run, resume=True)
    assert (config, out) == (dataclasses.replace(earlier, steps=9), run)
    assert request({"memory_warmup": 0.5}, out=run, resume=True)[0].memory == 8
    # Without resuming, what lies there plays no part.
    assert request({"steps": 9}, out=run)[0] == learn.Config(steps=9)
    written(run, learn.Config(triplets="a.csv"))
    with pytest.raises(options.OptionError, match="classes cannot be combined"):
        request({"classes": 2}, out=run, resume=True)


# Records.


def test_records_are_read_back_as_they_were(tmp_path):
    backbone = plan.BackbonePlan(
        family="resnet",
        options={"blocks": (1, 2), "bottleneck": False},
        training="top",
        hidden=0,
        views=1,
        digest=None,
        multiple=1,
    )
    batches = class_batches(loss="hard", rounds=2)
    config = learn.Config(augment=Augment(flip=True), channels=(8, 16), size=9)
    for number, changes in enumerate(({}, {"backbone": backbone, "batches": batches})):
        told = written(tmp_path / str(number), config, **changes)
        assert record.RunRecord.read(tmp_path / str(number)) == told


@pytest.mark.parametrize(
    "change",
    [
        lambda values: None,
        lambda values: [values],
        lambda values: {"plan": values["plan"]},
        lambda values: values | {"plan": None},
        lambda values: values | {"plan": values["plan"] | {"batches": {"classes": 2}}},
        lambda values: values | {"requested": values["requested"] | {"new": 1}},
        lambda values: values | {"requested": values["requested"] | {"steps": 0}},
    ],
)
def test_other_records_are_refused_in_a_sentence(change, tmp_path):
    written(tmp_path, learn.Config())
    file = tmp_path / record.FILE
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match="not the record of a run of this version"):
        record.RunRecord.read(tmp_path)


# Sources.


def test_sources_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("photos.v2")
    names = ["digits", "tfds:mnist:test", "photos.v2", Path("photos.v2"), "none", "/"]
    sources = [parse_source(name) for name in names]
    folder = str(tmp_path / "photos.v2")
    assert [source.name for source in sources] == [
        *("digits", "tfds:mnist:test", folder, folder, "none", "/")
    ]
    assert [source.label for source in sources] == [
        *("digits", "tfds-mnist-test", "photos.v2", "photos.v2", "none", "data")
    ]
    assert [source.is_digits for source in sources] == [True] + [False] * 5
    assert [source.in_tfds for source in sources] == [False, True] + [False] * 4


# Processes.


def test_options_other_than_those_of_process_0():
    class Second:
        """A process whose first one was given a step number and the same seed."""

        def of_first(self, make):
            return {"steps": 3, "seed": 1, "augment": None, "resume": False}

    values = vars(build_parser().parse_args(["train", "--seed", "1"]))
    given = Train.of({**values, "augment": "more"})
    del given.requested["command"]
    with pytest.raises(options.OptionError) as raised:
        train._request(given, Second())
    assert raised.value.as_typed.endswith("got others for --augment, --steps.")
