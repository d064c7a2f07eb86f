"""The options of our scheduler, as vLLM's configuration has them."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from hexgen_vllm.config import EngineOptions
from hexgen_vllm.errors import ConfigError, HexgenError
from hexgen_vllm.option import from_mapping


def options_of(vllm_config: Any) -> EngineOptions:
    """Read ``additional_config["hexgen"]``.

    Unless it says ``displace``, nobody is displaced where KV comes from other engines.

    Raises:
        ConfigError: it is not an object, or an option is unknown or out of bounds.
    """
    extra = getattr(vllm_config, "additional_config", None)
    values = extra.get("hexgen", {}) if isinstance(extra, dict) else {}
    if not isinstance(values, dict):
        raise ConfigError(f"additional_config.hexgen must be an object, not {values!r}.")
    if "displace" not in values:
        from hexgen_vllm.engine import compat  # fails where vLLM is too old, and loads it

        if compat.loads_from_others(vllm_config):
            values = {**values, "displace": False}
    return from_mapping(EngineOptions, values, where="hexgen option")


def summary(options: EngineOptions) -> str:
    """Return in one line what of urgency scheduling is on, as the engine says it at its start."""
    late = " (late calls last)" if options.order == "due" and options.demote_late else ""
    parts = [
        f"order {options.order}{late}",
        f"default deadline {_seconds(options.default_deadline_s)}",
        f"displacement {_displacement(options)}",
        f"pace {_switch(options.pace)}",
        f"interactive share {options.interactive_share:g}",
        f"host KV {_host_kv(options)}",
        f"limits of clients: priority {_or_none(options.max_priority)}, deadline at least "
        f"{_seconds(options.min_deadline_s or None)}",
    ]
    return f"Urgency scheduling: {'; '.join(parts)}."


def _displacement(options: EngineOptions) -> str:
    if not options.displace:
        return "off"
    slack, most = options.displace_slack_s, options.max_displacements
    return f"on below {slack:g} s of slack, at most {most} times a call"


def _host_kv(options: EngineOptions) -> str:
    return f"{options.host_kv_gib:g} GiB ({options.keep_kv})" if options.host_kv_gib else "off"


def _seconds(value: float | None) -> str:
    return "none" if value is None else f"{value:g} s"


def _or_none(value: int | None) -> str:
    return "none" if value is None else str(value)


def _switch(on: bool) -> str:
    return "on" if on else "off"


SCHEDULER: Final = "hexgen_vllm.UrgencyScheduler"


def is_ours(scheduler_cls: Any) -> bool:
    """Tell whether ``scheduler_cls`` (a class or its path) is our scheduler or made from it."""
    if scheduler_cls == SCHEDULER:
        return True
    if isinstance(scheduler_cls, str) and not scheduler_cls.startswith("vllm."):
        module, _, name = scheduler_cls.rpartition(".")
        try:
            scheduler_cls = getattr(import_module(module), name, None)
        except HexgenError:
            raise
        except Exception:  # of a module of somebody else: vLLM will say so in its own words
            return False
    return hasattr(scheduler_cls, "hexgen_stats")
