"""Recorded traffic of many formats, as workflows that the simulator plays.

    file ── records ──► a reader ──► TraceWorkflow ──► WorkflowSpec
            (lines)     (one for each    (model)           (specs)
                         format)             └──► a writer (formats)

Readers stream: they yield a workflow as soon as it is over, and hold only what is open.
"""
