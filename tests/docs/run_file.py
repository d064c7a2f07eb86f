"""A program that the fork server can start: runs the Python file named on its command line."""

from __future__ import annotations

import runpy
import sys


def main() -> int:
    """Run the file as a program."""
    runpy.run_path(sys.argv[1], run_name="__main__")
    return 0
