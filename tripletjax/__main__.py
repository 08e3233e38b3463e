"""The command, as ``python -m tripletjax``."""

import sys

from tripletjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
