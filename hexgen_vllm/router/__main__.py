"""``python -m hexgen_vllm.router``."""

from __future__ import annotations

import sys

from hexgen_vllm.router.main import run

sys.exit(run())
