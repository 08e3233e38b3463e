"""Results of a search as lines, JSON, CSV and a picture."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tripletjax.apps.embedders import vectors_of
from tripletjax.apps.images import decode_path, encode_path, load_image, thumbnail
from tripletjax.apps.search.index import Index
from tripletjax.apps.search.reranking import search_reranked
from tripletjax.apps.search.update import Changes


def report_changes(index: Index, changes: Changes) -> dict[str, Any]:
    """An update, for JSON."""
    names = ("images", "added", "changed", "moved", "removed", "skipped", "notes")
    return {
        "folder": encode_path(index.folder),
        "embedder": index.embedder.key,
        **{name: getattr(changes, name) for name in names},
    }


def search_files(
    index: Index,
    queries: Sequence[Path],
    *,
    k: int,
    within: float | None = None,
    classes: Sequence[str] | None = None,
    together: bool = False,
    approximate: bool = False,
    rerank: bool = False,
) -> list[dict[str, Any]]:
    """Search by image files, each alone or by the mean of their vectors.

    A query in the index is not its own hit. If the class of a query is known, hits are
    right or wrong.

    Raises:
        OSError: if a query cannot be read.
    """
    x = vectors_of(index.embedder, [load_image(file) for file in queries])
    groups = [[file] for file in queries]
    if together:
        groups = [[*queries]]
        x = x.mean(axis=0, keepdims=True)
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    leave_out = [[*filter(None, map(index.path_of, files))] for files in groups]
    limits: dict[str, Any] = {
        "within": within,
        "classes": classes,
        "leave_out": leave_out,
        "approximate": approximate,
    }
    if rerank:
        hits = search_reranked(index, x, k, **limits)
    else:
        hits = [[(hit, None) for hit in one] for one in index.search(x, k, **limits)]
    results = []
    for files, own, hits_of_query in zip(groups, leave_out, hits):
        # Images in the folder itself have no class.
        of_queries = {path.rpartition("/")[0] for path in own}
        own_class = (of_queries.pop() or None) if len(of_queries) == 1 else None
        results.append(
            {
                "query": [encode_path(file) for file in files],
                "class": own_class,
                "hits": [
                    {
                        "path": hit.path,
                        "distance": hit.distance,
                        "class": hit.label,
                        "right": None if own_class is None else hit.label == own_class,
                        **({} if reranked is None else {"reranked_distance": reranked}),
                    }
                    for hit, reranked in hits_of_query
                ],
            }
        )
    return results


def ranked_lines(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """A line for each hit, below its query."""
    for result in results:
        yield ""
        yield " + ".join(result["query"])
        if not result["hits"]:
            yield "  no hits"
        for rank, hit in enumerate(result["hits"], start=1):
            reranked = ""
            if "reranked_distance" in hit:
                reranked = f"  re-ranked {hit['reranked_distance']:.4f}"
            yield f"{rank:>5}  {hit['distance']:.4f}{reranked}  {hit['path']}"


def draw_hits(index: Index, results: Sequence[dict[str, Any]], out: Path) -> None:
    """Draw a contact sheet: a row for each query, with its hits."""
    from tripletjax.learn import plots

    rows = []
    for result in results:
        files = [index.file_of(hit["path"]) for hit in result["hits"]]
        images = [*map(thumbnail, (decode_path(result["query"][0]), *files))]
        captions = [
            (f"{hit['distance']:.3f}\n{hit['class'].rpartition('/')[2]}", hit["right"])
            for hit in result["hits"]
        ]
        name = result["query"][0].rpartition("/")[2]
        more = len(result["query"]) - 1
        rows.append((f"{name} + {more}" if more else name, images, captions))
    title = "query, then its nearest images with distance and folder"
    if any(result["class"] is not None for result in results):
        title += "; blue: folder of the query, orange and dashed: another folder"
    out.parent.mkdir(parents=True, exist_ok=True)
    plots.contact_sheet(rows, out, title=title)


def write_groups(groups: Sequence[Sequence[str]], out: Path) -> None:
    """Write groups of paths as CSV: a line for each path, with its group's number."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "path"])
        for number, group in enumerate(groups, start=1):
            writer.writerows([number, path] for path in group)
