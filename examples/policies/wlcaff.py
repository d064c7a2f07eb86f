"""A placement policy in a file of its own: weighted least connections that sees prefixes.

hexgen-vllm check-policy examples/policies/wlcaff.py:Wlcaff
hexgen-vllm sim examples/scenarios/reference.yaml --policy examples/policies/wlcaff.py:Wlcaff+fcfs
"""

from __future__ import annotations

from typing import Any


class Wlcaff:
    """The engine with the fewest calls for its speed; 200 uncached tokens count as a call."""

    def __init__(self, options: Any) -> None:
        pass

    def choose(self, demand: Any, engines: Any, claims: Any, now: float) -> Any:
        call = demand.call

        def load(engine: Any) -> Any:
            own = max(call.prompt_tokens - engine.prefixes.match(call), 1)
            return (engine.calls + 1 + own / 200) / engine.speed()

        return min(engines, key=load)
