"""``hexgen-vllm check FILE ...``: all mistakes of cluster, router and scenario files at once.

The readers of these files stop at the first mistake. Here each one that they find is put right in
what was read, by leaving the key out or by something harmless in the place of what is needed, and
the rest is read again. What is wrong only because of that is not said.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.cluster.file import KEYS as CLUSTER_KEYS
from hexgen_vllm.cluster.file import spec_in
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.main import options_in
from hexgen_vllm.router.options import GROUPS
from hexgen_vllm.sim.scenario_file import KEYS as SCENARIO_KEYS
from hexgen_vllm.sim.scenario_file import scenario_in
from hexgen_vllm.yaml_files import Key, Located, LocatedError, read

_ANY: Final = "*"
_MOST_TRIED: Final = 200  # things of a list that are left out one after the other
_NEAR: Final = 0.5  # what a key is worth that is only like one of a kind, to tell the kind


@dataclass(frozen=True)
class FileKind:
    """A kind of file.

    Attributes:
        name: as people call it.
        keys: what stands at its top.
        parse: reads it, and raises at its first mistake.
        stand_ins: what may take the place of what cannot be left out; ``*`` is any item of a list,
            and ``{}`` in a text becomes its number.
    """

    name: str
    keys: frozenset[str]
    parse: Callable[[Located], object]
    stand_ins: Mapping[Key, Any] = field(default_factory=dict)


def _with_trace(source: Located) -> None:
    trace = scenario_in(source).workload.trace
    if trace is not None and not Path(trace).is_file():
        raise source.error(("workload",), f"trace {trace} is not a file.", key="trace")


_ENGINE: Final = {"name": "stand-in-{}", "url": "http://127.0.0.1:1"}
KINDS: Final = (
    FileKind(
        "cluster",
        CLUSTER_KEYS,
        spec_in,
        {("engines",): [_ENGINE], ("engines", _ANY): _ENGINE},
    ),
    FileKind(
        "scenario",
        frozenset(SCENARIO_KEYS),
        _with_trace,
        {
            ("fleet",): "reference-4",
            ("fleet", _ANY): {"device": "A100", "name": "stand-in-{}"},
            ("arrivals",): {"loads": [0.5]},
            ("policies", _ANY): {"policy": "slack", "name": "stand-in {}"},
        },
    ),
    FileKind(
        "router",
        frozenset(name for names in GROUPS.values() for name in names if name != "config"),
        options_in,
    ),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm check``."""
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="YAML files")
    parser.add_argument(
        "--kind",
        choices=[kind.name for kind in KINDS],
        help="what they are; told by their keys otherwise",
    )


def main(args: argparse.Namespace) -> int:
    """Print every mistake on a line of its own; return 2 if there is any."""
    wrong = False
    for path in args.files:
        kind, mistakes = check(path, args.kind)
        for mistake in mistakes:
            print(f"hexgen-vllm check: {mistake}", file=sys.stderr)
        if not mistakes:
            print(f"{path}: a {kind} file without mistakes")
        wrong = wrong or bool(mistakes)
    return 2 if wrong else 0


def check(path: Path, name: str | None = None) -> tuple[str, list[ConfigError]]:
    """Return the kind of the file ``path`` and its mistakes, in the order of their lines.

    Args:
        path: of the file.
        name: of its kind; without it the keys tell.
    """
    twice: list[LocatedError] = []
    try:
        source = read(path, twice)
    except ConfigError as error:
        return name or "YAML", [error]
    kind = next((one for one in KINDS if one.name == name), None) or kind_of(source)
    located = [*twice, *_Mending(kind, source).mistakes()]
    return kind.name, sorted(located, key=lambda one: getattr(one, "line", 0))


def kind_of(source: Located) -> FileKind:
    """Return the kind whose keys the file has, or keys like them; one of a router if in doubt."""
    top = source.value if isinstance(source.value, Mapping) else {}

    def likeness(kind: FileKind) -> float:
        names = [key if kind.name != "router" else key.replace("-", "_") for key in top]
        near = [n for n in names if n not in kind.keys and get_close_matches(n, kind.keys, n=1)]
        return sum(n in kind.keys for n in names) + _NEAR * len(near)

    best = max(map(likeness, KINDS))
    return next(kind for kind in KINDS if likeness(kind) == best) if best else KINDS[-1]


class _Mending:
    """Reads a file again and again, each time without the mistake that was found last."""

    def __init__(self, kind: FileKind, source: Located) -> None:
        self._kind = kind
        self._source = replace(source, value=deepcopy(source.value))
        self._found: set[Key] = set()
        self._stood_in: set[Key] = set()

    def mistakes(self) -> Iterator[ConfigError]:
        """Yield the mistakes; the last one may be one that nothing can be put in place of."""
        while (error := self._mistake()) is not None:
            place = error.place if isinstance(error, LocatedError) else ()
            if not (isinstance(error, LocatedError) and self._follows(error)):
                yield error
            if self._leave_out_of(place, str(error)):
                continue
            self._found.add(place)
            if not self._mend(place):
                return

    def _mistake(self) -> ConfigError | None:
        try:
            self._kind.parse(self._source)
        except ConfigError as error:
            return error
        return None

    def _leave_out_of(self, place: Key, said: str) -> bool:
        """Leave out of what is at ``place`` the one of several things that is wrong, if it is one.

        What is said of a list or mapping may be about one thing in it; the others are still to be
        read.
        """
        whole = self._source.at(place)
        several = isinstance(whole, dict | list) and repr(whole) not in said
        if not several or len(whole) > _MOST_TRIED or self._stand_in(place) is not None:
            return False
        before = self._source
        for key in whole if isinstance(whole, dict) else range(len(whole)):
            self._source = replace(before, value=deepcopy(before.value))
            del self._source.at(place)[key]
            then = self._mistake()
            if then is None or (str(then) != said and not _needs(then, (*place, key))):
                return True
        self._source = before
        return False

    def _follows(self, error: LocatedError) -> bool:
        """Return whether it is about what has been left out here."""
        place = error.place
        heads = {place[:n] for n in range(1, len(place) + 1)}
        if not heads.isdisjoint(self._stood_in) or (place and place in self._found):
            return True
        words = set(re.findall(r"\w+", str(error).partition(": ")[2].replace("-", "_")))
        gone = [one for one in self._found if one and one[: len(place)] == place]
        return any(str(one[-1]).replace("-", "_") in words for one in gone)

    def _mend(self, place: Key) -> bool:
        """Put right what is at ``place``, or what it is part of; return whether that can be."""
        heads = [place[:n] for n in range(len(place), 0, -1)]
        needed = [one for one in self._kind.stand_ins if len(one) == 1 and not place]
        for head in (*heads, *(one for one in needed if self._source.at(one) is None)):
            wanted = self._stand_in(head)
            if wanted is None:
                if self._drop(head):
                    return True
            elif head not in self._stood_in:
                self._stood_in.add(head)
                return self._put(head, wanted)
        return False

    def _stand_in(self, place: Key) -> Any:
        pattern = tuple(_ANY if isinstance(part, int) else part for part in place)
        found = self._kind.stand_ins.get(pattern)
        if _ANY not in pattern or found is None:
            return found
        return {key: text.replace("{}", str(place[-1])) for key, text in found.items()}

    def _drop(self, place: Key) -> bool:
        parent = self._source.at(place[:-1])
        if isinstance(parent, dict) and place[-1] in parent:
            del parent[str(place[-1])]
            self._found.add(place)
            return True
        return False

    def _put(self, place: Key, value: Any) -> bool:
        parent = self._source.at(place[:-1])
        if isinstance(parent, dict) or (isinstance(parent, list) and isinstance(place[-1], int)):
            parent[place[-1]] = value  # type: ignore[index]
            return True
        return False


def _needs(error: ConfigError, place: Key) -> bool:
    """Return whether ``error`` says that what was at ``place`` is missing."""
    at = error.place if isinstance(error, LocatedError) else ()
    name = re.escape(str(place[-1]))
    named = rf"'{name}'|: {name}\b"
    return at[: len(place)] == place or re.search(named, str(error)) is not None
