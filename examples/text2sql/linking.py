"""The first two stages: which values a question means, and which tables and columns."""

from __future__ import annotations

import asyncio
from pathlib import Path

from examples.text2sql import grammar, prompts, replies
from examples.text2sql.calls import Caller
from examples.text2sql.schema import Schema
from examples.text2sql.values import find_values


async def linked_schema(caller: Caller, path: Path, schema: Schema, question: str) -> Schema:
    """Return what of ``schema`` the question is about, with values that it may mean."""
    said = await caller.ask(
        "extract_keywords", "", prompts.keywords(question), grammar.keywords(question)
    )
    words = replies.lines(said, most=4)
    found = await asyncio.to_thread(find_values, path, schema, words)
    known = schema.with_values(found)
    names = known.names()
    said = await caller.ask(
        "schema_linking", "", prompts.links(known, question), grammar.links(names)
    )
    return known.only(replies.links(said, names))
