"""The first two stages: which values a question means, and which tables and columns."""

from __future__ import annotations

import asyncio

from hexgen_vllm.text2sql import grammar, prompts, replies
from hexgen_vllm.text2sql.calls import Caller
from hexgen_vllm.text2sql.database import Database
from hexgen_vllm.text2sql.schema import Schema


async def linked_schema(
    caller: Caller, database: Database, schema: Schema, question: str
) -> Schema:
    """Return what of ``schema`` the question is about, with values that it may mean."""
    said = await caller.ask(
        "extract_keywords", "", prompts.keywords(question), grammar.keywords(question)
    )
    words = replies.lines(said, most=4)
    found = await asyncio.to_thread(database.find_values, schema, words)
    known = schema.with_values(found)
    names = known.names()
    said = await caller.ask(
        "schema_linking", "", prompts.links(known, question), grammar.links(names)
    )
    return known.only(replies.links(said, names))
