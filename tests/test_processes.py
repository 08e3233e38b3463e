"""Meshes over several processes give what one device gives."""

import functools
import json
import os
import signal
import subprocess
import sys
import time

import folders
import jax
import numpy as np
import processes
import pytest
from PIL import Image
from processes import TESTS
from programs import quickly

from tripletjax import cli

pytestmark = pytest.mark.slow


@pytest.mark.full
def test_gradients_of_large_parts():
    """Between processes, reduce-scatter of jax 0.10.2 is wrong for parts of 8 MiB."""
    told = processes.run(
        """
        import functools
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from tripletjax._pairwise.mesh import gather_rows

        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        part = np.zeros((49152, 128), np.float32)  # 24 MiB

        @jax.jit
        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
        )
        def gradient(x, weight):
            def weighted(x):
                own = jax.lax.axis_index("data") + 1
                return jax.numpy.sum(gather_rows(x, "data", 0) * own * weight)

            return jax.grad(weighted)(x)

        x = jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), part)
        for k in range(1, 26):
            got = np.asarray(gradient(x, float(k)).addressable_data(0))
            np.testing.assert_array_equal(got, 3 * k)
        print("right")
        """,
        processes=2,
        as_users_compile=True,
    )
    assert told == [["right"]] * 2


@pytest.mark.parametrize(
    ("count", "devices", "kind", "names"),
    [
        (2, 2, "Auto", ("hard", "all")),
        pytest.param(*(4, 1, "Explicit", ("semi_hard",)), marks=pytest.mark.full),
    ],
)
def test_losses_over_processes(count, devices, kind, names):
    told = processes.run(
        """
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        import tripletjax as tj

        random = np.random.default_rng(0)
        x = random.normal(size=(64, 16)).astype(np.float32)
        labels = random.integers(0, 9, 64).astype(np.int32)
        where = np.arange(64) > 20  # none is real on the first device
        mesh = jax.make_mesh(
            (jax.device_count(),), ("data",), axis_types=(getattr(AxisType, kind),)
        )
        rows = NamedSharding(mesh, P("data"))
        own = len(x) // jax.process_count()
        part = slice(jax.process_index() * own, (jax.process_index() + 1) * own)
        put = lambda a: jax.make_array_from_process_local_data(rows, a[part])
        for name in names:
            loss = getattr(tj.blockwise, f"batch_{name}_loss")
            options = {"margin": 0.3, "axis_name": "data"}
            of = lambda x, y, w: loss(x, y, where=w, **options)
            with jax.set_mesh(mesh):
                step = jax.jit(jax.value_and_grad(of))
                got = step(put(x), put(labels), put(where))
            alone = lambda x: loss(x, labels, where=where, margin=0.3)
            value, gradient = jax.value_and_grad(alone)(x)
            np.testing.assert_allclose(got[0], value, rtol=1e-5)
            for shard in got[1].addressable_shards:
                np.testing.assert_allclose(shard.data, gradient[shard.index], atol=1e-6)
        print("right")
        """,
        processes=count,
        devices=devices,
        given=f"kind, names = {kind!r}, {names}",
    )
    assert told == [["right"]] * count


@pytest.mark.full
def test_the_example_on_processes():
    """Two processes print what one does with as many devices."""
    example = TESTS.parent / "examples" / "mesh.py"
    command = [sys.executable, "-W", "error", example, "--steps", "30"]
    over = ["--coordinator", f"127.0.0.1:{processes.free_port()}", "--processes", "2"]
    begun = [
        subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | quickly()
            | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": count},
        )
        for options, count in (
            ([], "2"),
            ([*over, "--process", "0"], "1"),
            ([*over, "--process", "1"], "1"),
        )
    ]
    try:
        outputs = [process.communicate(timeout=300)[0] for process in begun]
    finally:
        for process in begun:
            process.kill()
    alone, first, second = (
        [line for line in out.splitlines() if "Gloo" not in line] for out in outputs
    )
    assert alone[-1].startswith("2 devices, MAP@R")
    assert first == alone
    assert not second


def command(*options, devices=1, **environment):
    """A begun ``tripletjax train``, whose output is in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "tripletjax", "train", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ
        | quickly()
        | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        | environment,
    )


def commands(count, *options, **environment):
    """One begun ``tripletjax train`` for each of some processes."""
    at = ("--coordinator", f"127.0.0.1:{processes.free_port()}", "--processes", count)
    return [
        command(*options, *at, "--process", index, **environment)
        for index in range(count)
    ]


def ended(*begun, seconds=200):
    """Exit status and output of each."""
    try:
        outputs = [one.communicate(timeout=seconds)[0] for one in begun]
    finally:
        for one in begun:
            one.kill()
    return [(one.returncode, out) for one, out in zip(begun, outputs)]


def lines_of(run, of="loss"):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[of] for line in lines if of in line}


def assert_same_curve(one, other, of="loss"):
    """The same numbers at the same steps, up to rounding."""
    one, other = lines_of(one, of), lines_of(other, of)
    assert one
    assert one.keys() == other.keys()
    for step in one:
        np.testing.assert_allclose(one[step], other[step], rtol=2e-3)


# Of all triplets none is chosen, which rounding might choose otherwise.
CALM = ("--loss", "all", "--steps", 20)


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (1, ["--memory", 100]),
        pytest.param(
            2, ["--memory", 100, "--embed-chunk-size", 30], marks=pytest.mark.full
        ),
    ],
)
def test_training_over_processes(tmp_path, devices, options):
    """The curve is that of one process with as many devices."""
    alone, several = tmp_path / "alone", tmp_path / "several"
    # As many dimensions as digits have pixels, so that one evaluation is compiled.
    options = [*CALM, "--dim", 64, *options]
    begun = command("--out", alone, "--devices", "all", *options, devices=2 * devices)
    ((status, output),) = ended(begun)
    assert status == 0, output
    first, second = ended(*commands(2, "--out", several, *options, devices=devices))
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert f"split over {2 * devices} devices of 2 processes" in first[1]
    assert first[1].count("Run directory: ") == 1
    assert "Run directory: " not in second[1]
    assert_same_curve(alone, several)
    one, other = (
        json.loads((out / "summary.json").read_text()) for out in (alone, several)
    )
    assert one["counts"] == other["counts"]
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=2),
        *(summary["evaluations"] for summary in (one, other)),
    )
    assert sorted(x.name for x in alone.iterdir()) == sorted(
        x.name for x in several.iterdir()
    )


@pytest.mark.full
def test_given_triplets_over_processes(tmp_path):
    random = np.random.default_rng(0)
    names = [f"{kind}{number}.png" for kind in "ab" for number in range(8)]
    for name in names:
        pixels = random.integers(0, 255, (16, 16)) // (1 + (name[0] == "a"))
        Image.fromarray(np.uint8(pixels)).save(tmp_path / name)
    rows = [f"a{i},a{j},b{k}" for i, j, k in random.integers(0, 8, (60, 3)) if i != j]
    text = "\n".join(",".join(f"{x}.png" for x in row.split(",")) for row in rows)
    (tmp_path / "triplets.csv").write_text(f"anchor,positive,negative\n{text}\n")
    given = ["--triplets", tmp_path / "triplets.csv", "--steps", 20]
    given += ["--triplets-per-batch", 12, "--out"]
    alone = command(*given, tmp_path / "alone")
    for status, output in ended(alone, *commands(2, *given, tmp_path / "several")):
        assert status == 0, output
    assert_same_curve(tmp_path / "alone", tmp_path / "several")


def begun_until(run, step, *options):
    """Commands that train in two processes, and have reached a step."""
    begun = commands(2, "--out", run, *options, **quickly(killed=True))
    until = time.monotonic() + 150
    while time.monotonic() < until and all(one.poll() is None for one in begun):
        if (run / "metrics.jsonl").exists() and step in lines_of(run):
            return begun
        time.sleep(0.2)
    raise AssertionError(ended(*begun))


@pytest.mark.full
@pytest.mark.parametrize(
    ("number", "which"), [(signal.SIGKILL, 0), (signal.SIGSTOP, 0), (signal.SIGSTOP, 1)]
)
def test_a_lost_process_ends_the_other(tmp_path, number, which):
    begun = begun_until(tmp_path / "run", 10, "--steps", 5000)
    begun[which].send_signal(number)
    since = time.monotonic()
    ((status, output),) = ended(begun[1 - which])
    assert time.monotonic() - since < 60
    begun[which].kill()
    ended(begun[which])
    assert status not in (0, 130), output


@pytest.mark.full
def test_a_run_goes_on_with_other_processes(tmp_path):
    """Stopped in two, killed in one, finished in four: the curve is unbroken."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = ("--loss", "all", "--steps", 160)
    begun = begun_until(run, 10, *options)
    begun[1].send_signal(signal.SIGINT)
    first, second = ended(*begun)
    assert (first[0], second[0]) == (130, 130), (first, second)
    assert first[1].count("stopped after step") == 1
    step = max(lines_of(run))
    assert step < 100
    assert f"stopped after step {step}" in first[1]
    begun = begun_until(run, step + 40, *options, "--resume")
    begun[1].kill()
    assert ended(*begun)[0][0] not in (0, 130)
    for out, count in ((run, 4), (whole, 2)):
        more = ["--resume"] if out is run else []
        for status, output in ended(*commands(count, "--out", out, *options, *more)):
            assert status == 0, output
    one, other = lines_of(run), lines_of(whole)
    assert one.keys() == other.keys()
    early = [s for s in one if s <= step]
    np.testing.assert_allclose(
        [one[s] for s in early], [other[s] for s in early], rtol=2e-3
    )
    # Rounding has grown by then.
    assert abs(one[160] - other[160]) < 0.03


@pytest.mark.full
def test_processes_of_a_cluster(tmp_path):
    """What Slurm and Open MPI tell their processes is enough."""
    job = str(os.getpid())
    for name, common, index in (
        (
            "slurm",
            {
                "SLURM_JOB_ID": job,
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_NTASKS": "2",
            },
            ("SLURM_PROCID", "SLURM_LOCALID"),
        ),
        (
            "mpi",
            {
                "OMPI_MCA_orte_hnp_uri": f"{4096 * int(job)}.0;tcp://127.0.0.1:1",
                "OMPI_COMM_WORLD_SIZE": "2",
            },
            ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ),
    ):
        out = tmp_path / name
        given = ("--out", out, "--processes", "cluster", "--steps", 10)
        of = [dict.fromkeys(index, str(i)) for i in (0, 1)]
        told = ended(*(command(*given, **common, **one) for one in of))
        assert [status for status, _ in told] == [0, 0], told
        assert "Run directory: " in told[0][1]
        assert "Run directory: " not in told[1][1]
        assert list(lines_of(out)) == [10]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data", "nowhere"], "tfds:NAME, got 'nowhere'"),
        pytest.param(
            ["--classes", 3, "--per-class", 3],
            "multiple of the 2 devices",
            marks=pytest.mark.full,
        ),
    ],
)
def test_wrong_options_end_all_processes(tmp_path, options, words):
    run = tmp_path / "run"
    for status, output in ended(*commands(2, "--out", run, *options), seconds=60):
        assert status == 2, output
        assert output.count(words) == 1
        assert "Traceback" not in output
    assert not run.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--processes", 2], "requires --coordinator and --process"),
        (["--processes", "cluster", "--process", 0], "--processes cluster neither"),
        (["--coordinator", "host:1"], "--coordinator requires --processes."),
        (["--processes", "two"], "must be a number or cluster, got two"),
    ],
)
def test_options_of_processes(options, words, capsys):
    assert cli.main(["train", *map(str, options)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.full
def test_processes_with_different_data(tmp_path):
    """The others are not trained with what the first does not have."""
    at = ("--coordinator", f"127.0.0.1:{processes.free_port()}", "--processes", 2)
    begun = []
    for index in (0, 1):
        folder = folders.shapes(tmp_path / str(index), seed=index)
        options = ("--data", folder, "--out", tmp_path / "run", *at)
        begun.append(command(*options, "--process", index))
    first, second = ended(*begun, seconds=90)
    assert second[0] == 2
    assert "is not the same here and in the first process" in second[1]
    assert first[0] != 0, first
