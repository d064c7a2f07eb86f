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

What YAML gives for an engine's composite keys becomes values of one shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from hexgen_vllm.cluster.commands import flags
from hexgen_vllm.cluster.ray_options import RayOptions, RayPlacement
from hexgen_vllm.cluster.spec import ClusterSpec, EngineEntry, RouterEntry
from hexgen_vllm.config import EngineOptions
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.option import from_mapping
from hexgen_vllm.yaml_files import (
    Key,
    Located,
    read,
)

_OWN_KEYS: Final = {  # arguments of vLLM that an entry has keys for
    "host": "host",
    "port": "port",
    "model": "model",
    "scheduling-policy": "scheduler",
}
_INHERITED_BY_COMMANDS: Final = ("host", "env", "device", "ray")
KEYS: Final = frozenset(f.name for f in fields(ClusterSpec)) | {"defaults"}
_BELOW: Final = frozenset(("defaults", "engines", "router"))
_GROUPS: Final[dict[str, tuple[type[Any], str]]] = {
    "hexgen": (EngineOptions, "hexgen option"),
    "ray": (RayPlacement, "ray key"),
}
_ROUTER_KEYS: Final = frozenset(f.name for f in fields(RouterEntry)) - {"options"}
Scalar = str | int | float
Args = list[str] | dict[str, Any]


def args(value: Any) -> Args:
    """Return arguments of vLLM, as a list of words or as a mapping of names without dashes.

    Raises:
        ConfigError: it is neither, or sets what the entry has a key for.
    """
    if isinstance(value, Mapping):
        named = {str(name).replace("_", "-"): item for name, item in value.items()}
        _refuse_own_keys(named)
        return named
    if not isinstance(value, list) or not all(_is_scalar(item) for item in value):
        raise ConfigError("args must be a list of words or a mapping.")
    words = [str(item) for item in value]
    given = [word.split("=", 1)[0] for word in words if word.startswith("--")]
    _refuse_own_keys({name[2:].replace("_", "-"): None for name in given})
    return words


def _refuse_own_keys(names: Mapping[str, Any]) -> None:
    for name, key in _OWN_KEYS.items():
        if name in names:
            raise ConfigError(f"args must not set {name}; the engine's own key {key} does.")


def merged_args(first: Args, second: Args) -> tuple[str, ...]:
    """Return the words of both; where they name the same argument ``second`` wins."""
    if isinstance(first, dict) and isinstance(second, dict):
        return tuple(flags({**first, **second}))
    return (*_words(first), *_words(second))


def _words(value: Args) -> list[str]:
    return flags(value) if isinstance(value, dict) else value


def env(value: Any) -> dict[str, str]:
    """Return environment variables; numbers become text.

    Raises:
        ConfigError: it is not a mapping of words and numbers.
    """
    if not isinstance(value, Mapping) or not all(_is_scalar(item) for item in value.values()):
        raise ConfigError("env must be a mapping of names to words or numbers.")
    return {str(name): str(item) for name, item in value.items()}


def device(value: Any) -> str:
    """Return the value of ``CUDA_VISIBLE_DEVICES``.

    Raises:
        ConfigError: it is neither a number nor text.
    """
    if not _is_scalar(value):
        raise ConfigError(f"device must be a number or text such as '0,1', not {value!r}.")
    return str(value)


def command(value: Any) -> tuple[str, ...]:
    """Return a command line.

    Raises:
        ConfigError: it is not a list of words.
    """
    if not isinstance(value, list) or not value or not all(_is_scalar(item) for item in value):
        raise ConfigError("command must be a list of words.")
    return tuple(str(item) for item in value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Scalar) and not isinstance(value, bool)


BY_KEY: Final[dict[str, Callable[[Any], Any]]] = {
    "args": args,
    "env": env,
    "device": device,
    "command": command,
}


def load(path: Path) -> ClusterSpec:
    """Read the cluster file ``path``.

    Raises:
        ConfigError: the file, a key or a value is wrong; one sentence says where.
    """
    return spec_in(read(path))


def spec_in(source: Located) -> ClusterSpec:
    """Return what a cluster file says that has been read.

    Raises:
        ConfigError: as :func:`load`.
    """
    top = source.mapping((), sorted(KEYS))
    defaults = _engine_values(source, ("defaults",)) if "defaults" in top else {}
    engines = _engines(source, defaults)
    router = _router(source) if "router" in top else RouterEntry()
    keys = {key: key for key in top if key not in _BELOW}
    given = source.given(ClusterSpec, (), keys)
    if "ray" in given:
        ray = given["ray"]
        source.built(("ray",), lambda: from_mapping(RayOptions, ray, where="ray key"))
    return source.built((), lambda: ClusterSpec(engines, router, **given))


def _engines(source: Located, defaults: Mapping[str, Any]) -> tuple[EngineEntry, ...]:
    listed = source.at(("engines",))
    if not isinstance(listed, list) or not listed:
        raise source.error(("engines",), "must be a list of at least one engine.")
    return tuple(_engine(source, ("engines", i), defaults) for i in range(len(listed)))


def _engine_values(source: Located, path: Key) -> dict[str, Any]:
    """Return the values at ``path``, each checked on its own."""
    keys = source.keys(EngineEntry, path, what="engine key")
    shaped = {name: key for name, key in keys.items() if name in BY_KEY}
    grouped = {name: key for name, key in keys.items() if name in _GROUPS}
    plain = {n: key for n, key in keys.items() if n not in shaped and n not in grouped}
    found = source.given(EngineEntry, path, plain)
    source.built(path, lambda: EngineEntry(**found), keys)
    for name, key in shaped.items():
        try:
            found[name] = BY_KEY[name](source.at((*path, key)))
        except ConfigError as error:
            raise source.error(path, error, key=key) from None
    for name, key in grouped.items():
        cls, what = _GROUPS[name]
        source.options(cls, (*path, key), what=what)
        found[name] = source.given(cls, (*path, key), source.keys(cls, (*path, key)))
    return found


def _engine(source: Located, path: Key, defaults: Mapping[str, Any]) -> EngineEntry:
    own = _engine_values(source, path)
    inherited = _inherited(own, defaults)
    values = {**inherited, **own}
    for key in ("env", "hexgen", "ray"):
        values[key] = {**inherited.get(key, {}), **own.get(key, {})}
    values["args"] = merged_args(inherited.get("args", {}), own.get("args", {}))
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
    given = source.mapping(path)
    own = source.given(RouterEntry, path, {key: key for key in given if key in _ROUTER_KEYS})
    options = {key: value for key, value in given.items() if key not in _ROUTER_KEYS}
    source.built(path, lambda: RouterEntry(**own))
    for key, value in options.items():
        try:
            RouterEntry(options={key: value})
        except ConfigError as error:
            raise source.error(path, error, key=key) from None
    return source.built(path, lambda: RouterEntry(**own, options=options))
