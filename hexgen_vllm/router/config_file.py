"""``hexgen-vllm router --config FILE``: options from YAML, by the names of their flags.

    worker-urls: [fast=http://10.0.0.1:8000, http://10.0.0.2:8000]
    policy: slack
    api-key: [k1]
    tenant-weights: {batch: 0.5}

What the command line gives goes first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from hexgen_vllm.cluster.located import Located, read
from hexgen_vllm.config import DispatchOptions, from_mapping
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.router.options import RouterOptions

Values = dict[str, Any]


def read_options(path: Path) -> tuple[Values, Values]:
    """Return the options of the router and of placement that a file gives.

    Raises:
        ConfigError: it cannot be read, or an option in it is unknown or wrong; one sentence that
            says in which line.
    """
    source = read(path)
    top = {} if source.value is None else source.value
    if not isinstance(top, Mapping):
        raise source.error((), "the file must be a mapping of options.")
    names = {f.name for f in fields(DispatchOptions)}
    keys = {key.replace("-", "_"): key for key in map(str, top)}
    values: Values = {name: top.get(key) for name, key in keys.items()}
    router = {name: value for name, value in values.items() if name not in names}
    dispatch = {name: value for name, value in values.items() if name in names}
    checked = _checked(source, keys, RouterOptions, router)
    return checked, _checked(source, keys, DispatchOptions, dispatch)


def _checked(source: Located, keys: Mapping[str, str], cls: type[Any], values: Values) -> Values:
    """Return ``values`` as ``cls`` takes them; an error names the line of the one that is wrong."""
    found: Values = {}
    for name, value in values.items():
        several = get_origin(get_type_hints(cls).get(name)) is tuple
        try:
            found[name] = _texts(name, value) if several else value
        except ConfigError as error:
            raise source.error((), error, key=keys[name]) from None
    problem = _problem(cls, found)
    if problem is None:
        return found
    # What is wrong alone is wrong in company; what needs company may be fine there.
    alone = (keys[n] for n, value in found.items() if _problem(cls, {n: value}) == problem)
    raise source.error((), problem, key=next(alone, None))


def _problem(cls: type[Any], values: Values) -> str | None:
    try:
        from_mapping(cls, values)
    except ConfigError as error:
        return str(error)
    return None


def _texts(name: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise ConfigError(f"{name} must be text or a list of texts.")
    return tuple(values)
