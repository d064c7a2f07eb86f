"""An agent that answers questions about SQLite databases, with one deadline per question.

    python -m examples.text2sql --base-url http://127.0.0.1:30000/v1 --model NAME

The pipeline has the shape of CHESS (arXiv 2405.16755): keywords and schema linking, two candidate
queries in parallel, revision guided by what the database says, unit tests and their evaluation in
parallel. Every call goes through :class:`hexgen_vllm.Workflow`. SQL that a model wrote runs in
:mod:`examples.text2sql.sandbox`, which only reads.
"""
