"""``python -m hexgen_vllm`` is the command ``hexgen-vllm``."""

from __future__ import annotations

import sys

from hexgen_vllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
