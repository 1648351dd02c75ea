"""`python -m etude`, and so `accelerate launch -m etude`."""

import sys

from etude.app.cli import main

if __name__ == "__main__":
    sys.exit(main())
