"""`python -m broker.cli`: the same as `buswarden`."""

import sys

from broker.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
