"""``python -m prunewright.graph.cli.tethered ARGS``: the command line on a tether.

It ends at once when its standard input is closed, as a killed parent's pipes are: nobody is left
at work who would hold a run's lock, and a model in memory.
"""

import os
import threading

from prunewright.graph.cli import main


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)  # all that is recorded is written atomically


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    main()
