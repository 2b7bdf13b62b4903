"""`python -m ntk_monitor.cli` is `ntk-monitor`."""

import sys

from ntk_monitor.cli import main

if __name__ == "__main__":
    sys.exit(main())
