"""How much memory and time loss and gradient need as batches grow, till they fail.

    python benchmarks/memory.py --out memory
    python benchmarks/memory.py --out memory --loss all --largest 4096

Classes of four, 128 dimensions. Every size is twice the one before, each in a process
of its own. A library is left out from the size on at which its memory or time is up.
Writes OUT.json and OUT.png, both axes logarithmic.
"""

import argparse
import json
from pathlib import Path

from contestants import LIBRARIES, LOSSES, Case, installed, machine, measure
from matplotlib import pyplot as plt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="name without suffix")
    parser.add_argument("--loss", choices=LOSSES, default="semi-hard")
    parser.add_argument("--largest", type=int, default=65536)
    parser.add_argument("--limit", type=float, default=120, help="seconds per size")
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES)
    arguments = parser.parse_args()
    files = [arguments.out.with_suffix(suffix) for suffix in (".json", ".png")]
    for file in files:
        if file.exists():
            parser.error(f"{file} exists")
    results = {}
    for library in arguments.libraries or installed():
        rows = results[library] = []
        n = 256
        while n <= arguments.largest:
            case = Case(arguments.loss, n, n // 4)
            row = measure(library, case, limit=arguments.limit, with_product=False)
            rows.append({"n": n} | row)
            print(f"{library:25} {n:7}  {describe(row)}", flush=True)
            if "failed" in row:
                break
            n *= 2
    out = {"machine": machine(), "loss": arguments.loss, "results": results}
    files[0].write_text(json.dumps(out, indent=1) + "\n")
    plot(out, files[1])


def describe(row: dict) -> str:
    if "failed" in row:
        return row["failed"]
    return f"{row['bytes'] / 2**20:10.1f} MiB {row['seconds']:10.4f} s"


def plot(out: dict, file: Path) -> None:
    figure, axes = plt.subplots(2, 1, figsize=(5.8, 9), constrained_layout=True)
    units = {"bytes": (2**20, "MiB beside the embeddings"), "seconds": (1, "seconds")}
    for axis, (key, (unit, label)) in zip(axes, units.items()):
        for library, rows in out["results"].items():
            done = [row for row in rows if "failed" not in row]
            # Less than a page cannot be seen.
            y = [max(row[key] / unit, 2**-8 if key == "bytes" else 0) for row in done]
            x = [row["n"] for row in done]
            ours = library.startswith("tripletjax")
            (line,) = axis.plot(
                x, y, "o-" if ours else "o--", markersize=4, label=library
            )
            if done and len(done) < len(rows):
                axis.plot(x[-1], y[-1], "x", markersize=11, color=line.get_color())
        axis.set(xscale="log", yscale="log", xlabel="embeddings in the batch")
        axis.set_ylabel(label)
        sizes = sorted({row["n"] for rows in out["results"].values() for row in rows})
        axis.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=45)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2)
    figure.suptitle(
        f"batch {out['loss']}: loss and gradient, classes of 4,\n"
        "128 dimensions (x: the next size fails)",
        fontsize=10,
    )
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
