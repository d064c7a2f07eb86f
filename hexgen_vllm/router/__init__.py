"""The router: OpenAI endpoints in front of several engines.

    app        routes, authentication, life cycle
    intake     a request becomes a Call     (endpoints, prompt, conventions, identity)
    service    drives policy.coordinator with asyncio and a real clock
    relay      bytes from engine to client  (outbound, attempt, watch, retry, answers)
    fleet      the engines                  (worker, probe, reports, watcher)
    metrics    what happened                (ledger)
    main       the command line             (options)

Bodies and events pass through byte for byte; what engines are told travels in headers.
"""

from __future__ import annotations
