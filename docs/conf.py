"""How the site is built: `sphinx-build -W docs site`, without a network."""

import inspect
import pydoc
import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

import latex2mathml.converter
import matplotlib
from docutils import nodes
from sphinx import addnodes
from sphinx.util.inspect import stringify_signature
from sphinx.util.nodes import make_refnode

matplotlib.use("agg")
sys.path.insert(0, str(Path(__file__).parent))

project = "tripletjax"
author = "The tripletjax authors"
copyright = "2026, the tripletjax authors"
version = release = version_of("tripletjax")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "sphinxcontrib.bibtex",
    "command_options",
]
exclude_patterns = ["_templates", "gallery", "gallery_built/*.ipynb"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = f"tripletjax {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

bibtex_bibfiles = ["references.bib"]
bibtex_default_style = "plain"

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "none"  # docstrings say types with shapes
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
napoleon_custom_sections = ["Requirements", "Settings", "Relations", "References"]
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_preprocess_types = False
# Docstrings name functions in single backquotes.
default_role = "py:obj"

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "gallery_built",
    "filename_pattern": r"\.py$",
    "abort_on_example_error": True,
    "image_scrapers": ("gallery_figures.as_gif", "matplotlib"),
    "remove_config_comments": True,
    "download_all_examples": False,
    "show_memory": False,
    "write_computation_times": False,  # whose page loads scripts from elsewhere
    "within_subsection_order": "FileNameSortKey",
    "first_notebook_cell": (
        "# In a copy of the repository, from the folder of this notebook.\n"
        "%pip install -q -e '../..[train]'\n"
        "%matplotlib inline"
    ),
    "reset_modules": ("matplotlib", "gallery_figures.set_style"),
    "min_reported_time": 5,
}


def write_math_in_docstrings(app, what, name, object, options, lines):
    """`$$...$$` and `$...$` of docstrings become directives and roles."""
    text = "\n".join(lines)

    def block(match):
        indent = match[1]
        formula = inspect.cleandoc(match[2]).replace("\n", f"\n{indent}   ")
        return f"{indent}.. math::\n\n{indent}   {formula}\n"

    text = re.sub(r"(?ms)^([ ]*)\$\$(.*?)\$\$", block, text)
    text = re.sub(r"(?<!\$)\$([^$\n]+)\$(?!\$)", r":math:`\1`", text)
    text = re.sub(
        r"arXiv:(\d{4}\.\d{5})", r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", text
    )
    if what == "function" and name.endswith("_loss"):
        text += "\n\n.. seealso:: Which loss for my data: :doc:`/losses`\n"
    lines[:] = text.split("\n")


def leave_out_fields(app, what, name, object, skip, options):
    """Fields stand under Attributes already, with their shapes."""
    return skip or type(object).__name__ in ("_tuplegetter", "member_descriptor")


def write_signatures_of_modules(
    app, what, name, object, options, signature, return_annotation
):
    """Flax's modules are made by a function of any arguments."""
    if signature != "(*args, **kwargs)" or not inspect.isclass(object):
        return None
    _, *rest = inspect.signature(object.__init__).parameters.values()
    made = inspect.Signature(rest)
    return stringify_signature(made, show_annotation=False), None


def find_elsewhere(app, env, node, text):
    """Docstrings name what is public as users do, without the module of the page."""
    target = node.get("reftarget", "").removeprefix("tj.").partition("(")[0]
    objects = env.domains["py"].objects
    for prefix in ("", "learn.", "learn.training.loop.", "apps."):
        if found := objects.get(f"tripletjax.{prefix}{target}"):
            return make_refnode(
                app.builder, node["refdoc"], found.docname, found.node_id, text
            )
    return None


def strip_code(app, doctree):
    """Doctests end in an empty line, which pages need not show."""
    for node in doctree.findall(nodes.literal_block):
        if node.rawsource == node.astext():
            node.rawsource = node.rawsource.rstrip("\n")
            node[:] = [nodes.Text(node.rawsource)]


def link_names(app, doctree, docname):
    """Names of public objects in the text of guides link to their pages."""
    objects = app.env.domains["py"].objects
    for node in list(doctree.findall(nodes.literal)):
        name = re.sub(r"^(metric=)?tj\.", "", node.astext()).partition("(")[0]
        if isinstance(node.parent, nodes.reference | nodes.title):
            continue
        found = objects.get(f"tripletjax.{name}") if name.isascii() else None
        if found is None or found.docname == docname:
            continue
        link = make_refnode(
            app.builder, docname, found.docname, found.node_id, node.deepcopy()
        )
        node.replace_self(link)


def add_anchors(app, doctree):
    """Pages of source code link to all objects of a file by one module's name."""
    for node in doctree.findall(addnodes.desc_signature):
        names = {f"{module}.{node['fullname']}" for module in SHORT_MODULES}
        node["ids"] += sorted(names - {*node["ids"]})


SHORT_MODULES = "tripletjax", "tripletjax.learn"


def describe_thumbnails(app, doctree, docname):
    """Thumbnails of the gallery have the title of their page as alternative text."""
    for node in doctree.findall(nodes.image):
        page = re.fullmatch(r".*/thumb/sphx_glr_(\w+)_thumb[.]\w+", node["uri"])
        if page:
            node["alt"] = app.env.titles[f"gallery_built/{page[1]}"].astext()


# A long name in code, and its borders between words of some length.
LONG_NAME = re.compile(r'(?<=<span class="pre">)[^<]{17,}(?=</span>)')
WORD_BORDER = re.compile(
    r"(?<=[a-z0-9])(?=[A-Z]\w{3})|(?<=\w[._/(=,])(?=[^\W\d]\w{3}|&quot;)"
)


def allow_breaks_in_names(app, page, template, context, doctree):
    """Long names may break between their words, which narrow tables need."""

    def mark(name):
        return WORD_BORDER.sub("<wbr>", name[0])

    if "body" in context:
        context["body"] = LONG_NAME.sub(mark, context["body"])


def write_text_for_models(app, exception):
    """`llms.txt` lists the pages, and `llms-full.txt` has their text."""
    if exception or app.builder.format != "html":
        return
    groups = {
        "reference/generated/": "Functions and classes",
        "gallery_built/": "Gallery",
    }
    listed, texts = {"Pages": [], **{title: [] for title in groups.values()}}, []
    for page in in_order(app.env, "index"):
        if page not in app.env.titles:
            continue
        title, summary = app.env.titles[page].astext(), ""
        file = Path(app.env.doc2path(page))
        if page.startswith("reference/generated/"):
            title = Path(page).name
            text = inspect.getdoc(pydoc.locate(title)) or ""
            summary = ": " + text.partition("\n")[0].rstrip(",:")
            texts.append(f"# {title}\n\n{text}")
        elif page.startswith("gallery_built/plot_"):
            texts.append(
                f"# {title}\n\n```python\n{file.with_suffix('.py').read_text()}```"
            )
        elif page == "reference/command":
            texts.append(app.env.get_doctree(page).astext())
        elif file.suffix == ".md" and not page.startswith("reference/"):
            blocks = r"(?ms)^```\{toctree\}.*?^```\n"
            texts.append(re.sub(blocks, "", file.read_text()).strip())
        group = next(
            (g for start, g in groups.items() if page.startswith(start)), "Pages"
        )
        listed[group].append(f"- [{title}]({page}.html){summary}")
    index = ["# tripletjax", "> Triplet, contrastive and softmax losses for JAX."]
    index += [f"## {name}\n\n" + "\n".join(lines) for name, lines in listed.items()]
    Path(app.outdir, "llms.txt").write_text("\n\n".join(index) + "\n")
    Path(app.outdir, "llms-full.txt").write_text("\n\n".join(texts) + "\n")


def in_order(env, page):
    """The page, and the pages below it in the tree of contents."""
    yield page
    for below in env.toctree_includes.get(page, ()):
        yield from in_order(env, below)


def math_inline(self, node):
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def math_block(self, node):
    formula = latex2mathml.converter.convert(node.astext(), display="block")
    self.body.append(f'<div class="math">{formula}</div>')
    raise nodes.SkipNode


def setup(app):
    # Browsers draw MathML themselves: no script from another host.
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(math_inline, None),
        block_renderers=(math_block, None),
    )
    app.connect("autodoc-process-docstring", write_math_in_docstrings)
    app.connect("autodoc-process-signature", write_signatures_of_modules)
    app.connect("autodoc-skip-member", leave_out_fields)
    app.connect("missing-reference", find_elsewhere)
    app.connect("doctree-read", strip_code)
    app.connect("doctree-read", add_anchors)
    app.connect("doctree-resolved", link_names)
    app.connect("doctree-resolved", describe_thumbnails)
    app.connect("html-page-context", allow_breaks_in_names)
    app.connect("build-finished", write_text_for_models)


html_math_renderer = "mathml"
