"""Virtual time: workloads, and the engines and services that are simulated on them.

Nothing here reads a clock or the network. All randomness comes from a seed.
"""

from __future__ import annotations
