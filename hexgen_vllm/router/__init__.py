"""The router: OpenAI endpoints in front of several engines.

    app        routes, life cycle              (http_server, keys, tls, cors, pages, admin, ui_page)
    intake     a request becomes a Call        (endpoints, prompt, conventions, identity)
    service    drives policy.coordinator with asyncio and a real clock
    relay      bytes from engine to client     (outbound, engine_pool, attempt, passing, retry)
    fleet      the engines, who gets calls     (watchers, watcher, probe, reports, breaker, stalls)
    metrics    what happened                   (ledger, outcomes, overview, logs, tracing)
    shard      one of several processes        (shard_main, spot)
    main       the command line                (options, config_file)

Bodies and events pass through byte for byte; what engines are told travels in headers.
"""

from __future__ import annotations
