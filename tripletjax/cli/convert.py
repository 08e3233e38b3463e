"""``tripletjax convert``."""

from tripletjax.cli.common import shown
from tripletjax.cli.options import Convert
from tripletjax.learn.networks import backbones


def call(options: Convert) -> int:
    weights, loaded = backbones.convert(options.file, options.out)
    print(
        f"{shown(options.file)} is {weights.backbone.title}, {loaded.parameters:,} "
        "parameters"
    )
    for note in (*weights.notes, *loaded.notes):
        print(f"- {note}")
    size = options.out.stat().st_size / 1e6
    print(f"written: {shown(options.out)}, {size:.1f} MB")
    return 0
