"""Style and animations of the gallery."""

import ast
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.animation import Animation
from sphinx_gallery.scrapers import figure_rst

# In a figure 6 inches wide, this type is at least 9 pixels high on a telephone.
STYLE = {
    "figure.figsize": (6, 4),
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "font.size": 11,
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "axes.prop_cycle": plt.cycler(
        color=["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#444444"]
    ),
}


def set_style(gallery_conf, file):
    """Set the style of figures, after the reset to the defaults of Matplotlib."""
    plt.rcParams.update(STYLE)


def as_gif(block, block_vars, gallery_conf, **options):
    """Shows animations as GIFs: Matplotlib's player loads icons from another host."""
    script = ast.parse(Path(block_vars["src_file"]).read_text())
    title = (ast.get_docstring(script) or "").partition("\n")[0]
    written = ""
    for value in list(block_vars["example_globals"].values()):
        if isinstance(value, Animation) and plt.fignum_exists(value._fig.number):
            file = Path(next(block_vars["image_path_iterator"])).with_suffix(".gif")
            value.save(file, writer="pillow", dpi=80)
            plt.close(value._fig)
            written += figure_rst([str(file)], gallery_conf["src_dir"], title)
    return written
