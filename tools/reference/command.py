"""``hexgen-vllm reference``: prints options, files, endpoints and names of this version."""

from __future__ import annotations

import argparse
from pathlib import Path

from hexgen_vllm.errors import ConfigError
from tools.reference.page import page


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm reference``."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it here, not to the screen")


def main(args: argparse.Namespace) -> int:
    """Run the command.

    Raises:
        ConfigError: the file cannot be written.
    """
    if args.out is None:
        print(page(), end="")
        return 0
    try:
        args.out.write_text(page(), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{args.out} cannot be written: {error.strerror}.") from None
    return 0
