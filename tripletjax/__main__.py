"""The command, as ``python -m tripletjax``."""

import sys

if __name__ == "__main__":
    try:
        from tripletjax.cli import main

        sys.exit(main())
    except KeyboardInterrupt:
        # While modules are imported.
        sys.exit(130)
