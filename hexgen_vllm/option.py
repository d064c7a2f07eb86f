"""Options: frozen dataclasses that validate themselves and describe their own command line.

Every field carries its help text and bounds in its metadata. Command lines, JSON
(``--additional-config``) and YAML are all read through :func:`from_mapping` and
:func:`add_arguments`, so that a new option is one line in one place.
"""

from __future__ import annotations

import argparse
import logging
import math
import re
import sys
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, field, fields
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
from urllib.parse import urlsplit

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.wire import from_json

T = TypeVar("T")
V = TypeVar("V")

_LISTED: Final = 30  # as many names are read through for the right one

_LOG: Final = logging.getLogger(__name__)
RENAMED: Final = {"hexgen": "paper"}
"""Earlier names of policies and engine orders: taken for one release more, with a warning."""
_TRUTHS: Final = {True: ("true", "yes", "on"), False: ("false", "no", "off")}


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


def is_http_url(text: str) -> bool:
    """Return whether ``text`` is a URL that can be asked: http or https, a host, a port or none."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


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
            raise no_choice(f.name, value, meta["choices"])


def _todays(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, tuple):
        return tuple(_todays(one, renamed) for one in value)
    return todays_name(value, renamed) if isinstance(value, str) else value


def chosen_word(value: Any, choices: Collection[str]) -> Any:
    """Return the one of ``choices`` that YAML reads as a truth value (``off``), else ``value``."""
    if not isinstance(value, bool):
        return value
    return next((word for word in _TRUTHS[value] if word in choices), value)


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
    metas = {f.name: f.metadata for f in fields(cls) if f.metadata}
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
        meta: Mapping[str, Any] = metas.get(now, {})
        word = _todays(value, meta.get("renamed", {}))
        found[now] = chosen_word(word, meta.get("choices", ()))
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
            more = from_json(word) if word.startswith("{") else {key: float(number)}
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


def no_choice(name: str, value: object, choices: Iterable[str], others: str = "") -> ConfigError:
    """Return an error about ``value`` of option ``name``: none of ``choices`` nor of ``others``."""
    known = list(choices)
    near = _near(value, known) if isinstance(value, str) else ()
    meant = f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""
    words = ", ".join(known)
    return ConfigError(f"{name} must be one of {words}{others}, not {value!r}{meant}.")


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
