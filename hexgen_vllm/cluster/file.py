"""Reads ``cluster.yaml``; every error is one sentence with file, line and place.

.. code-block:: yaml

    defaults:                     # for every engine that is a vLLM; an engine's own values win
      model: meta-llama/Llama-3.1-8B-Instruct
      args: {max-num-seqs: 64}
    engines:
      - {name: fast, device: 0}
      - {name: slow, device: 1, args: {max-num-seqs: 16}, hexgen: {default_deadline_s: 30}}
      - {name: other, url: "http://10.0.0.7:8000"}
    router: {port: 8080, policy: slack}
    restart: true
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.cluster import shapes
from hexgen_vllm.cluster.located import Key, Located, read
from hexgen_vllm.cluster.spec import ClusterSpec, EngineEntry, RouterEntry
from hexgen_vllm.config import from_mapping
from hexgen_vllm.errors import ConfigError

_INHERITED_BY_COMMANDS: Final = ("host", "env", "device", "ray")
_KEYS: Final = frozenset(f.name for f in fields(ClusterSpec)) | {"defaults"}
_ROUTER_KEYS: Final = frozenset(f.name for f in fields(RouterEntry)) - {"options"}


def load(path: Path) -> ClusterSpec:
    """Read the cluster file ``path``.

    Raises:
        ConfigError: the file, a key or a value is wrong; one sentence says where.
    """
    source = read(path)
    top = dict(_mapping(source, ()))
    for key in top:
        if key not in _KEYS:
            known = ", ".join(sorted(_KEYS))
            raise source.error((), f"unknown key {key!r}; known are {known}.", key=key)
    defaults = _engine_values(source, ("defaults",)) if "defaults" in top else {}
    top.pop("defaults", None)
    top["engines"] = _engines(source, defaults)
    if "router" in top:
        top["router"] = _router(source)
    engines = {"engines": top.pop("engines")}
    _located(source, (), "engines", ClusterSpec, engines)
    for key, value in top.items():
        _located(source, (), key, ClusterSpec, {**engines, key: value})
    return from_mapping(ClusterSpec, {**engines, **top})


def _mapping(source: Located, path: Key) -> Mapping[str, Any]:
    value = source.at(path)
    if not isinstance(value, Mapping):
        raise source.error(path, "must be a mapping.")
    return value


def _located(
    source: Located, path: Key, key: str, cls: type, values: Mapping[str, Any], what: str = "key"
) -> None:
    """Build ``cls`` from ``values``; a wrong one is an error on the line of ``key``."""
    try:
        from_mapping(cls, values, where=what)
    except ConfigError as error:
        raise source.error(path, error, key=key) from None


def _engines(source: Located, defaults: Mapping[str, Any]) -> tuple[EngineEntry, ...]:
    listed = source.at(()).get("engines")
    if not isinstance(listed, list) or not listed:
        raise source.error(("engines",), "must be a list of at least one engine.")
    return tuple(_engine(source, ("engines", i), defaults) for i in range(len(listed)))


def _engine_values(source: Located, path: Key) -> dict[str, Any]:
    """Return the values at ``path``, each checked on its own."""
    found: dict[str, Any] = {}
    for key, value in _mapping(source, path).items():
        if key not in shapes.BY_KEY:
            _located(source, path, key, EngineEntry, {key: value}, "engine key")
            found[key] = value
            continue
        try:
            found[key] = shapes.BY_KEY[key](value)
        except ConfigError as error:
            raise source.error(path, error, key=key) from None
    return found


def _engine(source: Located, path: Key, defaults: Mapping[str, Any]) -> EngineEntry:
    own = _engine_values(source, path)
    inherited = _inherited(own, defaults)
    values = {**inherited, **own}
    for key in ("env", "hexgen", "ray"):
        values[key] = {**inherited.get(key, {}), **own.get(key, {})}
    values["args"] = shapes.merged_args(inherited.get("args", {}), own.get("args", {}))
    try:
        entry = EngineEntry(**values)
        entry.check_whole()
    except ConfigError as error:
        raise source.error(path, error) from None
    return entry


def _inherited(own: Mapping[str, Any], defaults: Mapping[str, Any]) -> Mapping[str, Any]:
    if "url" in own:
        return {}
    if "command" in own:
        return {key: value for key, value in defaults.items() if key in _INHERITED_BY_COMMANDS}
    if own.get("scheduler", "hexgen") != "hexgen":  # options of another scheduler than its own
        return {key: value for key, value in defaults.items() if key != "hexgen"}
    return defaults


def _router(source: Located) -> RouterEntry | None:
    path: Key = ("router",)
    if source.at(path) is False:
        return None
    own: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for key, value in _mapping(source, path).items():
        is_own = key in _ROUTER_KEYS
        checked = {key: value} if is_own else {"options": {key: value}}
        _located(source, path, key, RouterEntry, checked)
        (own if is_own else options)[key] = value
    return RouterEntry(**own, options=options)
