"""The site: README, the pages of this folder and an API reference of the docstrings. `make site` builds it strictly."""

from __future__ import annotations

import shutil
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

project = "clex-local"
version = release = version_of("clex-local")
copyright = "the authors of clex-local, MIT licensed"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
# The whole repository is the source, so that links are the ones that a reader of the files follows.
root_doc = "README"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "RELEASE.md", "native/README.md", "docs/*.md"]
exclude_patterns = [".*", "build", "models"]

html_theme = "furo"
html_title = f"clex-local {release}"
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 3
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_class_signature = "mixed"
default_role = "py:obj"  # a word between single backticks is a name of Python where there is such a name
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# The side bar. It is not in README.md, where readers of the file would see its markup.
CONTENTS = {
    "Using it": [
        "install",
        "convert",
        "chat",
        "serve",
        "rpc",
        "store",
        "inspect",
        "clex-eval",
        "train",
        "frameworks",
        "threads",
    ],
    "Reference": ["cli", "api", "architectures", "environment", "limits"],
    "Figures": ["evaluation", "long-chat", "benchmarks", "quantization"],
    "Inside": ["how-it-works", "architecture", "../native/README", "../CONTRIBUTING", "../RELEASE", "../CHANGELOG"],
}


def add_contents(app: Any, docname: str, source: list[str]) -> None:
    """Add the side bar's tables of contents to the first page."""
    if docname == root_doc:
        for caption, pages in CONTENTS.items():
            entries = "\n".join(f"docs/{page}".replace("docs/../", "") for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{entries}\n```\n"


def add_index(app: Any, error: Exception | None) -> None:
    """Web servers look for `index.html`."""
    if error is None and app.builder.format == "html":
        shutil.copy(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Any) -> None:
    """Register both with Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_index)
