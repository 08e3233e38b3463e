"""``tripletjax mine``."""

from tripletjax.apps import mining
from tripletjax.apps.mining import report as mining_report
from tripletjax.cli.common import check_new, one_line, open_embedder, shown
from tripletjax.cli.options import Mine


def call(options: Mine) -> int:
    files = mining_report.Files.beside(options.out, options.json)
    check_new(*files)
    result = mining.mine(
        open_embedder(options),
        options.data,
        k=options.k,
        range_min=options.range_min,
        range_max=options.range_max,
        margin=options.margin,
        relative_margin=options.relative_margin,
        farthest_positive=options.farthest_positive,
        skip_label_errors=options.skip_label_errors,
        seed=options.draw_seed,
        classes_from=options.classes_from,
        progress=True,
    )
    written = mining_report.write(result, files)
    for line in mining_report.format_report(result.report):
        print(one_line(line))
    print()
    for file in written:
        print(f"written: {shown(file)}")
    return 0
