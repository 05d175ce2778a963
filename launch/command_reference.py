"""The page about all commands, made from their parsers: ``python -m launch.command_reference > docs/commands.md``."""

import argparse
import importlib
from collections.abc import Iterator

from launch.arguments import ArgumentParser
from launch.cli import COMMANDS, GROUPS

HEADER = """# Commands

Made by `python -m launch.command_reference`. Commands with `CONFIG` take any field of the run file as
`--dotted.name VALUE` too; `genrecal config example` shows all of them.
"""


def parser_of(command: str) -> ArgumentParser:
    """Return the parser of a command: of `x_command` it is what `x_parser` beside it returns."""
    module, function = COMMANDS[command].target.split(":")
    return getattr(importlib.import_module(module), f"{function.removesuffix('_command')}_parser")()


def reference() -> str:
    """Return the page."""
    return "\n".join([HEADER, *(line for heading, firsts in GROUPS.items() for line in _group(heading, firsts))])


def _group(heading: str, firsts: tuple[str, ...]) -> Iterator[str]:
    yield f"## {heading[0].upper()}{heading[1:]}\n"
    for first in firsts:
        for name in COMMANDS:
            if name.partition(" ")[0] == first:
                yield from _command(name)


def _command(name: str) -> Iterator[str]:
    parser = parser_of(name)
    yield f"### genrecal {name}\n"
    yield f"{parser.description}\n"
    yield from (_argument(action) for action in [*parser.positionals(), *parser.options()] if action.dest != "help")
    yield f"- {parser.epilog}"
    yield f"- example: `{parser.example}`\n"


def _argument(action: argparse.Action) -> str:
    value = (
        "" if action.nargs == 0 else str(action.metavar or "|".join(map(str, action.choices or [action.dest.upper()])))
    )
    words = " ".join([*action.option_strings, *([value] if value else [])])
    return f"- `{words}`: {action.help}"


if __name__ == "__main__":
    print(reference(), end="")
