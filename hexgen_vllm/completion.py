"""``hexgen-vllm completion bash|zsh|fish``: commands, options and their words for a shell.

    source <(hexgen-vllm completion bash)                       # in ~/.bashrc; zsh alike
    hexgen-vllm completion fish > ~/.config/fish/completions/hexgen-vllm.fish

The script is made from the parsers that read the options, and starts no Python when it is used.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final, NamedTuple

from hexgen_vllm.errors import ConfigError

SHELLS: Final = ("bash", "zsh", "fish")
_SEEN: Final = "__fish_seen_subcommand_from"


class Command(NamedTuple):
    """A command: its words, what it is for, and its options."""

    words: tuple[str, ...]
    about: str
    options: tuple[argparse.Action, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``hexgen-vllm completion``."""
    parser.add_argument("shell", choices=SHELLS, help="the shell")


def main(args: argparse.Namespace) -> int:
    """Print the script."""
    print(script(args.shell))
    return 0


def script(shell: str) -> str:
    """Return the script for one of :data:`SHELLS`."""
    commands = list(_commands())
    if shell == "fish":
        return "\n".join(_fish(commands))
    head = "#compdef hexgen-vllm\nautoload -U +X bashcompinit && bashcompinit\n"
    return f"{head if shell == 'zsh' else ''}{_bash(commands)}"


def _commands() -> Iterator[Command]:
    """Yield the commands that there are in this installation."""
    from hexgen_vllm import cli  # it imports this module for its command only

    for words, (_, about) in cli.COMMANDS.items():
        try:
            _, parser = cli.command(words)
        except (ConfigError, ImportError):  # of a clone, or of an extra that is not there
            continue
        shown = (one for one in parser._actions if one.help != argparse.SUPPRESS)
        yield Command(words, about, tuple(one for one in shown if one.option_strings))


def _bash(commands: list[Command]) -> str:
    firsts = dict.fromkeys(one.words[0] for one in commands)
    seconds: dict[str, list[str]] = {}
    for one in commands:
        if len(one.words) > 1:
            seconds.setdefault(one.words[0], []).append(one.words[1])
    groups = [f'        {name}) words="{" ".join(found)}" ;;' for name, found in seconds.items()]
    options, values = [], []
    for one in commands:
        name = " ".join(one.words)
        flags = " ".join(flag for action in one.options for flag in action.option_strings)
        options.append(f'        "{name}") words="{flags}" ;;')
        for action in one.options:
            if action.choices:
                keys = "|".join(f'"{name} {flag}"' for flag in action.option_strings)
                values.append(f'        {keys}) words="{" ".join(map(str, action.choices))}" ;;')
    lines = [
        "_hexgen_vllm() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}"',
        '    local command="${COMP_WORDS[1]}" words=""',
        "    COMPREPLY=()",
        "    if [ $COMP_CWORD -eq 1 ]; then",
        f'        COMPREPLY=($(compgen -W "{" ".join(firsts)}" -- "$current"))',
        "        return",
        "    fi",
        '    case "$command" in',
        *groups,
        "    esac",
        '    if [ -n "$words" ]; then',
        "        if [ $COMP_CWORD -eq 2 ]; then",
        '            COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "            return",
        "        fi",
        '        command="$command ${COMP_WORDS[2]}"',
        '        words=""',
        "    fi",
        '    case "$command $before" in',
        *values,
        "    esac",
        '    if [ -z "$words" ] && [[ "$current" == -* ]]; then',
        '        case "$command" in',
        *(f"    {line}" for line in options),
        "        esac",
        "    fi",
        '    COMPREPLY=($(compgen -W "$words" -- "$current"))',
        "}",
        "complete -o default -F _hexgen_vllm hexgen-vllm",
    ]
    return "\n".join(lines)


def _fish(commands: list[Command]) -> Iterator[str]:
    groups = sorted({one.words[0] for one in commands if len(one.words) > 1})
    top = f"not {_SEEN} {' '.join(dict.fromkeys(one.words[0] for one in commands))}"
    for name in groups:
        yield f"complete -c hexgen-vllm -f -n {_quoted(top)} -a {name}"
    for one in commands:
        *before, last = one.words
        if before:
            within = f"{_SEEN} {before[0]}"
            others = " ".join(c.words[1] for c in commands if c.words[:-1] == one.words[:-1])
            first, here = f"{within}; and not {_SEEN} {others}", f"{within}; and {_SEEN} {last}"
        else:
            inside = f"not {_SEEN} {' '.join(groups)}; and " if groups else ""
            first, here = top, f"{inside}{_SEEN} {last}"
        about = _quoted(one.about)
        yield f"complete -c hexgen-vllm -f -n {_quoted(first)} -a {last} -d {about}"
        for action in one.options:
            flags = " ".join(
                f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}"
                for flag in action.option_strings
            )
            value = "" if action.nargs == 0 else " -r"
            if action.choices:
                value += f" -f -a {_quoted(' '.join(map(str, action.choices)))}"
            text = _quoted(" ".join((action.help or "").replace("%%", "%").split()))
            yield f"complete -c hexgen-vllm -n {_quoted(here)} {flags}{value} -d {text}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
