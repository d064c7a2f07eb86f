"""Reading what a model said. Models are not exact: what cannot be read is left out."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from sqlglot import exp
from sqlglot.errors import SqlglotError

from hexgen_vllm.text2sql.gate import COMMENT, STATEMENT_WORDS, parsed

_TAGS: Final = (
    "(?:[a-z]+:)?(?:think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad)"
)
_OPEN: Final = r"[<\[◁]"
_SHUT: Final = r"[>\]▷]"
_THOUGHT: Final = re.compile(
    rf"{_OPEN}({_TAGS})\b[^>\]▷]*{_SHUT}.*?(?:{_OPEN}/\1{_SHUT}|\Z)"
    r"|<\|begin_of_thought\|>.*?(?:<\|end_of_thought\|>|\Z)", re.DOTALL | re.I
)  # fmt: skip
_THOUGHT_END: Final = re.compile(rf"{_OPEN}/(?:{_TAGS}){_SHUT}|<\|end_of_thought\|>", re.I)
_CHANNEL: Final = re.compile(r"<\|channel\|>\s*final\s*(?:<\|[a-z_]+\|>[^<]*)*<\|message\|>", re.I)
_SPECIAL: Final = re.compile(r"<\|[a-z_]+\|>|<(?:end_of_turn|eos)>|</s>", re.IGNORECASE)
_ODD: Final = str.maketrans({
    "\u00a0": " ", "\u2003": " ", "\u202f": " ", "\u200b": None, "\ufeff": None,
    "\u2060": None, "；": ";", "\r": "\n",
})  # fmt: skip
_FENCE: Final = re.compile(
    r"(?P<mark>`{3,}|~{3,})[ \t]*(?P<label>[\w+#.-]*)(?P<rest>.*?)(?:(?P=mark)|\Z)", re.DOTALL
)
_SQL_LABELS: Final = frozenset((
    "sql", "sqlite", "sqlite3", "postgresql", "postgres", "psql", "plpgsql", "duckdb", "mysql",
    "tsql", "ansi", "query",
))  # fmt: skip
_TAGGED: Final = re.compile(
    r"[<\[](sql|query|sql_query|answer|code)[>\]](.*?)[<\[]/\1[>\]]", re.I | re.S
)
_INLINE: Final = re.compile(r"`([^`]+)`")
_BEGIN: Final = r"(?:SELECT|WITH|VALUES|FROM)"
_COMMENTS: Final = rf"(?:\s|\(|--[^\n]*\n|{COMMENT})*"
_LIKE_QUERY: Final = re.compile(rf"{_COMMENTS}{_BEGIN}\b", re.DOTALL | re.IGNORECASE)
_PROMPT: Final = r"(?:sqlite>|[\w-]+=[#>]|mysql>|D |>+|[-*•]|\d+[.)]|\.\.\.>)"
_LABEL: Final = r"(?:[#*_ ]*[A-Za-z][\w '’]{0,40}[*_]{0,3}[:：]\s*[*_]*\s*)"
_LINE_BEGIN: Final = re.compile(
    rf"^[ \t]*(?:{_PROMPT}[ \t]*)?{_LABEL}?(?=\(*{_BEGIN}\b)", re.MULTILINE | re.IGNORECASE
)
# Not "Select the best answer from the list": a sentence begins with one capital.
_UNREADABLE: Final = re.compile(
    r"\(*(?:(?:SELECT|select)\b.*\b(?i:FROM)\b|(?:WITH|with)\b.*\b(?i:SELECT)\b)", re.DOTALL
)
_IN_CODE: Final = re.compile(r"(\"\"\"|'''|\"|')\s*(?=(?:SELECT|WITH)\b)(.*?)\1", re.DOTALL | re.I)
# Each stops where it would begin anew, so that many without an end are read once.
_BOXED: Final = re.compile(r"\\boxed\{((?:(?!\\boxed\{).)*)\}", re.DOTALL)
_CDATA: Final = re.compile(r"<!\[CDATA\[((?:(?!<!\[CDATA\[).)*?)\]\]>", re.DOTALL)
_OPENING: Final = re.compile(r"[{\[]")
_BEGINS: Final = re.compile(r"\b(?:SELECT|WITH)\b", re.IGNORECASE)
_FROM: Final = re.compile(r"\bFROM\b", re.IGNORECASE)
_WRITES: Final = re.compile(
    r"\b(?:alter|copy|create|delete|drop|explain|insert|merge|replace|update)\b", re.IGNORECASE
)
_VERDICT: Final = re.compile(r"\b(pass|fail)\b", re.IGNORECASE)
_KEYS: Final = (
    "sql", "query", "sql_query", "sqlquery", "final_sql", "final_query", "sql_code", "statement",
    "answer", "final_answer", "code", "action_input", "input", "generated_sql", "sql_statement",
    "command", "output", "response", "result",
)  # fmt: skip


def without_thought(text: str) -> str:
    """Return ``text`` without what a reasoning model thinks aloud, as text that can be encoded."""
    final = list(_CHANNEL.finditer(text))
    if final:
        text = text[final[-1].end() :]
    text = _THOUGHT.sub("", text)
    ends = list(_THOUGHT_END.finditer(text))  # the opening tag was in the prompt, or forgotten
    if ends:
        text = text[ends[-1].end() :]
    return _SPECIAL.sub("", text).encode(errors="replace").decode().strip()


def query(text: str, dialect: str = "sqlite") -> str:
    """Return the query in an answer, or an empty string.

    In this order: the last block in a fence that begins like a query, a query in tags or in JSON,
    the last block that is labelled as SQL, and what begins like a query in the text itself, up to
    where it stops being one. Of several queries the last counts; several statements of which one
    is no query are returned as they are.

    Args:
        text: the answer without thoughts.
        dialect: what sqlglot calls its SQL.
    """
    text = _CDATA.sub(r"\1", text.replace("\r\n", "\n").translate(_ODD))
    if re.search(r"&(?:lt|gt|amp|quot|#\d+);", text):
        text = html.unescape(text)
    blocks = list(_blocks(text))
    found = (
        _last(body for _, body in blocks if _LIKE_QUERY.match(body))
        or _last(body for body in (m[2] for m in _TAGGED.finditer(text)) if _LIKE_QUERY.match(body))
        or _last(one for body in (*(b for _, b in blocks), text) for one in _in_json(body))
        or _last(m[2] for label, body in blocks if label not in _SQL_LABELS
                 for m in _IN_CODE.finditer(body))
        or _last(m[2] for label, body in blocks if label in _SQL_LABELS
                 for m in _IN_CODE.finditer(body) if m.start() == 0)
        or _last(body for label, body in blocks if label in _SQL_LABELS)
        or _bare(text, dialect)
        or _within(text, dialect)
    )  # fmt: skip
    return _one(found, dialect)


def _blocks(text: str) -> Iterator[tuple[str, str]]:
    """Yield what stands in fences, with the label in lower case."""
    for match in _FENCE.finditer(text):
        label, rest = match["label"].lower(), match["rest"]
        if rest[:1] not in ("\n", " ", "\t", "") or (label and _LIKE_QUERY.match(label + rest)):
            label, rest = "", match["label"] + rest  # all on the line of the fence
        elif "\n" in rest and not _LIKE_QUERY.match(rest.partition("\n")[0]):
            first, _, after = rest.partition("\n")
            rest = after if first.strip() else rest  # more words behind the label
        body = rest.strip()
        first, _, after = body.partition("\n")
        if first.strip().lower() in _SQL_LABELS:  # the label on a line of its own
            label, body = first.strip().lower(), after.strip()
        body = re.sub(rf"\A(?:{_PROMPT}[ \t]*)(?={_BEGIN}\b)", "", body, flags=re.IGNORECASE)
        yield label, body


def _last(found: Iterator[str]) -> str:
    return next(reversed([one for one in found if one.strip()]), "")


def _in_json(text: str) -> Iterator[str]:
    decoder, at = json.JSONDecoder(strict=False), 0
    while (opening := _OPENING.search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, opening.start())
        except (ValueError, RecursionError):
            at = opening.end()
            continue
        yield from _keyed(value)


def _keyed(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for one in value:
            yield from _keyed(one)
    elif isinstance(value, dict):
        for name, one in value.items():
            if isinstance(one, dict | list):
                yield from _keyed(one)
            elif isinstance(one, str):
                if one.lstrip()[:1] in ("{", "["):
                    yield from _in_json(one)
                elif "```" in one:
                    yield from (body for _, body in _blocks(one))
                elif name.lower() in _KEYS and _LIKE_QUERY.match(one):
                    yield one


def _bare(text: str, dialect: str) -> str:
    inline = [m[1] for m in _INLINE.finditer(text) if _LIKE_QUERY.match(m[1])]
    if inline and _reads(inline[-1], dialect) and 0 in islice(_starts(inline[-1]), 1):
        return inline[-1]
    starts = [match.end() for match in _LINE_BEGIN.finditer(text)]
    for start in starts:
        if cut := _cut(text[start:], dialect):
            return cut
    if inline and _reads(inline[-1], dialect):
        return inline[-1]
    for start in starts:  # nothing that can be read: what looks most like one
        paragraph = text[start:].split("\n\n", maxsplit=1)[0]
        if _UNREADABLE.match(paragraph):
            return paragraph
    return ""


def _within(text: str, dialect: str) -> str:
    """Return a query in quotes or in the middle of a line, when nothing else is one."""
    quoted = [m[2] for m in _IN_CODE.finditer(text)] + [m[1] for m in _BOXED.finditer(text)]
    if found := _last(one for one in quoted if _reads(one, dialect)):
        return found
    for start in islice(_starts(text), 5):
        before = text[text.rfind("\n", 0, start) + 1 : start]
        if not _WRITES.search(before) and (cut := _cut(text[start:], dialect)):
            return cut
    return ""


def _starts(text: str) -> Iterator[int]:
    """Yield where a query may begin within a line: before a FROM of the same line."""
    at = 0
    for line in text.split("\n"):
        last = max((match.start() for match in _FROM.finditer(line)), default=0)
        yield from (at + match.start() for match in _BEGINS.finditer(line, 0, last))
        at += len(line) + 1


def _cut(text: str, dialect: str) -> str:
    """Return the longest beginning of ``text`` that can be read: prose follows many a query."""
    ends = [match.start() for match in re.finditer(r"[\n;]", text)][:100]
    for end in (len(text), *reversed(ends)):
        if _reads(text[:end], dialect):
            return text[:end]
    return ""


def _reads(sql: str, dialect: str) -> bool:
    return any(_statements(sql, dialect))


def _statements(sql: str, dialect: str) -> list[Any]:
    """Return the statements of ``sql``; none when it cannot be read or one of them is no query."""
    try:
        found: list[Any] = [one for one in parsed(sql, dialect) if one is not None]
    except (SqlglotError, RecursionError):
        return []
    found = [one for one in found if not isinstance(one, exp.Semicolon)]
    return found if all(isinstance(one, exp.Query | exp.Values) for one in found) else []


def _one(sql: str, dialect: str) -> str:
    """Return the last of several queries, without what ends it."""
    sql = _trimmed(sql)
    head, semicolon, after = sql.rpartition(";")
    while semicolon and after.strip() and not _statements(after, dialect):
        if not _statements(head, dialect) or _begins_statement(after):
            return sql
        sql = _trimmed(head)  # prose behind a query
        head, semicolon, after = sql.rpartition(";")
    if semicolon and len(_statements(sql, dialect)) > 1:
        return _trimmed(after)
    return sql


def _begins_statement(text: str) -> bool:
    word = re.match(r"\W*(\w+)", text)
    return word is not None and word[1].lower() in STATEMENT_WORDS


def _trimmed(sql: str) -> str:
    return sql.strip().rstrip("; \n\t").strip("`").strip()


def lines(text: str, most: int) -> list[str]:
    """Return up to ``most`` lines without bullets, numbers, quotes, fences and empty ones."""
    found = (
        re.sub(r"^(?:\d+[.)]\s+|[-*•]\s*)+", "", line.strip()).strip("\"'`* ")
        for line in text.splitlines()
        if not line.lstrip().startswith(("```", "~~~"))
    )
    return [line for line in found if line][:most]


def links(text: str, names: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the tables and columns that ``text`` names, those only that are in ``names``.

    Case does not count unless two names differ in nothing else; quotes do not count at all.
    """
    longest = sorted(names, key=len, reverse=True)
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        said = re.sub(r"^[\s\d.)*•-]*(?=[\w\"`\[])", "", line).strip()
        plain = re.sub(r"[\"`\[\]*]", "", said)
        for same in (str, str.lower):
            table = next((name for name in longest if _heads(same(plain), same(name))), None)
            if table is not None:
                columns = plain[len(table) :].lstrip(" :(-")
                known = found.setdefault(table, [])
                known += [c for c in _among(columns, names[table]) if c not in known]
                break
    return found


def _heads(line: str, name: str) -> bool:
    """Return whether ``line`` names a table: the name, then the end or what begins its columns."""
    name = re.sub(r"[\"`\[\]*]", "", name)
    return (
        line.startswith(name) and re.match(r"\s*(?:[:(]|\Z|[-–—]\s)", line[len(name) :]) is not None
    )


def _among(text: str, columns: Sequence[str]) -> Iterator[str]:
    words = [word.strip(" ().;") for word in text.split(",")]
    for same in (str, str.lower):
        said = {same(word) for word in words} | {same(w.rpartition(".")[2]) for w in words}
        whole = [
            column
            for column in columns
            if same(bare := re.sub(r"[\"`\[\]*]", "", column)) in said
            or ("," in bare and same(bare) in same(text))
        ]
        if whole:
            yield from whole
            return


def passes(text: str) -> bool:
    """Return whether the last verdict in ``text`` is a pass."""
    found = _VERDICT.findall(text)
    return bool(found) and found[-1].lower() == "pass"
