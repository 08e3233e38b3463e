"""Time of loss and gradient of a batch, here and in other libraries.

    python benchmarks/in_batch.py --quick
    python benchmarks/in_batch.py --json results.json

Every case runs in a process of its own. A cell is its time in multiples of the bare
product of all embeddings, `x @ x.T`, which the same library computes in turn with it.
The file has memory, too. Times are medians of many repetitions. The other
libraries come with ``pip install -e '.[train]' --group peers``; those that are not
there are left out.
"""

import argparse
import json
from pathlib import Path

from contestants import (
    LIBRARIES,
    LOSSES,
    PAIR_LOSSES,
    TWO_SIDES,
    Case,
    installed,
    machine,
    measure,
)

SMALL = [(256, 64, 0), (1024, 256, 0)]
LARGE = [(4096, 1024, 0), (4096, 8, 0), (4096, 16384, 65536)]
# Both sides of losses of two sides are learned.
SMALL_SIDES, LARGE_SIDES = [(1024, 1024, 1024)], [(4096, 4096, 4096)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches only")
    parser.add_argument("--json", type=Path, help="a file for all figures")
    parser.add_argument("--limit", type=float, default=300, help="seconds per case")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES)
    losses = LOSSES + PAIR_LOSSES + TWO_SIDES
    parser.add_argument("--losses", nargs="+", choices=losses, default=losses)
    arguments = parser.parse_args()
    if arguments.json is not None and arguments.json.exists():
        parser.error(f"{arguments.json} exists")
    libraries = arguments.libraries or installed()
    print(" · ".join(f"{value}" for value in machine().values()))
    rows = []
    header = "| batch | loss |" + "".join(f" {name} |" for name in libraries)
    print(header, "|---" * (2 + len(libraries)) + "|", sep="\n", flush=True)
    large = not arguments.quick
    one_side, two_sides = SMALL + large * LARGE, SMALL_SIDES + large * LARGE_SIDES
    sizes = {
        size: [loss for loss in arguments.losses if (loss in TWO_SIDES) == both]
        for both, each in enumerate((one_side, two_sides))
        for size in each
    }
    for size, losses in sizes.items():
        for loss in losses:
            case = Case(loss, *size)
            print(f"| {describe(case)} | {loss} |", end="", flush=True)
            for library in libraries:
                result = measure(library, case, limit=arguments.limit)
                rows.append({"library": library} | case._asdict() | result)
                print(f" {cell(result)} |", end="", flush=True)
            print()
    if arguments.json is not None:
        out = {"machine": machine(), "results": rows}
        arguments.json.write_text(json.dumps(out, indent=1) + "\n")


def describe(case: Case) -> str:
    size = f"{case.n}" + (f" x {case.references}" if case.references else "")
    return f"{size}, {case.classes} classes"


def cell(result: dict) -> str:
    if "failed" in result:
        return result["failed"]
    seconds = result["seconds"]
    time = f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
    return f"{result['ratio']:.2f} ({time})"


if __name__ == "__main__":
    main()
