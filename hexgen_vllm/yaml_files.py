"""YAML whose every value remembers its line, so that an error can point at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from hexgen_vllm.errors import ConfigError

Key = tuple[str | int, ...]


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

    def error(self, path: Key, problem: object, *, key: str | None = None) -> ConfigError:
        """Return an error that names file, line and ``path`` before saying ``problem``.

        Args:
            path: the place; its nearest parent that is there gives the line.
            problem: a sentence.
            key: a key at ``path`` whose line is the better one; ``problem`` names it.
        """
        place = path if key is None else (*path, key)
        heads = (place[:n] for n in range(len(place), 0, -1))
        line = next((self.lines[head] for head in heads if head in self.lines), 1)
        at = f"{spelled(path)}: " if path else ""
        return ConfigError(f"{self.file} line {line}: {at}{problem}")


def spelled(path: Key) -> str:
    """Return ``path`` as in ``engines[0].port``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def read(path: Path) -> Located:
    """Read the YAML file ``path``.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has a key twice.
    """
    lines: dict[Key, int] = {}
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = None if node is None else _decoded(node, (), lines, str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {_reason(error)}.") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path} line {line}: not YAML, {error.problem}.") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {_reason(error)}.") from None
    return Located(str(path), value, lines)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply, or within itself"
    said = error.strerror if isinstance(error, OSError) else str(error)
    return " ".join((said or type(error).__name__).split()).rstrip(".")


def _decoded(node: yaml.Node, path: Key, lines: dict[Key, int], file: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_item(child, (*path, i), lines, file) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(node)
    found: dict[str, Any] = {}
    for key_node, child in node.value:
        key = str(_scalar(key_node))
        line = key_node.start_mark.line + 1
        if key in found:
            raise ConfigError(f"{file} line {line}: {spelled((*path, key))} is there twice.")
        lines[(*path, key)] = line
        found[key] = _decoded(child, (*path, key), lines, file)
    return found


def _item(node: yaml.Node, path: Key, lines: dict[Key, int], file: str) -> Any:
    lines[path] = node.start_mark.line + 1
    return _decoded(node, path, lines, file)


def _scalar(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except ValueError as error:  # looks like a date or a number, and is none
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None
    finally:
        loader.dispose()
