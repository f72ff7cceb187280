"""`python -m lowvram_tuner COMMAND`."""

import sys

from lowvram_tuner.cli import main

if __name__ == "__main__":
    sys.exit(main())
