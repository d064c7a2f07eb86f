"""``hexgen-vllm explain WORKFLOW``: where the time of a workflow went, call by call.

From a running router, which remembers the last thousand workflows that ended, or from a log of
one, which has the calls of those that were not on time.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.wire import from_json

_PATIENCE_S: Final = 10.0
_WIDTH: Final = 48
_PAIR: Final = re.compile(r"(\w+)=(\S*)")
_PARTS: Final[Mapping[str, str]] = {
    "queue": "waiting in the router",
    "retries": "tries on engines that failed",
    "prefill": "from sending to the first token, waiting in the engine included",
    "decode": "from the first token to the end",
    "engine": "in an engine, of answers that were no streams",
    "client": "between calls: the client's own work",
}
_MARKS: Final[Mapping[str, str]] = {
    "queue": ".",
    "retries": "x",
    "prefill": "=",
    "decode": "#",
    "engine": "#",
}
_TIMES: Final = ("came_s", "placed_s", "sent_s", "first_token_s", "ended_s")
_COUNTS: Final = ("tries", "migrations", "prompt_tokens", "cached_tokens", "output_tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("workflow", help="its id, as the client names it")
    parser.add_argument(
        "--base-url", default="http://127.0.0.1:30000", help="the router (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        help="key for the router (default: $OPENAI_API_KEY)",
    )
    parser.add_argument("--log", type=Path, help="read a log of the router instead of asking it")
    parser.add_argument("--json", action="store_true", help="print JSON")


def main(args: argparse.Namespace) -> int:
    """Print the account of a workflow.

    Raises:
        ConfigError: there is none, or nobody to ask.
    """
    if args.log is not None:
        account = from_log(args.log, args.workflow)
    else:
        account = _asked(args.base_url.rstrip("/"), args.workflow, args.api_key)
    print(json.dumps(account, indent=2) if args.json else told(account))
    return 0


def _asked(url: str, workflow: str, key: str | None) -> dict[str, Any]:
    url = url.removesuffix("/v1")
    headers = {} if not key else {"Authorization": f"Bearer {key}"}
    target = f"{url}/explain?session_id={quote(workflow, safe='')}"
    try:
        request = urllib.request.Request(target, headers=headers)
        with urllib.request.urlopen(request, timeout=_PATIENCE_S) as answer:
            account = from_json(answer.read())
    except urllib.error.HTTPError as error:
        raise ConfigError(_sentence(error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"no router answers at {url}: {reason}.") from None
    if not isinstance(account, dict) or "calls" not in account:
        raise ConfigError(f"{url} is no router of this version.")
    return account


def _sentence(error: urllib.error.HTTPError) -> str:
    try:
        return str(from_json(error.read())["error"]["message"])
    except (KeyError, TypeError, ValueError):
        return f"the router answered {error.code}."


def from_log(path: Path, workflow: str) -> dict[str, Any]:
    """Return the account of a workflow out of a log of the router, text or JSON.

    Raises:
        ConfigError: the log cannot be read or does not tell of it.
    """
    name = workflow.replace(" ", "-")
    found: dict[str, Any] | None = None
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if name not in line:
                    continue
                event, fields = _fields(line)
                if fields.get("workflow") != name:
                    continue
                if event.endswith("workflow ended"):
                    found = _workflow(fields)
                elif event.endswith("call of") and found is not None:
                    found["calls"].append(_call(fields))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None
    if found is None:
        raise ConfigError(f"{path} does not tell of workflow {workflow!r}.")
    return found


def _fields(line: str) -> tuple[str, dict[str, str]]:
    """Return what a line is about, and its fields as texts."""
    if line.startswith("{"):
        try:
            said = from_json(line)
        except ValueError:
            return "", {}
        return str(said.get("event")), {k: str(v) for k, v in said.items()}
    head = line.partition(" workflow=")[0]
    return head, dict(_PAIR.findall(line[len(head) :]))


def _workflow(fields: Mapping[str, str]) -> dict[str, Any]:
    return {
        **{name: fields.get(name, "") for name in ("workflow", "type", "outcome")},
        **{name: _number(fields.get(name)) for name in ("deadline_s", "took_s", "slack_s")},
        "demoted": fields.get("demoted") == "True",
        "parts": {name: _number(fields.get(f"{name}_s")) or 0.0 for name in _PARTS},
        "calls": [],
    }


def _call(fields: Mapping[str, str]) -> dict[str, Any]:
    texts = ("request_id", "stage", "outcome", "engine", "reason")
    return {
        **{name: fields.get(name, "") for name in texts},
        **{name: _number(fields.get(name)) for name in (*_TIMES, "slack_s")},
        **{name: _number(fields.get(name), int) for name in _COUNTS},
        "on_path": fields.get("on_path") == "True",
    }


def _number(text: str | None, kind: Callable[[str], float] = float) -> float | None:
    try:
        return None if text is None else kind(text)
    except ValueError:
        return None


def told(account: Mapping[str, Any]) -> str:
    """Return an account as text for people."""
    lines = [_headline(account), ""]
    took_s = max(account["took_s"] or 0.0, 1e-9)
    parts = {name: seconds for name, seconds in account["parts"].items() if seconds > 0.0005}
    for name, seconds in sorted(parts.items(), key=lambda part: -part[1]):
        share = f"{100 * seconds / took_s:.0f} %"
        lines.append(f"  {name:<8}{seconds:>9.3f} s {share:>6}  {_PARTS.get(name, '')}")
    calls = account["calls"]
    if calls:
        lines += ["", *_table(calls, took_s)]
        lines += ["", "* decided how long it took.  . queue  x failed tries  = to first token  "
                  "# after it, or all of an answer that was no stream"]  # fmt: skip
        lines += [
            f"{call['stage']}, request {call['request_id']}: {call['engine']}, because {why}"
            for call in calls
            if call["on_path"] and (why := call.get("why"))
        ]
    else:
        lines += ["", "Of its calls nothing is known: logs have those of workflows that are not "
                  "on time."]  # fmt: skip
    return "\n".join(lines)


def _headline(account: Mapping[str, Any]) -> str:
    slack_s, deadline_s, outcome = account["slack_s"], account["deadline_s"], account["outcome"]
    of = "without deadline" if deadline_s is None else f"of {deadline_s:.3f} s"
    how = f"{outcome}, took {account['took_s']:.3f} s {of}"
    if slack_s is not None:
        how += f", {abs(slack_s):.3f} s {'too late' if slack_s < 0 else 'to spare'}"
    more = ", demoted" if account["demoted"] else ""
    return f"workflow {account['workflow']} ({account['type']}): {how}{more}"


def _table(calls: list[Mapping[str, Any]], took_s: float) -> list[str]:
    rows = [("", "stage", "engine", "came", "took", "prompt", "cached", "output", "outcome", "")]
    rows += [
        (
            "*" if call["on_path"] else "",
            call["stage"],
            call["engine"] or "-",
            f"{call['came_s']:.2f}",
            f"{call['ended_s'] - call['came_s']:.2f}",
            *(
                "-" if call[name] is None else str(call[name])
                for name in ("prompt_tokens", "cached_tokens", "output_tokens")
            ),
            call["outcome"]
            + (f", {call['tries']} tries" if (call["tries"] or 0) > 1 else "")
            + (f", moved {call['migrations']}" if call.get("migrations") else ""),
            _bar(call, took_s),
        )
        for call in calls
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = range(3, 8)
    return [
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _bar(call: Mapping[str, Any], took_s: float) -> str:
    """Return the parts of a call on the time axis of its workflow."""
    ended_s = call["ended_s"]
    placed_s = ended_s if call["placed_s"] is None else call["placed_s"]
    sent_s = placed_s if call["sent_s"] is None else call["sent_s"]
    first_s = call["first_token_s"]
    if first_s is None or first_s < sent_s:
        first_s = sent_s
    begins = (
        (call["came_s"], "queue"),
        (placed_s, "retries"),
        (sent_s, "prefill"),
        (first_s, "decode"),
    )
    columns = [" "] * _WIDTH
    for (start_s, part), (end_s, _) in zip(begins, (*begins[1:], (ended_s, "")), strict=True):
        first, last = (min(int(_WIDTH * t / took_s), _WIDTH) for t in (start_s, end_s))
        columns[max(first, 0) : last] = _MARKS[part] * (last - max(first, 0))
    if not "".join(columns).strip():
        columns[min(int(_WIDTH * call["came_s"] / took_s), _WIDTH - 1)] = "|"
    return "".join(columns)
