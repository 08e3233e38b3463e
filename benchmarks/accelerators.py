"""Time and memory of loss and gradient on a TPU, by its compiler, without a TPU.

    pip install libtpu
    python benchmarks/accelerators.py
    python benchmarks/accelerators.py --n 65536 --loss hard --block-size 512

Nothing is run: programs are compiled for one chip, here of a TPU v5e, and read. Memory
is temporary, beside embeddings and gradient. Operations are those of one call, loops
counted as often as they go round; on a GPU about as many kernels are launched. The time
is the compiler's own estimate of its cycles, and the multiple that of the bare
product's. The figures of an H100 are an estimate on paper. It assumes 3 us to launch an
operation, 50 Tflop/s in float32 ("highest" precision), and 3.35 TB/s to read or write.
`PASSES` is the number of times that a block is read or written.

Labels are classes of four. Loops whose length depends on the labels are counted for
these; the farthest negatives of semi-hard mining, where there is no nearer one, once.
"""

import argparse
import os
import re

LOSSES, SIZES = ("hard", "semi-hard", "all"), (4096, 16_384, 65_536, 131_072)
POSITIVES, CYCLES_PER_MS = 3, 1.5e6
# Of every block: its product, and what reads it, or writes as much.
PASSES = {"product": 2, "hard": 3, "semi-hard": 5, "all": 12}
# Of half of the bare product, as distances are symmetric; a gradient of all takes two.
PRODUCTS = {"product": 2, "hard": 1, "semi-hard": 1, "all": 3}
OPERATION = re.compile(
    r" (fusion|convolution|custom-call|copy|sort|scatter|gather|reduce|reduce-window"
    r"|dynamic-slice|dynamic-update-slice)\("
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, nargs="+", default=SIZES, help="embeddings")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--loss", choices=LOSSES, nargs="+", default=LOSSES)
    parser.add_argument("--block-size", type=int, help="of the losses; else their own")
    parser.add_argument("--topology", default="v5e:2x2", help="one chip of it is used")
    arguments = parser.parse_args()

    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax.numpy as jnp

    import tripletjax as tj

    compiled = compiler(arguments.topology)
    columns = "n", "loss", "temporary, MiB", "operations", "v5e, ms", "multiple"
    columns = *columns, "H100 on paper, ms", "multiple"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for n in arguments.n:
        x = jax.ShapeDtypeStruct((n, arguments.dim), jnp.float32)
        labels = jax.ShapeDtypeStruct((n,), jnp.int32)
        # A larger product does not fit the chip.
        some = jax.ShapeDtypeStruct((min(n, 16_384), arguments.dim), jnp.float32)
        bare = compiled(lambda x: jnp.matmul(x, x.T, precision="highest"), some)
        bare_cycles = cost(bare.as_text(), 1)[0] * (n / some.shape[0]) ** 2
        bare_paper = on_paper("product", n, arguments.dim, 1)
        told = f"{bare_cycles / CYCLES_PER_MS:.2f} | | {bare_paper:.2f} |"
        print(f"| {n:,} | product | | | {told} |", flush=True)
        for name in arguments.loss:
            loss = getattr(tj.blockwise, f"batch_{name.replace('-', '_')}_loss")

            def step(x, labels, loss=loss):
                return loss(x, labels, margin=0.2, block_size=arguments.block_size)

            program = compiled(jax.value_and_grad(step), x, labels)
            cycles, operations = cost(program.as_text(), -(-x.size // 2**22))
            paper = on_paper(name, n, arguments.dim, operations)
            told = (
                f"{program.memory_analysis().temp_size_in_bytes / 2**20:.0f}",
                f"{operations:,}",
                f"{cycles / CYCLES_PER_MS:.2f}",
                f"{cycles / bare_cycles:.1f}",
                f"{paper:.2f}",
                f"{paper / bare_paper:.1f}",
            )
            print(f"| {n:,} | {name} | {' | '.join(told)} |", flush=True)


def on_paper(name: str, n: int, dim: int, operations: int) -> float:
    """Milliseconds on an H100, by operations, products, and passes over blocks."""
    computing = PRODUCTS[name] * n**2 * dim / 50e9
    moving = PASSES[name] * n**2 / 2 * 4 / 3.35e9
    return operations * 3e-3 + computing + moving


def compiler(topology: str):
    """From a function and what it is called with to its program for one chip."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    one = Mesh(np.array(chips(topology)[:1]), "x")
    where = NamedSharding(one, PartitionSpec())

    def compiled(function, *shapes):
        step = jax.jit(function, in_shardings=where, out_shardings=where)
        return step.lower(*shapes).compile()

    return compiled


def chips(topology: str) -> list:
    """Those of a TPU that is not here, to compile for."""
    from jax.experimental import topologies

    # Without these libtpu looks for the machine's TPUs.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


def cost(text: str, blocks: int) -> tuple[int, int]:
    """Estimated cycles and operations of a call, with a number of blocks of vectors."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif line.startswith("  "):
            computations[name].append(line)

    def constant(lines: list[str], names: list[str]) -> int | None:
        for line in lines:
            found = re.match(r"\s+(%\S+) = s32\[\]\S* constant\((\d+)\)", line)
            if found and found[1] in names:
                return int(found[2])
        return None

    def rounds(line: str) -> int:
        lines = computations[re.search(r"condition=%([\w.\-]+)", line)[1]]
        root = next(x for x in lines if x.strip().startswith("ROOT"))
        limit = constant(lines, re.findall(r"%[\w.\-]+", root))
        if limit is not None:
            return limit
        # It depends on the labels.
        scope = re.search(r'op_name="([^"]*)"', line)[1]
        for several, count in (("by_3", POSITIVES // 3), ("by_1", POSITIVES % 3)):
            if several in scope:
                return count
        return 1 if "farthest" in scope else POSITIVES * blocks

    def total(name: str) -> tuple[int, int]:
        cycles = operations = 0
        for line in computations[name]:
            times, called = 1, ""
            if found := re.search(r'"estimated_cycles":"(\d+)"', line):
                cycles += int(found[1])
            if " while(" in line:
                times, called = rounds(line), re.search(r"body=%([\w.\-]+)", line)[1]
            elif " conditional(" in line:
                # The last is taken: few positives.
                called = re.search(r"branch_computations=\{[^}]*%([^}]+)\}", line)[1]
            elif " call(" in line:
                called = re.search(r"to_apply=%([\w.\-]+)", line)[1]
            elif OPERATION.search(line):
                operations += 1
            if called:
                inner = total(called)
                cycles += times * inner[0]
                operations += times * inner[1]
        return cycles, operations

    return total(entry)


if __name__ == "__main__":
    main()
