"""``hexgen-vllm patch status|apply|revert``: optional changes to the installed vLLM."""

from __future__ import annotations

import argparse
from pathlib import Path

from hexgen_vllm.errors import ConfigError
from hexgen_vllm.patch.tree import ABSENT, APPLIED, FOREIGN, Tree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line."""
    actions = ("status", "apply", "revert")
    parser.add_argument("action", choices=actions, metavar=f"{{{','.join(actions)}}}")
    parser.add_argument(
        "--vllm",
        type=Path,
        metavar="FOLDER",
        help="folder of the package vllm (default: the one that Python imports)",
    )


def main(args: argparse.Namespace) -> int:
    """Show, apply or revert all patches for the vLLM at hand; a patch that is done is left alone.

    Raises:
        ConfigError: there is no vLLM, no patch for it, or one does not fit; nothing is changed.
    """
    tree = Tree(args.vllm)
    print(f"vLLM {tree.version} in {tree.package}")
    if args.action == "status":
        for patch in tree.patches():
            print(f"  {patch.name}: {tree.status(patch)}")
        return 0
    _change(tree, args.action)
    return 0


def _change(tree: Tree, action: str) -> None:
    states = {patch.name: tree.status(patch) for patch in tree.patches()}
    if not states:
        raise ConfigError(f"there is no patch for vLLM {tree.version}, and none is needed.")
    strange = [name for name, state in states.items() if state == FOREIGN]
    if strange:
        raise ConfigError(
            f"patch {strange[0]} does not fit this vLLM {tree.version}; nothing was changed."
        )
    patches = tree.patches() if action == "apply" else reversed(tree.patches())
    for patch in patches:
        if action == "apply" and states[patch.name] == ABSENT:
            tree.apply(patch)
            print(f"  Files as they were end in {patch.suffix}. Restart a vLLM that runs.")
        elif action == "revert" and states[patch.name] == APPLIED:
            tree.revert(patch)
        print(f"  {patch.name}: {tree.status(patch)}")
