"""Memory and exchanges of loss and gradient on each device of a mesh.

    python benchmarks/mesh.py
    python benchmarks/mesh.py --devices 8 --n 16384 --loss hard
    python benchmarks/mesh.py --devices 256 --topology v5e:16x16    # pip install libtpu

Nothing is run. Programs are compiled for simulated devices, or for chips of a TPU that
is not here. The table has their memory and their collectives, in loops counted once.
Temporary memory is beside the device's own part of
embeddings and gradient.
"""

import argparse
import os
import re

from accelerators import chips

DEVICES, SIZES = (8, 32, 256), (16_384, 131_072, 1_048_576)
LOSSES = "hard", "semi-hard", "all"
COLLECTIVES = (
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=DEVICES)
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="embeddings")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--loss", choices=LOSSES, nargs="+", default=LOSSES)
    parser.add_argument("--topology", help="of a TPU, such as v5e:16x16")
    arguments = parser.parse_args()

    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax

    if arguments.topology:
        every = chips(arguments.topology)
    else:
        jax.config.update("jax_num_cpu_devices", max(arguments.devices))
        every = jax.devices()
    print(
        f"| loss | n | devices | own part, MiB | temporary, MiB | "
        f"{' | '.join(COLLECTIVES)} |\n|{'---|' * (5 + len(COLLECTIVES))}"
    )
    for loss in arguments.loss:
        for n in arguments.n:
            for devices in arguments.devices:
                own = n // devices * arguments.dim * 4 / 2**20
                memory, counts = compiled(loss, n, arguments.dim, every[:devices])
                told = " | ".join(str(counts[name]) for name in COLLECTIVES)
                row = f"{loss} | {n:,} | {devices} | {own:.1f} | {memory:.1f} | {told}"
                print(f"| {row} |", flush=True)


def compiled(
    loss: str, n: int, dim: int, devices: list
) -> tuple[float, dict[str, int]]:
    """Temporary memory in MiB, and how many collectives of each kind there are."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    import tripletjax as tj

    mesh = jax.make_mesh(
        (len(devices),), ("data",), axis_types=(AxisType.Explicit,), devices=devices
    )
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.ShapeDtypeStruct((n, dim), jnp.float32, sharding=rows)
    labels = jax.ShapeDtypeStruct((n,), jnp.int32, sharding=rows)
    of = getattr(tj.blockwise, f"batch_{loss.replace('-', '_')}_loss")
    with jax.set_mesh(mesh):
        program = jax.jit(jax.value_and_grad(of)).lower(x, labels).compile()
    text = program.as_text()
    counts = {
        name: len(re.findall(rf" {name}(?:-start)?\(", text)) for name in COLLECTIVES
    }
    return program.memory_analysis().temp_size_in_bytes / 2**20, counts


if __name__ == "__main__":
    main()
