"""What a search has found, as lines, JSON, CSV and a picture."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tripletjax.apps.embedders import vectors_of
from tripletjax.apps.images import decoded, encoded, opened, thumbnail
from tripletjax.apps.search.index import Changes, Index


def changes(told: Changes) -> str:
    """What an update has done, in a line."""
    done = ("added", "changed", "moved", "removed")
    counts = [(name, getattr(told, name)) for name in done]
    counts.append(("skipped", len(told.skipped)))
    what = ", ".join(f"{count:,} {name}" for name, count in counts if count)
    return f"{told.images:,} images in the index ({what or 'as before'})"


def of_changes(index: Index, told: Changes) -> dict[str, Any]:
    """An update, for JSON."""
    names = ("images", "added", "changed", "moved", "removed", "skipped", "notes")
    return {
        "folder": encoded(index.folder),
        "embedder": index.embedder.key,
        **{name: getattr(told, name) for name in names},
    }


def found(
    index: Index,
    queries: Sequence[Path],
    *,
    k: int,
    within: float | None = None,
    classes: Sequence[str] | None = None,
    together: bool = False,
    approximate: bool = False,
) -> list[dict[str, Any]]:
    """Searches by image files, each alone or by the mean of their vectors.

    A query that lies in the index is not its own hit; where its class is known, hits
    are right or not.

    Raises:
        OSError: if a query cannot be read.
    """
    x = vectors_of(index.embedder, [opened(file) for file in queries])
    groups = [[file] for file in queries]
    if together:
        groups = [[*queries]]
        x = x.mean(axis=0, keepdims=True)
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    leave_out = [[*filter(None, map(index.path_of, files))] for files in groups]
    hits = index.search(
        x,
        k,
        within=within,
        classes=classes,
        leave_out=leave_out,
        approximate=approximate,
    )
    found = []
    for files, own, several in zip(groups, leave_out, hits):
        # What lies in the folder itself is of no class.
        of_queries = {path.rpartition("/")[0] for path in own}
        own_class = (of_queries.pop() or None) if len(of_queries) == 1 else None
        found.append(
            {
                "query": [encoded(file) for file in files],
                "class": own_class,
                "hits": [
                    {
                        "path": hit.path,
                        "distance": hit.distance,
                        "class": hit.label,
                        "right": None if own_class is None else hit.label == own_class,
                    }
                    for hit in several
                ],
            }
        )
    return found


def ranked_lines(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each hit, under its query."""
    for query in found:
        yield ""
        yield " + ".join(query["query"])
        if not query["hits"]:
            yield "  nothing is found"
        for rank, hit in enumerate(query["hits"], start=1):
            yield f"{rank:>5}  {hit['distance']:.4f}  {hit['path']}"


def draw_found(index: Index, found: Sequence[dict[str, Any]], out: Path) -> None:
    """A contact sheet: the queries, and what was found for them."""
    from tripletjax.learn import plots

    rows = []
    for query in found:
        files = [index.file_of(hit["path"]) for hit in query["hits"]]
        images = [*map(thumbnail, (decoded(query["query"][0]), *files))]
        told = [
            (f"{hit['distance']:.3f}\n{hit['class'].rpartition('/')[2]}", hit["right"])
            for hit in query["hits"]
        ]
        name = query["query"][0].rpartition("/")[2]
        more = len(query["query"]) - 1
        rows.append((f"{name} + {more}" if more else name, images, told))
    title = "query, then what was found, with its distance and folder"
    if any(query["class"] is not None for query in found):
        title += "; blue is of the query's folder, orange and dashed is not"
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.contact_sheet(rows, out, title=title)


def write_groups(groups: Sequence[Sequence[str]], out: Path) -> None:
    """Groups of paths as CSV: a line for each, with the number of its group."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "path"])
        for number, group in enumerate(groups, start=1):
            writer.writerows([number, path] for path in group)
