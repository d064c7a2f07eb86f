"""Optional patches for vLLM, and the command that applies and reverts them.

Nothing in this package needs them; ``patches/README.md`` says what each one adds.
"""

from __future__ import annotations
