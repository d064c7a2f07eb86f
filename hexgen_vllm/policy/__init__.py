"""The decisions, as pure functions of values and ``now``.

    estimate     distributions learned from what was seen
    workflow     what comes after a call: remaining critical path, with the retry posterior
    cost_model   step cost of an engine, fitted online
    slack        latest start, slack, and the paper's stage budgets
    prefixes     what an engine's prefix cache probably holds
    load         what an engine is doing and what one more call would mean
    engines      the engines there are, and which of them a call may go to
    dispatch     which engine
    urgency      order of waiting calls
    preemption   which running call gives way
    overload     hopeless test, bounds of the queue, fair shares
    held         calls that wait for room, in order
    demand       length, tail and due time of a call
    protection   overload rules applied to open calls
    coordinator  the state machine that joins them; router and simulator drive it

Nothing here reads a clock, does I/O, logs, draws random numbers, or knows torch or vLLM.
"""
