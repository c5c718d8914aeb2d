"""`python workshop VERB ...` in the course's environment, called by `course.py` from any folder."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # the checkout, not this folder

from workshop import door  # noqa: E402

if __name__ == "__main__":
    sys.exit(door.inside(sys.argv[1:]))
