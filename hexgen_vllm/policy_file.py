"""Placement policies from a file of one's own: ``FILE.py:Class``.

The class is made with the :class:`~hexgen_vllm.config.DispatchOptions` and has one method::

    def choose(self, demand, engines, claims, now):
        return the engine for demand, one of engines

as :meth:`hexgen_vllm.policy.dispatch.Dispatch.choose` describes it. It may also have
``placed(demand, choice, now)``, called once when a call is sent, and a true ``holds``: then calls
wait in the router while engines are full, as they do under ``slack``. It runs in the simulator,
the tuner and the router as it is. It must not read a clock or draw from an unseeded generator,
and must not change what it is given; ``hexgen-vllm check-policy`` finds out.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from hexgen_vllm.config import is_policy_file
from hexgen_vllm.errors import ConfigError
from hexgen_vllm.policy.placements import Placer, register


def load(name: str) -> None:
    """Make the policy ``FILE.py:Class`` known by that name; others are left alone.

    Raises:
        ConfigError: there is no such file or class, or the file cannot be run.
    """
    if is_policy_file(name):
        register(name, policy_class(name))


def policy_class(name: str) -> Placer:
    """Return the class that ``FILE.py:Class`` names.

    Raises:
        ConfigError: there is no such file or class, or the file cannot be run.
    """
    file, _, class_name = (name + ":" * name.endswith(".py")).rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"policy file {file} does not exist.")
    module_name = f"hexgen_policy_{abs(hash(path.resolve()))}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"policy file {file} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"policy file {file} fails with {_said(error)}") from error
    found = getattr(module, class_name, None)
    if not callable(found):
        lacks = f"has no class {class_name!r}" if class_name else "needs a class, FILE.py:Class"
        raise ConfigError(f"policy file {file} {lacks}; {_policies_in(module)}.")
    if not callable(getattr(found, "choose", None)):
        raise ConfigError(f"{class_name} of {file} has no method choose(demand, engines, ...).")
    made: Placer = found
    return made


def _policies_in(module: ModuleType) -> str:
    own = (c for c in vars(module).values() if getattr(c, "__module__", "") == module.__name__)
    names = [
        c.__name__ for c in own if isinstance(c, type) and callable(getattr(c, "choose", None))
    ]
    return f"it has {', '.join(names) or 'no policy'}"


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text.rstrip('.')}."
