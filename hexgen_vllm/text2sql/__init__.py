"""An agent that answers questions about a database, with one deadline per question.

    from openai import AsyncOpenAI
    from hexgen_vllm.text2sql import Agent, Database, Sampling

    with Database.open("chinook.sqlite") as database:
        agent = Agent(AsyncOpenAI(base_url=...), Sampling(model="..."), deadline_s=30)
        answer = await agent.answer(database, "Which artist has most albums?")

It needs ``pip install 'hexgen-vllm[text2sql]'``. The pipeline has the shape of CHESS (arXiv
2405.16755): keywords and schema linking, two candidate queries in parallel, revision guided by
what the database says, unit tests and their evaluation in parallel. Every call goes through
:class:`hexgen_vllm.Workflow`. Databases are those of SQLite, DuckDB and PostgreSQL;
:class:`Database` only reads, whatever a model writes, and :class:`Gate` says whether a query may
run.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from hexgen_vllm.text2sql.agent import Agent, SqlAnswer
    from hexgen_vllm.text2sql.calls import Sampling
    from hexgen_vllm.text2sql.database import Database
    from hexgen_vllm.text2sql.gate import Gate
    from hexgen_vllm.text2sql.outcome import QueryLimits, QueryOutcome

__all__ = ["Agent", "Database", "Gate", "QueryLimits", "QueryOutcome", "Sampling", "SqlAnswer"]

_HOMES: Final = {
    "Agent": "agent", "SqlAnswer": "agent", "Database": "database", "Gate": "gate",
    "QueryLimits": "outcome", "QueryOutcome": "outcome", "Sampling": "calls",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for: the command's options are read without the extra."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
