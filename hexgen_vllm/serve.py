"""``python -m hexgen_vllm.serve MODEL [every vllm serve argument] [--hexgen-…]``.

A drop-in for ``vllm serve`` with urgency scheduling on, and the starter of whole clusters:
``python -m hexgen_vllm.serve --cluster cluster.yaml``.

vLLM's child processes import this file again, so that it imports next to nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from hexgen_vllm.program import exit_code

PROG = "python -m hexgen_vllm.serve"
CLUSTER_FLAG = "--cluster"


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one model, or a cluster; return the exit code."""
    from hexgen_vllm import descriptors

    args = list(sys.argv[1:] if argv is None else argv)
    descriptors.raise_limit()
    if any(arg == CLUSTER_FLAG or arg.startswith(f"{CLUSTER_FLAG}=") for arg in args):
        return exit_code(PROG, lambda: _cluster(args))
    from hexgen_vllm.engine import serve

    return serve.main(args)


def _cluster(args: Sequence[str]) -> int:
    from hexgen_vllm.cluster import command_line

    return command_line.main(args)


if __name__ == "__main__":
    sys.exit(main())
