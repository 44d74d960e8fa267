project = "tncompress"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "tncompress"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
