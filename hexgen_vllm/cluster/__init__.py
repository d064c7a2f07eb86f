"""Several engines and the router as one thing: started, watched and stopped together.

    async with Cluster(load(Path("cluster.yaml"))) as cluster:
        ...  # cluster.router_url, cluster.engine_urls

or ``python -m hexgen_vllm.serve --cluster cluster.yaml``. Engines and router are processes of
their own; this package only starts and watches them, and imports neither vLLM nor torch.
"""

from __future__ import annotations

from hexgen_vllm.cluster.file import load
from hexgen_vllm.cluster.processes import ProcessFailed
from hexgen_vllm.cluster.spec import ClusterSpec, EngineEntry, RouterEntry
from hexgen_vllm.cluster.supervisor import Cluster

__all__ = ["Cluster", "ClusterSpec", "EngineEntry", "ProcessFailed", "RouterEntry", "load"]
