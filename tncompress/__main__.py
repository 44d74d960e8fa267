"""``python -m tncompress`` is the command line."""

from tncompress.cli import main

main()
