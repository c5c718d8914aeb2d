#!/usr/bin/env python3
"""The course's one command: `python course.py run` executes every chapter, `test` runs the tests.

Standard library only. The first call makes `.venv` and installs the pinned packages into it; later
calls use it again. The parser is in workshop/door.py.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        f"course.py needs Python 3.11 or newer; this is Python {sys.version.split()[0]}.\n"
        "Install a newer one (https://www.python.org/downloads) and call it by name, "
        "e.g. `python3.12 course.py run`."
    )

from workshop import door  # noqa: E402 (the version is checked before anything newer is used)

if __name__ == "__main__":
    try:
        sys.exit(door.main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nstopped; call the same command again to continue")
