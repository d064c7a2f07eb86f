"""``python -m hexgen_vllm.router``."""

from __future__ import annotations

import sys

from hexgen_vllm.program import exit_code


def _run() -> int:
    from hexgen_vllm.router.main import run  # a moment's work, which may be interrupted

    return run()


sys.exit(exit_code("python -m hexgen_vllm.router", _run))
