"""`python -m evsam_lib.training`, see `command`."""

import sys

from evsam_lib.training.command import main

if __name__ == "__main__":
    sys.exit(main())
