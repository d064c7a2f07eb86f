"""Turns what YAML gives for an engine's composite keys into values of one shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from hexgen_vllm.cluster.commands import flags
from hexgen_vllm.cluster.ray.keys import Placement
from hexgen_vllm.config import from_mapping
from hexgen_vllm.errors import ConfigError

Scalar = str | int | float
Args = list[str] | dict[str, Any]

_OWN_KEYS: Final = {  # arguments of vLLM that an entry has keys for
    "host": "host",
    "port": "port",
    "model": "model",
    "scheduling-policy": "scheduler",
}


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


def hexgen(value: Any) -> dict[str, Any]:
    """Return options of the hexgen scheduler.

    Raises:
        ConfigError: it is not a mapping.
    """
    if not isinstance(value, Mapping):
        raise ConfigError("hexgen must be a mapping of scheduler options.")
    return {str(name).replace("-", "_"): item for name, item in value.items()}


def ray(value: Any) -> dict[str, Any]:
    """Return what an entry says about Ray, each value checked on its own.

    Raises:
        ConfigError: it is not a mapping, or a key or value is wrong.
    """
    if not isinstance(value, Mapping):
        raise ConfigError("ray must be a mapping such as {resources: {fast: 1}}.")
    found = {str(name).replace("-", "_"): item for name, item in value.items()}
    from_mapping(Placement, found, where="ray key")
    return found


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
    "hexgen": hexgen,
    "ray": ray,
    "device": device,
    "command": command,
}
