"""How the site is built: `make docs`, offline, with warnings as errors."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(HERE.parent))  # the library of this tree, whichever is installed
os.environ["PYTHONPATH"] = os.pathsep.join(  # and in the kernels that run the tutorials
    [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
)
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, in notebooks without widgets

import tncompress  # noqa: E402

project = "tncompress"
release = version = tncompress.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "commands",
    "signatures",
]
exclude_patterns = ["_build", "_ext"]
smartquotes = False  # options begin with two hyphens

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False

# Tutorials are notebooks in Markdown. They run when they have changed; an error in a cell ends the build.
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_execution_excludepatterns: list[str] = []
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "exclude-members": "model_config, model_post_init"}
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

extensions += ["mathml"]  # as the two before it in _ext
html_math_renderer = "mathml"
html_show_copyright = False
html_theme = "furo"
html_title = "tncompress"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors = False
