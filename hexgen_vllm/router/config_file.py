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
    router: Values = {}
    dispatch: Values = {}
    names = {f.name for f in fields(DispatchOptions)}
    for key, value in top.items():
        name = key.replace("-", "_")
        group, cls = (dispatch, DispatchOptions) if name in names else (router, RouterOptions)
        group[name] = _checked(source, key, cls, name, value)
    return router, dispatch


def _checked(source: Located, key: str, cls: type[Any], name: str, value: Any) -> Any:
    try:
        several = get_origin(get_type_hints(cls).get(name)) is tuple
        if several:
            value = _texts(name, value)
        from_mapping(cls, {name: value})
    except ConfigError as error:
        raise source.error((), error, key=key) from None
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in values):
        raise ConfigError(f"{name} must be text or a list of texts.")
    return tuple(values)
