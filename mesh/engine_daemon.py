"""Console script ``retinue-engine``: hands the command line to the native engine."""

from __future__ import annotations

import sys

from mesh._native import engine_main


def main() -> int:
    """Run the engine; returns its exit status (0 done, 1 failure, 2 usage, 4 privilege or device)."""
    return engine_main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
