"""``tripletjax export``."""

from tripletjax import learn
from tripletjax.apps.export import export
from tripletjax.cli.common import shown
from tripletjax.cli.options import Export


def call(options: Export) -> int:
    exported = export(
        learn.load_embedder(options.run), options.out, check=options.check
    )
    if exported.file.suffix == ".safetensors":
        contents = f"weights of the backbone, {exported.dim} features"
    else:
        height, width, channels = exported.shape
        contents = (
            f"from images uint8 [n, {height}, {width}, {channels}] to vectors "
            f"[n, {exported.dim}]"
        )
    size = f"{exported.size / 1e6:.1f} MB"
    print(f"written: {shown(exported.file)}, {size}: {contents}")
    if exported.preparation is not None:
        print(f"written: {shown(exported.preparation)}: preparation of the images")
    for note in exported.notes:
        print(f"- {note}")
    print(
        f"largest difference from the run: {exported.difference:.1g}, on "
        f"{exported.compared_on}"
    )
    return 0
