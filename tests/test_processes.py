"""Meshes over several processes give what one device gives."""

import os
import subprocess
import sys

import processes
import pytest
from processes import TESTS

pytestmark = pytest.mark.slow


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
    )
    assert told == [["right"]] * 2


@pytest.mark.parametrize(
    ("count", "devices", "names", "ring"),
    [(2, 2, ("hard", "all"), False), (4, 1, ("semi_hard",), True)],
)
def test_losses_over_processes(count, devices, names, ring):
    told = processes.run(
        """
        import numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        import tripletjax as tj

        random = np.random.default_rng(0)
        x = random.normal(size=(64, 16)).astype(np.float32)
        labels = random.integers(0, 9, 64).astype(np.int32)
        where = np.arange(64) > 20  # none is real on the first device
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(kind,))
            rows = NamedSharding(mesh, P("data"))
            own = len(x) // jax.process_count()
            part = slice(jax.process_index() * own, (jax.process_index() + 1) * own)
            put = lambda a: jax.make_array_from_process_local_data(rows, a[part])
            for name in names:
                loss = getattr(tj.blockwise, f"batch_{name}_loss")
                options = {"margin": 0.3, "axis_name": "data", "ring": ring}
                of = lambda x, y, w: loss(x, y, where=w, **options)
                with jax.set_mesh(mesh):
                    step = jax.jit(jax.value_and_grad(of))
                    got = step(put(x), put(labels), put(where))
                alone = lambda x: loss(x, labels, where=where, margin=0.3)
                value, gradient = jax.value_and_grad(alone)(x)
                np.testing.assert_allclose(got[0], value, rtol=1e-5)
                for shard in got[1].addressable_shards:
                    np.testing.assert_allclose(
                        shard.data, gradient[shard.index], atol=1e-6
                    )
        print("right")
        """,
        processes=count,
        devices=devices,
        given=f"names, ring = {names}, {ring}",
    )
    assert told == [["right"]] * count


def test_the_example_on_processes():
    """Two processes print what one does with as many devices."""
    example = TESTS.parent / "examples" / "mesh.py"
    command = [sys.executable, "-W", "error", example, "--steps", "100"]
    over = ["--coordinator", f"127.0.0.1:{processes.free_port()}", "--processes", "2"]
    begun = [
        subprocess.Popen(
            [*command, *options],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": count},
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
