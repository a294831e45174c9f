"""Configuration of the documentation.

The pages build without a network and without running a notebook, so that ``make docs`` (warnings are errors) means the
same on every machine. Set ``CELLWEAVE_DOCS_ONLINE=1`` (or build on Read the Docs) to link to the pages of AnnData,
scvi-tools and the other packages as well.
"""

import inspect
import os
from importlib.metadata import version as installed_version
from pathlib import Path

from sphinx.application import Sphinx

# ---------------------------------------------------------------------------------------------------- project

project = "cellweave"
author = "cellweave developers"
copyright = f"2026, {author}"  # the name that Sphinx reads
version = release = installed_version("cellweave")

# ---------------------------------------------------------------------------------------------------- general

online = os.environ.get("CELLWEAVE_DOCS_ONLINE") == "1" or os.environ.get("READTHEDOCS") == "True"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    *(["sphinx.ext.intersphinx"] if online else []),
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints", "Thumbs.db", ".DS_Store"]

intersphinx_mapping = {
    "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
    "lightning": ("https://lightning.ai/docs/pytorch/stable/", None),
    "matplotlib": ("https://matplotlib.org/stable/", None),
    "mudata": ("https://mudata.readthedocs.io/stable/", None),
    "numpy": ("https://numpy.org/doc/stable/", None),
    "pandas": ("https://pandas.pydata.org/docs/", None),
    "python": ("https://docs.python.org/3/", None),
    "scanpy": ("https://scanpy.readthedocs.io/en/stable/", None),
    "scipy": ("https://docs.scipy.org/doc/scipy/", None),
    "scvi": ("https://docs.scvi-tools.org/en/stable/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
}

# ---------------------------------------------------------------------------------------------------- pages and notebooks

nb_execution_mode = "off"  # tutorials are stored with their output and run by the tests
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath", "substitution"]
# The table of tutorials appears with the first tutorial: an empty one would be a warning, and so an error.
tutorials = sorted(Path(__file__).parent.glob("tutorials/*.ipynb"))
toctree = "\n".join(
    ["```{toctree}", ":hidden:", ":caption: Tutorials", "", *(f"tutorials/{t.stem}" for t in tutorials), "```"]
)
myst_substitutions = {"tutorials": toctree if tutorials else ""}
myst_heading_anchors = 3
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# ---------------------------------------------------------------------------------------------------- API reference

autosummary_generate = True
autosummary_ignore_module_all = False  # the rooms' `__all__` is the public interface
autosummary_imported_members = True
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False  # `Returns` holds shapes and places in words, not a type
napoleon_use_param = True

# ---------------------------------------------------------------------------------------------------- HTML

html_theme = "sphinx_book_theme"
html_title = "cellweave"
html_static_path = ["_static"]
html_theme_options = {"show_toc_level": 2, "use_download_button": False}


def skip_what_others_wrote(_app: Sphinx, _what: str, _name: str, obj: object, skip: bool, _options: object) -> bool:
    """Leave out methods that a class inherits from scvi-tools, Lightning or torch; they are documented there."""
    function = getattr(obj, "fget", obj)  # of a property
    written_in = getattr(function, "__module__", None) or ""
    is_foreign = inspect.isroutine(function) and not written_in.startswith("cellweave")
    return skip or is_foreign


def setup(app: Sphinx) -> None:
    """Connect the function above; called by Sphinx."""
    app.connect("autodoc-skip-member", skip_what_others_wrote)
