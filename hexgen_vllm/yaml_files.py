"""YAML files as typed values; every error is one sentence with file, line and key.

:func:`read` keeps the line of every key. :meth:`Located.options` makes a dataclass of
:func:`hexgen_vllm.option.option` fields out of a mapping, :meth:`Located.typed` any other type.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import SCIENTIFIC, chosen_word, known_names, with_current_names

T = TypeVar("T")
Key = tuple[str | int, ...]

_INDEX: Final = re.compile(r"\[([0-9]+)\]")
_MOST_VALUES: Final = 10**6  # aliases of aliases make as many as they like of a short file
_WORDS: Final[dict[Any, tuple[str, str]]] = {
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
}
"""How one value of a type is called, and several."""


class LocatedError(ConfigError):
    """A mistake in a file.

    Attributes:
        place: the path of what is wrong; nothing for the file as a whole.
        line: of it, counted from 1.
    """

    def __init__(self, message: str, place: Key, line: int) -> None:
        super().__init__(message)
        self.place, self.line = place, line


@dataclass(frozen=True)
class Located:
    """Decoded YAML with the line of every key and list item.

    Attributes:
        file: where it was read from.
        value: plain Python values.
        lines: line of each path, counted from 1; ``("engines", 0, "port")`` is a path.
    """

    file: str
    value: Any
    lines: Mapping[Key, int]

    def at(self, path: Key) -> Any:
        """Return the value at ``path``, ``None`` where there is none."""
        value = self.value
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def error(
        self, path: Key, problem: object, *, key: str | None = None, at: Key | None = None
    ) -> ConfigError:
        """Return an error that names file, line and ``path`` before saying ``problem``.

        Args:
            path: the place; its nearest parent that is there gives the line.
            problem: a sentence.
            key: a key at ``path`` whose line is the better one; ``problem`` names it.
            at: the place whose line it is, if that is another.
        """
        place = at or (path if key is None else (*path, key))
        heads = (place[:n] for n in range(len(place), 0, -1))
        line = next((self.lines[head] for head in heads if head in self.lines), 1)
        within = f"{spelled(path)}: " if path else ""
        return LocatedError(f"{self.file} line {line}: {within}{problem}", place, line)

    def mapping(
        self, path: Key, known: Collection[str] | None = None, what: str = "key"
    ) -> dict[str, Any]:
        """Return the mapping at ``path``.

        Args:
            path: the place.
            known: its legal keys; ``None`` is any.
            what: what a sentence calls its keys.

        Raises:
            ConfigError: it is none, or a key is unknown.
        """
        value = self.at(path)
        if not isinstance(value, dict):
            raise self.error(path, "must be a mapping.")
        for key in value:
            if known is not None and key not in known:
                raise self._unknown(path, what, key, known)
        return value

    def _unknown(self, path: Key, what: str, key: str, known: Collection[str]) -> ConfigError:
        names = known_names(key, known)
        return self.error(path, f"unknown {what} {key!r}; known are {names}.", key=key)

    def typed(self, hint: Any, path: Key, *, choices: Collection[str] = ()) -> Any:
        """Return the value at ``path`` as ``hint`` says, a tuple for a list where it says so.

        Args:
            hint: any type that msgspec converts to.
            path: the place.
            choices: legal words, so that ``off`` is one where YAML reads another thing.

        Raises:
            ConfigError: it is of another type.
        """
        value = chosen_word(self.at(path), choices)
        try:
            return msgspec.convert(_numbers(value, hint), hint)
        except msgspec.ValidationError as error:
            item = _INDEX.search(str(error).rpartition(" - at ")[2])
            place = (*path, int(item[1])) if item else path
            problem = mistyped(spelled(path[-1:]), value, hint)
            raise self.error(path[:-1], problem, at=place) from None

    def keys(
        self, cls: type[Any], path: Key, *, without: Collection[str] = (), what: str = "key"
    ) -> dict[str, str]:
        """Return the key that the mapping at ``path`` has for each option that it gives.

        Keys may be written with dashes, and by aliases and earlier names of options.

        Args:
            cls: a dataclass; its fields are the options.
            path: the place.
            without: legal keys that are no options.
            what: what a sentence calls the keys.

        Raises:
            ConfigError: a key is unknown, or two mean the same option.
        """
        names = [f.name for f in fields(cls) if f.name not in without]
        found: dict[str, str] = {}
        for key in self.mapping(path):
            if key in without:
                continue
            try:
                (name,) = with_current_names(cls, {key.replace("-", "_"): None})
            except ConfigError as error:
                raise self.error(path, error, key=key) from None
            if name not in names:
                raise self._unknown(path, what, key, (*without, *names))
            if name in found:
                first = found[name]
                raise self.error(
                    path, f"{first} and {key} are names of one option; give it once.", key=key
                )
            found[name] = key
        return found

    def given(self, cls: type[Any], path: Key, keys: Mapping[str, str]) -> dict[str, Any]:
        """Return the options of the dataclass ``cls`` that stand under ``keys`` at ``path``.

        Raises:
            ConfigError: a value is of the wrong type.
        """
        hints, metas = get_type_hints(cls), {f.name: f.metadata for f in fields(cls)}
        return {
            name: self.typed(hints[name], (*path, key), choices=metas[name].get("choices", ()))
            for name, key in keys.items()
        }

    def options(self, cls: type[T], path: Key, *, what: str = "key") -> T:
        """Return the mapping at ``path`` as a dataclass ``cls``.

        Raises:
            ConfigError: as :meth:`keys` and :meth:`given` say, or a value is out of bounds.
        """
        keys = self.keys(cls, path, what=what)
        given = self.given(cls, path, keys)
        return self.built(path, lambda: cls(**given), keys)

    def built(self, path: Key, build: Callable[[], T], keys: Mapping[str, str] | None = None) -> T:
        """Return what ``build`` makes of the mapping at ``path``.

        Args:
            path: the place.
            build: may refuse.
            keys: the key there for each option; by default every key is named as its option.

        Raises:
            ConfigError: what ``build`` raises, with the line of the first option that it names.
        """
        try:
            return build()
        except ConfigError as error:
            if keys is None:
                found = self.at(path)
                keys = {key: key for key in found} if isinstance(found, dict) else {}
            words = re.findall(r"\w+", str(error))
            named = next((keys[word] for word in words if word in keys), None)
            raise self.error(path, error, key=named) from None


def mistyped(name: str, value: object, hint: Any) -> ConfigError:
    """Return an error about ``value``, which is not what ``hint`` says."""
    wanted = _plain(hint)
    origin, args = get_origin(wanted), get_args(wanted)
    if origin in (tuple, list):
        return ConfigError(f"{name} must be a list of {_several(args[0])}.")
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return ConfigError(f"{name} must be a mapping of names to {_several(args[1])}.")
    if wanted is int and not isinstance(value, float):
        wanted = float  # that it must be whole does not matter yet
    kinds = args if origin in (Union, types.UnionType) else (wanted,)
    called = " or ".join(_WORDS[one][0] for one in kinds if one in _WORDS)
    return ConfigError(f"{name} must be {called}, not {value!r}.")


def _several(hint: Any) -> str:
    return _WORDS[hint][1] if hint in _WORDS else "values"


def _plain(hint: Any) -> Any:
    """Return the type under ``X | None``."""
    if get_origin(hint) in (Union, types.UnionType):
        found = [one for one in get_args(hint) if one is not types.NoneType]
        return found[0] if len(found) == 1 else hint
    return hint


def _numbers(value: Any, hint: Any) -> Any:
    """Return ``value`` with numbers where ``hint`` has them and YAML or msgspec see none."""
    wanted = _plain(hint)
    origin, args = get_origin(wanted), get_args(wanted)
    if isinstance(value, list) and origin in (tuple, list):
        return [_numbers(one, args[0]) for one in value]
    if isinstance(value, dict) and origin is not None and len(args) == 2:
        return {name: _numbers(one, args[1]) for name, one in value.items()}
    if wanted not in (int, float):
        return value
    if isinstance(value, str) and SCIENTIFIC.fullmatch(value):
        value = float(value)
    return int(value) if wanted is int and type(value) is float and value.is_integer() else value


def spelled(path: Key) -> str:
    """Return ``path`` as in ``engines[0].port``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def read(path: Path, twice: list[LocatedError] | None = None) -> Located:
    """Read the YAML file ``path``.

    Args:
        path: of the file.
        twice: gets the errors of keys that are there twice; without it the first one is raised.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has a key twice.
    """
    lines: dict[Key, int] = {}
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {_reason(error)}.") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None and _values(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError("it holds too many values")
        value = None if node is None else _decoded(node, (), lines, str(path), twice)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path} line {line}: not YAML, {error.problem}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {_reason(error)}.") from None
    return Located(str(path), value, lines)


class _Loader(yaml.SafeLoader):
    """PyYAML's own, whatever other libraries of the process have taken out of it."""


# Libraries change PyYAML's readers for the whole process: lm-format-enforcer, which vLLM imports,
# makes dates texts. So what these files depend on is written here.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:timestamp",
    re.compile(
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}$"
        r"|[0-9]{4}-[0-9]{1,2}-[0-9]{1,2}(?:[Tt]|[ \t]+)[0-9]{1,2}:[0-9]{2}:[0-9]{2}"
        r"(?:\.[0-9]*)?(?:[ \t]*(?:Z|[-+][0-9]{1,2}(?::[0-9]{2})?))?$"
    ),
    list("0123456789"),
)
for _kind in ("null", "bool", "int", "float", "timestamp", "str"):
    _construct = getattr(yaml.constructor.SafeConstructor, f"construct_yaml_{_kind}")
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or within itself"
    said = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((said or type(error).__name__).split()).rstrip(".")


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node holds, each as often as an alias repeats it."""
    if id(node) not in known:
        children: list[yaml.Node] = []
        if isinstance(node, yaml.CollectionNode):
            pairs = isinstance(node, yaml.MappingNode)
            children = [child for _, child in node.value] if pairs else node.value
        known[id(node)] = 1 + sum(_values(child, known) for child in children)
    return known[id(node)]


def _decoded(
    node: yaml.Node,
    path: Key,
    lines: dict[Key, int],
    file: str,
    twice: list[LocatedError] | None,
) -> Any:
    if isinstance(node, yaml.SequenceNode):
        items = []
        for i, child in enumerate(node.value):
            place: tuple[str | int, ...] = (*path, i)
            lines[place] = child.start_mark.line + 1
            items.append(_decoded(child, place, lines, file, twice))
        return items
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node)
    found: dict[str, Any] = {}
    for key_node, child in node.value:
        key = str(_scalar(key_node))
        line = key_node.start_mark.line + 1
        place = (*path, key)
        if key in found:
            error = LocatedError(
                f"{file} line {line}: {spelled(place)} is there twice.", place, line
            )
            if twice is None:
                raise error
            twice.append(error)
            continue
        lines[place] = line
        found[key] = _decoded(child, place, lines, file, twice)
    return found


def _scalar(node: yaml.Node) -> Any:
    loader = _Loader("")
    try:
        value = loader.construct_object(node, deep=True)
        if isinstance(value, str):
            _check_text(value)
    except (ValueError, LookupError, AttributeError) as error:
        # Looks like a date or a number and is none, or is said to be one.
        kind = node.tag.rpartition(":")[2]
        problem = str(error) if isinstance(error, ValueError) else f"{node.value!r} is no {kind}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None
    finally:
        loader.dispose()
    return value


def _check_text(text: str) -> None:
    """Refuse what no name, path or word of a command can hold.

    Raises:
        ValueError: there is such a character.
    """
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("a text holds a character that no name can have")
