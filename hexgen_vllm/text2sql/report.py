"""What came of a run: a line for each question, a table, and a JSON file."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

from hexgen_vllm.report import results
from hexgen_vllm.report.summary import min_deadline, percentile
from hexgen_vllm.report.table import aligned, seconds
from hexgen_vllm.text2sql.agent import End
from hexgen_vllm.text2sql.users import Visit
from hexgen_vllm.wire import plain

SHOWN_ROWS: Final = 5
TABLE_ROWS: Final = 50
CELL_CHARS: Final = 60
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_ENDS: Final = get_args(End)
_COLUMNS: Final = (
    "policy", "questions", "databases", *_ENDS, "served on time", "min deadline @95%", "P50",
    "P95", "execution match", "calls", "tokens out",
)  # fmt: skip

NOTE: Final = (
    "completed: the query ran; refused: it may not run; invalid: no query came that can run; "
    "failed: a call failed\nserved: no call failed, whatever came of the query; times in seconds, "
    "of what was served; the min deadline is the shortest in which 95 % of all questions were "
    "served\na match has the rows of the gold query"
)


def say(text: str) -> None:
    """Tell what is going on; the results themselves are on standard output."""
    print(f"text2sql: {text}", file=sys.stderr, flush=True)


def line(visit: Visit) -> str:
    """Return a visit in one line."""
    found, usage = visit.answer, visit.answer.usage
    rows = "no rows" if found.rows is None else f"{len(found.rows)} rows"
    tokens = f"{usage.prompt_tokens:>5}+{usage.output_tokens:<4}"
    met = "on time" if visit.on_time else "LATE" if visit.served else "FAILED"
    return (
        f"{visit.question.id:<11} {met:<7} "
        f"{seconds(visit.latency_s):>5} s  {_came_of(visit):<7} "
        f"{rows:>9}  {usage.calls:>2} calls  {tokens} tokens  "
        f"{found.error or ' '.join(found.sql.split())[:70]}"
    )


def _came_of(visit: Visit) -> str:
    if visit.answer.end != "completed":
        return visit.answer.end
    return "match" if visit.matches else "differs" if visit.question.gold else "-"


def summary(policy: str, visits: Sequence[Visit], rate: float) -> dict[str, Any]:
    """Return the figures of a run; counts are of questions asked, times in seconds."""
    latencies_s = [visit.latency_s if visit.served else None for visit in visits]
    known_s = [value for value in latencies_s if value is not None]
    deadline_s = visits[0].deadline_s
    return {
        "policy": policy,
        "questions": len(visits),
        "distinct_questions": len({visit.question.id for visit in visits}),
        "databases": len({visit.question.name for visit in visits}),
        **{end: sum(visit.answer.end == end for visit in visits) for end in _ENDS},
        "on_time": sum(visit.on_time for visit in visits),
        "execution_match": sum(visit.matches for visit in visits),
        "refused_queries": sum(visit.answer.refused_queries for visit in visits),
        "revisions": sum(visit.answer.rounds for visit in visits),
        "calls": sum(visit.answer.usage.calls for visit in visits),
        "prompt_tokens": sum(visit.answer.usage.prompt_tokens for visit in visits),
        "output_tokens": sum(visit.answer.usage.output_tokens for visit in visits),
        "rate": rate,
        "deadline_s": deadline_s,
        "min_deadline_95_s": plain(min_deadline(latencies_s, 0.95, deadline_s).seconds, 4),
        "p50_s": plain(percentile(known_s, 0.5), 4),
        "p95_s": plain(percentile(known_s, 0.95), 4),
    }


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return one line for each run."""
    return aligned(_COLUMNS, [_cells(found) for found in summaries])


def _cells(found: Mapping[str, Any]) -> list[str]:
    return [
        str(found["policy"]),
        str(found["questions"]),
        str(found["databases"]),
        *(str(found[end]) for end in _ENDS),
        f"{found['on_time']} ({found['on_time'] / found['questions']:.0%})",
        *(seconds(found[name]) for name in ("min_deadline_95_s", "p50_s", "p95_s")),
        str(found["execution_match"]),
        str(found["calls"]),
        str(found["output_tokens"]),
    ]


def answer(visit: Visit) -> str:
    """Return a question with its whole query and its result as a table."""
    found = visit.answer
    lines = [f"question: {visit.question.text}", "", found.sql or "(no query)", ""]
    if found.rows is None:
        lines.append(f"no result: {found.error}")
    else:
        shown = found.rows[:TABLE_ROWS]
        lines.append(aligned(found.columns, [[cell(value) for value in row] for row in shown]))
        more = len(found.rows) - len(shown)
        lines.append(f"… {more} more rows; --json has all of them" if more else "")
    met = "on time" if visit.on_time else "LATE" if visit.served else "FAILED"
    lines.append(
        f"{len(found.rows or ())} rows, {found.usage.calls} calls, "
        f"{found.usage.prompt_tokens}+{found.usage.output_tokens} tokens, "
        f"{seconds(visit.latency_s)} s, {met}\n"
    )
    return "\n".join(lines)


def cell(value: Any) -> str:
    """Return a value in one short line."""
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    text = _CONTROL.sub(" ", "NULL" if value is None else str(value))
    return text if len(text) <= CELL_CHARS else f"{text[: CELL_CHARS - 1]}…"


def answered(visit: Visit, *, whole: bool = False) -> dict[str, Any]:
    """Return a visit as one JSON object, with the first rows only unless ``whole``."""
    found, usage = visit.answer, visit.answer.usage
    return {
        "id": visit.question.id,
        "question": visit.question.text,
        "sql": found.sql,
        "columns": found.columns,
        "rows": None if found.rows is None else plain(found.rows[: None if whole else SHOWN_ROWS]),
        "row_count": None if found.rows is None else len(found.rows),
        "end": found.end,
        "error": found.error,
        "execution_match": visit.matches,
        "calls": usage.calls,
        "stages": usage.stages,
        "revisions": found.rounds,
        "prompt_tokens": usage.prompt_tokens,
        "output_tokens": usage.output_tokens,
        "latency_s": round(visit.latency_s, 4),
        "deadline_s": visit.deadline_s,
        "on_time": visit.on_time,
    }


def write(path: Path, summaries: Sequence[Mapping[str, Any]], visits: Sequence[Visit]) -> None:
    """Write the last run's figures and answers to ``path``, and the figures of all runs."""
    content = {**summaries[-1], "compare": summaries, "answers": [answered(v) for v in visits]}
    results.write(path, content)
