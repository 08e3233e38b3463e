"""``tripletjax search``."""

from pathlib import Path
from typing import Any

from tripletjax.apps import search
from tripletjax.apps.search import report as search_report
from tripletjax.cli.common import (
    check_images,
    check_new,
    one_line,
    open_embedder,
    shown,
    updated_index,
)
from tripletjax.cli.options import Search
from tripletjax.learn.counts import counted
from tripletjax.learn.files import replaced_together, write_json


def call(options: Search) -> int:
    check_new(options.out, options.json)
    check_images(options.query)
    embedder = open_embedder(options)
    index, changes = updated_index(options.index, options, embedder)
    report: dict[str, Any] = {"index": search_report.report_changes(index, changes)}
    lines: list[str] = []
    if options.approximate and not index.has_approximate:
        print("building the approximate index, once")
        index.build_approximate()
    with replaced_together() as part:
        out = None if options.out is None else part(options.out)
        if options.query:
            report["queries"], lines = _nearest(index, options, out)
        elif options.duplicates:
            report["duplicates"], lines = _duplicates(index, options, out)
        if options.json is not None:
            write_json(part(options.json), report)
    for line in lines:
        print(one_line(line))
    for file in (options.out, options.json):
        if file is not None:
            print(f"written: {shown(file)}")
    return 0


def _nearest(
    index: search.Index, options: Search, out: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """The hits of the queries, and the lines to print."""
    hits = search_report.search_files(
        index,
        options.query,
        k=options.k,
        within=options.within,
        classes=options.classes or None,
        together=options.together,
        approximate=options.approximate,
        rerank=options.rerank,
    )
    if out is not None:
        search_report.draw_hits(index, hits, out)
    return hits, [*search_report.ranked_lines(hits)]


def _duplicates(
    index: search.Index, options: Search, out: Path | None
) -> tuple[list[list[str]], list[str]]:
    """Groups of near-duplicates, and the lines to print."""
    within = search.DUPLICATE_DISTANCE if options.within is None else options.within
    groups = index.duplicates(within)
    count = sum(map(len, groups))
    images = counted(count, "image")
    lines = [f"{counted(len(groups), 'group')} of {images} within {within:g}"]
    if out is not None:
        search_report.write_groups(groups, out)
        return groups, lines
    return groups, [*lines, *("  " + "  ".join(group) for group in groups)]
