"""Engines placed and kept by Ray: ``python -m hexgen_vllm.serve --cluster FILE --backend ray``.

    keys        what the cluster file says about Ray
    library     the only importer of ray: connects to a cluster, or starts one
    demand      what an engine asks of a node, and whether any node can give it
    host        runs on the nodes: one engine process and its health
    replica     one engine's life, as the supervisor sees it: placed, serving, lost, placed again
    roster      tells the router which engines there are
    readings    what the router says, as numbers for :mod:`hexgen_vllm.policy.scaling`
    supervisor  all of it together

Nothing here is loaded, and ray need not be installed, unless the backend is asked for; only
:mod:`keys` is, to read cluster files.
"""

from __future__ import annotations
