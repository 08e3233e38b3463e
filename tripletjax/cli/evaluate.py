"""``tripletjax evaluate``."""

from pathlib import Path
from typing import Any

from tripletjax.cli.common import one_line, open_embedder, print_table, shown
from tripletjax.cli.options import Evaluate
from tripletjax.learn import evaluation, reports
from tripletjax.learn.counts import counted
from tripletjax.learn.files import free_path


def call(options: Evaluate) -> int:
    if options.json is not None:
        reports.check_replaceable(options.json)
    folder, out = options.data, options.out
    if out is None:
        out = free_path(
            options.home / "evaluations" / (folder.resolve().name or "data")
        )
    reports.check_empty(out)
    report = evaluation.evaluate(
        options.run or open_embedder(options),
        folder,
        out=out,
        classes_from=options.classes_from,
        rerank=options.rerank,
        progress=True,
    )
    if options.json is not None:
        reports.write_report(report, options.json)
    _print_report(report, folder)
    print(f"\nReport directory: {shown(out)}; see roc, distances and neighbors.png.")
    return 0


def _print_report(report: dict[str, Any], folder: Path) -> None:
    classes = f"{counted(report['classes'], 'class')} in {shown(folder)}"
    print(f"{counted(report['images'], 'image')} of {classes}")
    for note in report["notes"]:
        print(f"- {one_line(note)}")
    retrieval, pairs, spread = (
        report[name] for name in ("retrieval", "verification", "collapse")
    )
    rows = _rows_of_retrieval(retrieval)
    rows["mean average precision"] = retrieval["mean_average_precision"]
    title, beside = counted(retrieval["queries"], "query", "queries"), None
    if (reranked := report.get("reranked")) is not None:
        beside = _rows_of_retrieval(reranked)
        title += f", and with the {reranked['images']:,} nearest re-ranked"
    print_table(f"retrieval, {title}", rows, " %", beside=beside)
    rows = {
        "equal error rate": pairs["equal_error_rate"],
        "area under the ROC": pairs["area_under_roc"],
        **{f"TAR at FAR {x['far']:g} %": x["tar"] for x in pairs["at_far"]},
    }
    n = f"{pairs['positives']:,} same and " + counted(
        pairs["negatives"], "different pair"
    )
    print_table(f"verification, {n}", rows, " %")
    rows = {
        "mean distance": spread["mean_distance"],
        "standard deviation": spread["distance_std"],
        "effective rank": spread["effective_rank"],
    }
    print_table("spread of the embeddings: near 0, and rank 1, if collapsed", rows)


def _rows_of_retrieval(metrics: dict[str, Any]) -> dict[str, float | None]:
    return {
        "MAP@R": metrics["map_at_r"],
        "R-precision": metrics["r_precision"],
        **{f"recall@{k}": value for k, value in metrics["recall_at_k"].items()},
    }
