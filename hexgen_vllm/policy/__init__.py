"""The decisions, as pure functions of values and ``now``.

    coordinator    the state machine that joins them; router and simulator drive it
    calls          what the policies hand each other about one call
    claims         what a client's deadline or priority counts for
    workflow       a workflow that has begun, and its calls
    workflows      all that have begun and not ended
    exchange       what several coordinators tell each other of them
    shapes         what comes after a call: remaining critical path, with the retry posterior
    estimates      length, tail and due time of a call, as the router sees them
    outlook        the same, as an engine learns it of its own calls
    cost           step cost of an engine, fitted online
    service_rates  the time that a call takes on an engine
    engine_load    what one engine is doing, and what one more call would mean there
    prefix_index   what its prefix cache probably holds
    engines        all of them, and which may get a call
    placements     every placement policy by name
    dispatch       what a placement is; the simple ones and the paper's
    marginal_cost  the default placement
    asked_prefixes prompt chunks that many calls ask for, as that placement charges for them
    rivals         placements of other systems
    disaggregation which engine computes the prompt where another answers
    queue          calls that wait for room, in order
    overload       hopeless test, bounds of the queue, fair shares
    protection     overload rules applied to open calls
    urgency        keys of waiting calls, and the heap that orders them
    order          where a call stands in an engine's order
    pace           which calls without deadline are left out of a step
    preemption     which running call gives way
    victims        the search for such calls, over the first few that wait
    returns        when a workflow comes back, and what its KV is worth until then
    retention      whether the KV of a preempted call is kept in host memory
    liveness       when a silent engine is taken for stalled
    scaling        how many engines there should be

Nothing here reads a clock, does I/O, logs, draws random numbers, or knows torch or vLLM.
"""
