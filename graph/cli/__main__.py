"""``python -m prunewright.graph.cli``."""

from prunewright.graph.cli import main

main()
