"""Engines placed and kept by Ray: ``python -m hexgen_vllm.serve --cluster FILE --backend ray``.

    nodes       the only importer of ray: clusters, what engines ask of nodes, hosts on them
    engines     those of an entry, as the supervisor sees them: placed, serving, lost, placed again
    router      the router beside the supervisor, and what it is told of engines
    autoscale   what the router says, and how many engines there should be
    supervisor  all of it together

Nothing here is loaded, and ray need not be installed, unless the backend is asked for. What
cluster files say about Ray is read by :mod:`hexgen_vllm.cluster.ray_options`.
"""

from __future__ import annotations
