"""``python -m examples.text2sql``."""

from __future__ import annotations

import sys

from examples.text2sql.main import main

sys.exit(main())
