"""The router: OpenAI endpoints in front of several engines.

    main        the command line
    app         routes, life cycle, the port for metrics
    routes      the one table of routes; endpoints: those of calls
    relay       one call from its arrival to its end
    batches     files and batches, in OpenAI's form
    admin       what operators change
    tuning      proposes and turns knobs from recent traffic
    status/     what the router shows of itself: pages, the overview at /ui
    context     what all of these share
    metrics     what happened, in Prometheus' form
    calls/      a request becomes a call, and an engine's answer the client's
    engines/    the engines, who of them gets calls, tries on them, discovery
    service     drives policy.coordinator with asyncio and a real clock
    observe/    ledger, logs, traces
    access      keys, origins, TLS; tenants: whose keys they are
    foreign     what a request says in words of other projects; words: which those are
    errors      every way in which a call ends
    options     the command line's; addresses: hosts and ports
    http/       the router's own HTTP server and client; knows nothing of the router
    processes/  several processes that share a port

Bodies and events pass through byte for byte; what engines are told travels in headers.
"""

from __future__ import annotations
