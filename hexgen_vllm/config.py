"""Options: frozen dataclasses that validate themselves and describe their own command line.

Every field carries its help text and bounds in its metadata. Command lines, JSON
(``--additional-config``) and YAML are all read through :func:`from_mapping` and
:func:`add_arguments`, so that a new option is one line in one place.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from difflib import get_close_matches
from functools import cache, partial
from typing import (
    Any,
    Final,
    NamedTuple,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from hexgen_vllm.errors import ConfigError

T = TypeVar("T")
V = TypeVar("V")

_LISTED: Final = 30  # as many names are read through for the right one

_LOG: Final = logging.getLogger(__name__)
RENAMED: Final = {"hexgen": "paper"}
"""Earlier names of policies and engine orders: taken for one release more, with a warning."""


class Tuned(NamedTuple):
    """What a tuner may do with an option.

    Attributes:
        low, high: ends of the range that it searches, in the option's unit.
        policies: placements that the option has an effect on.
        log: whether it is searched by ratio instead of by difference.
    """

    low: float
    high: float
    policies: tuple[str, ...]
    log: bool = False


def option(  # noqa: PLR0913 - one for each fact
    default: Any,
    doc: str,
    *,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
    was: str = "",
    renamed: Mapping[str, str] | None = None,
    aliases: tuple[str, ...] = (),
    tuned: Tuned | None = None,
) -> Any:
    """Declare an option of a config dataclass.

    Args:
        default: its value when not given.
        doc: one line of help, with the unit.
        least: smallest legal number.
        most: largest legal number.
        choices: legal words.
        aliases: other names that it may be given by.
        was: an earlier name of the option, which is still taken.
        renamed: earlier words for values, which are still taken, and what they are now.
        tuned: what ``hexgen-vllm tune`` searches, ``None`` when nothing.
    """
    meta = {
        "doc": doc,
        "least": least,
        "most": most,
        "choices": choices,
        "aliases": aliases,
        "was": was,
        "renamed": renamed or {},
        "tuned": tuned,
    }
    if isinstance(default, tuple | dict | list):
        return field(default_factory=lambda: default, metadata=meta)
    return field(default=default, metadata=meta)


def shared(cls: type[Any], name: str) -> Any:
    """Declare an option that is option ``name`` of ``cls`` in another dataclass, too."""
    one = next(f for f in fields(cls) if f.name == name)
    return field(default=one.default, metadata=one.metadata)


def check(config: object) -> None:
    """Validate every declared bound of ``config``; earlier words for values become today's.

    Raises:
        ConfigError: a value is out of bounds; the message names the option.
    """
    for f in fields(config):  # type: ignore[arg-type]
        value, meta = getattr(config, f.name), f.metadata
        if value is None or not meta:
            continue
        if meta["renamed"]:
            value = _todays(value, meta["renamed"])
            object.__setattr__(config, f.name, value)  # frozen, and not yet in anybody's hands
        if isinstance(value, float | int) and not isinstance(value, bool):
            _check_number(f.name, value, meta["least"], meta["most"])
        if meta["choices"] and value not in meta["choices"]:
            words = ", ".join(meta["choices"])
            raise ConfigError(f"{f.name} must be one of {words}, not {value!r}.")


def _todays(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_todays(one, renamed) for one in value)
    return todays_name(value, renamed) if isinstance(value, str) else value


def todays_name(name: str, renamed: Mapping[str, str] = RENAMED) -> str:
    """Return what ``name`` is called today, and warn if it is an earlier name.

    Args:
        name: also of a variant, as ``hexgen a=0.4``.
        renamed: earlier names and today's.
    """
    first, blank, rest = name.partition(" ")
    if first not in renamed:
        return name
    _warn(f"the policy and order {first}", renamed[first])
    return f"{renamed[first]}{blank}{rest}"


def with_current_names(cls: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` by today's names of the options of ``cls``, and with today's words.

    Raises:
        ConfigError: an option is given under two of its names.
    """
    names = names_of(cls)
    earlier = {f.metadata["was"] for f in fields(cls) if f.metadata.get("was")}
    renamed = {f.name: f.metadata["renamed"] for f in fields(cls) if f.metadata}
    found: dict[str, Any] = {}
    for name, value in values.items():
        now = names.get(name, name)
        if name in earlier:
            _warn(name, now)
            if now in values:
                raise ConfigError(f"{name} is the earlier name of {now}; give one of them.")
        if now in found:
            first = next(n for n in values if names.get(n) == now)
            raise ConfigError(f"{first} and {name} are names of one option; give it once.")
        found[now] = _todays(value, renamed.get(now, {}))
    return found


@cache  # once in a process
def _warn(old: str, new: str) -> None:
    _LOG.warning("%s is now called %s; the old name goes with the next release.", old, new)


def _check_number(name: str, value: float, least: float | None, most: float | None) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, not {value}.")
    if least is not None and value < least:
        raise ConfigError(f"{name} must be at least {least:g}, not {value:g}.")
    if most is not None and value > most:
        raise ConfigError(f"{name} must be at most {most:g}, not {value:g}.")


# PyYAML takes 1e-05, as other programs write numbers, for text.
SCIENTIFIC: Final = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}")


def _plain_type(hint: Any) -> Any:
    """Return the type under ``X | None``."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(t for t in get_args(hint) if t is not type(None))
    return hint


def _converted(name: str, value: Any, hint: Any) -> Any:
    wanted = _plain_type(hint)
    if get_origin(wanted) is Mapping and isinstance(value, list | tuple):
        return _named_numbers(name, value)
    if value is None or wanted is Any or get_origin(wanted) is not None:
        return tuple(value) if get_origin(wanted) is tuple and value is not None else value
    if wanted is bool and not isinstance(value, bool):
        raise ConfigError(f"{name} must be true or false, not {value!r}.")
    if wanted in (int, float):
        if isinstance(value, str) and SCIENTIFIC.fullmatch(value):
            value = float(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{name} must be a number, not {value!r}.")
        if wanted is int and not (math.isfinite(value) and value == int(value)):
            raise ConfigError(f"{name} must be a whole number, not {value!r}.")
        return wanted(value)
    if wanted is str and not isinstance(value, str):
        raise ConfigError(f"{name} must be text, not {value!r}.")
    return value


def _named_numbers(name: str, words: Sequence[object]) -> dict[str, Any]:
    """Return what words such as ``a=2`` or ``{"a": 2}`` say together."""
    found: dict[str, Any] = {}
    for word in map(str, words):
        key, _, number = word.partition("=")
        try:
            more = json.loads(word) if word.startswith("{") else {key: float(number)}
        except ValueError:
            raise ConfigError(f"{name} must be like NAME=NUMBER, not {word!r}.") from None
        found |= more
    return found


def known_names(name: str, known: Iterable[str]) -> str:
    """Return ``known`` for a sentence about ``name``, which is none of them, and what was meant.

    Of many names only those that are like it are listed, if there are any.
    """
    names = list(known)
    near = _near(name, names)
    if not near:
        return ", ".join(names)
    others = f"{len(names) - len(near)} others"
    listed = names if len(names) <= _LISTED else [*near, others]
    return f"{', '.join(listed)} (did you mean {' or '.join(map(repr, near))}?)"


def _near(name: str, names: Sequence[str]) -> list[str]:
    """Return those of ``names`` that are most like ``name``, nearest first."""
    firsts = [set(letters) for letters in zip(name, *names, strict=False)]
    same = next((i for i, letters in enumerate(firsts) if len(letters) > 1), len(firsts))
    rest = {one[same:]: one for one in names}  # "--hexgen-" makes no two alike
    return [rest[one] for one in get_close_matches(name[same:].lower(), rest, n=2)]


def names_of(cls: type[Any]) -> dict[str, str]:
    """Return the option that each name means: names of ``cls``, their aliases and earlier names."""
    found = {f.name: f.name for f in fields(cls)}
    for f in fields(cls):
        found |= dict.fromkeys(f.metadata.get("aliases", ()), f.name)
        if f.metadata.get("was"):
            found[f.metadata["was"]] = f.name
    return found


def from_mapping(cls: type[T], values: Mapping[str, Any], *, where: str = "option") -> T:
    """Build config ``cls`` from decoded JSON or YAML.

    Raises:
        ConfigError: a name is unknown, or a value has the wrong type or is out of bounds.
    """
    hints = get_type_hints(cls)
    known = sorted(f.name for f in fields(cls))  # type: ignore[arg-type]
    values = with_current_names(cls, values)
    for name in values:
        if name not in known:
            raise ConfigError(f"unknown {where} {name!r}; known are {known_names(name, known)}.")
    return cls(**{n: _converted(n, v, hints[n]) for n, v in values.items()})


def add_arguments(parser: Any, cls: type[Any], *, prefix: str = "") -> None:
    """Add one ``--{prefix}{name}`` per option of ``cls``; nothing given leaves nothing set."""
    for f in fields(cls):
        add_argument(parser, cls, f.name, prefix=prefix)


def _add_earlier(parser: Any, one: Field[Any], prefix: str) -> None:
    """Take an option of text under its earlier flag as well, which the help leaves out."""

    class Earlier(argparse.Action):
        def __call__(
            self,
            parser: argparse.ArgumentParser,
            namespace: argparse.Namespace,
            values: Any,
            option_string: str | None = None,
        ) -> None:
            now = f"--{prefix}{one.name.replace('_', '-')}"
            _warn(option_string or "", now)
            setattr(namespace, self.dest, values)

    parser.add_argument(
        f"--{prefix}{one.metadata['was'].replace('_', '-')}",
        action=Earlier,
        dest=_dest(prefix, one.name),
        default=None,
        choices=one.metadata["choices"] or None,
        help=argparse.SUPPRESS,
    )


def add_argument(parser: Any, cls: type[Any], name: str, *, prefix: str = "") -> None:
    """Add the flag of option ``name`` of ``cls``, and those of its aliases."""
    f = next(f for f in fields(cls) if f.name == name)
    if not f.metadata or f.metadata.get("hidden"):
        return
    flags = [f"--{prefix}{n.replace('_', '-')}" for n in (name, *f.metadata["aliases"])]
    wanted = _plain_type(get_type_hints(cls)[name])
    text = f"{f.metadata['doc']}{_said_default(f)}".replace("%", "%%")
    common: dict[str, Any] = {"dest": _dest(prefix, name), "default": None, "help": text}
    if wanted is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **common)
    elif get_origin(wanted) is tuple:
        parser.add_argument(*flags, nargs="+", action="extend", **common)
    elif get_origin(wanted) is Mapping:
        parser.add_argument(*flags, nargs="+", metavar="NAME=NUMBER", **common)
    elif f.metadata["choices"]:
        word = partial(todays_name, renamed=f.metadata["renamed"])
        parser.add_argument(*flags, choices=f.metadata["choices"], type=word, **common)
    elif wanted in (int, float, str):
        parser.add_argument(*flags, type=wanted, metavar=wanted.__name__.upper(), **common)
    if f.metadata["was"]:
        _add_earlier(parser, f, prefix)


def _said_default(one: Field[Any]) -> str:
    """Return what help says of the default, in words of a command line; nothing for none."""
    value = one.default if one.default_factory is MISSING else one.default_factory()
    if value in (None, "", (), {}):
        return ""
    text = " ".join(map(str, value if isinstance(value, tuple) else (value,)))
    return f" (default: {text.lower() if isinstance(value, bool) else text})"


def _dest(prefix: str, name: str) -> str:
    return prefix.replace("-", "_") + name


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence and exit code 2; it says what was probably meant."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse, and remember the words for the sentence."""
        self._words = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and leave."""
        meant = dict.fromkeys(near for word in self._words for near in self._meant(word))
        hint = f" (did you mean {' or '.join(meant)}?)" if meant else ""
        self.exit(2, f"{self.prog}: {message.rstrip('.')}{hint}.\n")

    def _meant(self, word: str) -> Sequence[str]:
        """Return the options that are like ``word``, none if it is one or the beginning of one."""
        flag, known = word.partition("=")[0], list(self._option_string_actions)
        if not flag.startswith("--") or flag == "--" or any(k.startswith(flag) for k in known):
            return ()
        return _near(flag, [one for one in known if one.startswith("--")])


def given(args: argparse.Namespace, cls: type[Any], *, prefix: str = "") -> dict[str, Any]:
    """Return the options of ``cls`` that the command line set, by option name."""
    found = {f.name: getattr(args, _dest(prefix, f.name), None) for f in fields(cls)}
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class EngineOptions:
    """Options of the engine's scheduler (``additional_config["hexgen"]``, ``--hexgen-…``)."""

    order: str = option(
        "due",
        "order of calls with a deadline: due (deadline less what comes after the call), slack, "
        "paper (its urgency), edf or fcfs",
        choices=("due", "slack", "paper", "edf", "fcfs", "priority"),
        renamed=RENAMED,
    )
    demote_late: bool = option(
        True, "due: a call that cannot be on time any more comes after those that can"
    )
    pace: bool = option(
        True, "leave calls without deadline out of steps that would be too slow for the others"
    )
    interactive_share: float = option(
        0.95,
        "most that calls with a deadline may take of the turns and places of those without",
        least=0.0,
        most=1.0,
    )
    learned_file: str | None = option(
        None,
        "file that keeps what the engine has learned of lengths and of what follows calls across "
        "restarts; engine processes after the first add their data-parallel rank to its name",
    )
    default_deadline_s: float | None = option(
        None,
        "deadline of calls that bring none, seconds from their arrival; without it they have none "
        "and are served, by arrival, in what calls with deadlines leave",
        least=1e-3,
    )
    displace: bool = option(True, "let an urgent waiting call preempt running ones")
    displace_slack_s: float = option(
        2.0,
        "displace only for a call whose slack is below this, seconds",
        least=0.0,
        tuned=Tuned(0.2, 20.0, ("slack",), log=True),
    )
    displace_late_s: float = option(
        5.0, "nor for a call whose latest start passed longer ago than this, seconds", least=0.0
    )
    displace_gap_s: float = option(
        0.5,
        "a victim has at least this much more slack than the urgent call, seconds",
        least=0.0,
        tuned=Tuned(0.1, 20.0, ("slack",), log=True),
    )
    max_displacements: int = option(3, "times one call may be displaced", least=0)
    protect_last_tokens: int = option(
        16, "never displace a call with this few output tokens left", least=0
    )
    host_kv_gib: float = option(
        0.0, "host memory for the KV of preempted calls, GiB per engine; 0 is none", least=0.0
    )
    keep_kv: str = option(
        "auto",
        "with host_kv_gib: keep the KV of a preempted call when copying beats computing it again",
        choices=("auto", "always", "never"),
    )
    keep_ended_kv: bool = option(
        True, "with host_kv_gib: keep the KV of ended calls, too, if their workflow may come back"
    )
    max_priority: int | None = option(
        None,
        "highest priority of clients that counts, higher is sooner; for engines that clients reach "
        "themselves",
    )
    min_deadline_s: float = option(
        0.0, "shortest deadline of clients that counts, seconds; as max_priority", least=0.0
    )
    background_max_wait_s: float = option(
        120.0, "after this long a background call is ordered among the others, seconds", least=0.0
    )
    stats_port: int = option(
        0,
        "port on which the engine process itself gives its telemetry, plus its data-parallel rank; "
        "0 is none, but with vLLM's Rust server, which has none to give, that of --port + 10000",
        least=0,
        most=65535,
    )
    stats_host: str = option("127.0.0.1", "address for that port")
    batch_dir: str | None = option(
        None, "folder of files and batches (/v1/files, /v1/batches) of one engine; off by default"
    )
    prefill_tokens_per_s: float = option(
        5000.0, "prefill rate assumed until measured, tokens/s", least=1e-3
    )
    decode_tokens_per_s: float = option(
        50.0, "decode rate of one call assumed until measured, tokens/s", least=1e-3
    )

    def __post_init__(self) -> None:
        check(self)


PLACEMENT_NAMES: Final = (
    "slack",
    "paper",
    "round_robin",
    "least_outstanding",
    "earliest_finish",
    "weighted_round_robin",
    "weighted_least",
    "power_of_two",
    "sticky",
    "wlcaff",
    "llm_d",
    "cache_aware",
    "dynamo",
)


@dataclass(frozen=True)
class DispatchOptions:
    """Options of placement (the router and the simulator)."""

    policy: str = option(
        "slack",
        "how calls are placed: slack (ours), paper (HEXGEN-TEXT2SQL's), another of "
        "docs/policies.md, or FILE.py:Class",
        renamed=RENAMED,
    )
    alpha: float = option(
        0.2,
        "paper: weight of device speed against load",
        least=0.0,
        most=1.0,
        tuned=Tuned(0.0, 1.0, ("paper",)),
    )
    paper_form: str = option(
        "code",
        "paper: score of the public code or of the article",
        choices=("code", "paper"),
        was="hexgen_form",
    )
    beta: float = option(1.0, "paper, form paper: seconds squared that scale 1/t_queue", least=0.0)
    externality: float = option(
        1.0,
        "slack: weight of the time a call adds to others on the engine",
        least=0.0,
        tuned=Tuned(0.0, 2.0, ("slack",)),
    )
    stretch: float = option(
        3.0,
        "slack: power by which workflows weigh that are long against their deadline; 0 is equal",
        least=0.0,
        most=10.0,
        tuned=Tuned(0.0, 6.0, ("slack",)),
    )
    priority_by: str = option(
        "deadline",
        "what stock engines with priorities are told: the deadline, the workflow's work so far "
        "(PLAS) or its work left (SRPT); least first",
        choices=("deadline", "attained", "remaining"),
    )
    affinity_tokens: float = option(
        200.0,
        "wlcaff: uncached prompt tokens that count as one call",
        least=1.0,
        tuned=Tuned(50.0, 2000.0, ("wlcaff",), log=True),
    )
    prefix_affinity: bool = option(
        True, "slack: count the prefill that an engine's prefix cache saves"
    )
    hold_depth: int = option(
        2,
        "slack: calls an engine gets beyond its sequence slots; -1 places at once",
        least=-1,
        tuned=Tuned(0, 16, ("slack",)),
    )
    kv_transfer_rate: float = option(
        50_000.0,
        "tokens per second of KV that reach an engine of role decode, until it has shown it",
        least=1.0,
    )
    default_deadline_s: float = option(
        60.0, "deadline of workflows that bring none, seconds", least=1e-3
    )
    default_output_tokens: int = option(
        256, "output length assumed of a stage never seen, tokens", least=1
    )
    length_quantile: float = option(
        0.5,
        "quantile of output length that routing expects",
        least=0.0,
        most=1.0,
        tuned=Tuned(0.3, 0.95, ("slack",)),
    )
    slack_quantile: float = option(
        0.8,
        "quantile of the remaining path that slack allows for",
        least=0.0,
        most=1.0,
        tuned=Tuned(0.3, 0.95, ("slack", "paper")),
    )
    overload: str = option(
        "off",
        "protect, with policy slack: new workflows that would be late are refused, others that "
        "will be come last",
        choices=("off", "protect"),
    )
    hopeless_quantile: float = option(
        0.1, "protect: quantile of length and path of the hopeless test", least=0.0, most=1.0
    )
    hopeless_pace: float = option(
        1.5, "protect: hopeless test: time expected over time on the idle engine", least=1.0
    )
    entry_margin: float = option(
        2.0,
        "protect: a new workflow needs its predicted time times this when engines are full, and "
        "less, down to once, the emptier they are; 0 takes all",
        least=0.0,
    )
    reject_at_entry: bool = option(
        True, "protect: refuse new workflows that would be late; no demotes them instead"
    )
    background_share: float = option(
        0.05, "protect: share of placements for the call demoted longest", least=0.0, most=1.0
    )
    max_workflows: int = option(
        0, "workflows open at once; a new one beyond is refused, 0 is no limit", least=0
    )
    max_held_calls: int = option(
        0, "calls that may wait for room on an engine, 0 is no limit", least=0
    )
    max_held_tokens: int = option(
        0, "prompt and output tokens of calls that may wait, 0 is no limit", least=0
    )
    held_timeout_s: float = option(
        0.0, "a call that waited this long is refused, seconds; 0 is never", least=0.0
    )
    fair_window_tokens: int = option(
        -1,
        "tokens that a tenant may get beyond its share until calls of others go first; -1: that "
        "of 8 average calls, and only before calls that would become late; 0 is off",
        least=-1,
    )
    tenant_weights: Mapping[str, float] = option({}, "weights of tenants, 1 for others")

    def __post_init__(self) -> None:
        check(self)
        if self.policy not in PLACEMENT_NAMES and ".py:" not in self.policy:
            names = ", ".join(PLACEMENT_NAMES)
            raise ConfigError(
                f"policy must be one of {names} or FILE.py:Class, not {self.policy!r}."
            )
        for tenant, weight in self.tenant_weights.items():
            if type(weight) not in (int, float) or not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"tenant_weights of {tenant} must be a number above 0.")
