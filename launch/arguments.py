"""Arguments of subcommands: faults are errors of ours, a misspelt option gets a suggestion, help has an example."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from launch.suggestions import suggestion
from teacher_cache.errors import ConfigError

EXAMPLE_VALUES = {
    "CONFIG": "run.yaml",
    "URI": "runs/mine/cache",
    "FOLDER": "runs",
    "DIR": "runs/mine",
    "OUT": "exported",
    "CHECKPOINT": "runs/mine/training/small/distill",
    "NAME": "internvl2_5-8b_from_qwen2-vl-72b",
    "SHELL": "bash",
}
"""What an example gives for an argument that has to be there, by its name in the help."""


class ArgumentParser(argparse.ArgumentParser):
    """Parser of one subcommand that raises where argparse would print and exit."""

    def __init__(self, command: str, *, description: str, exit_codes: str, example: str = "") -> None:
        """Take the words that name the command.

        Args:
            command: As on the command line, `cache build`.
            description: What it does.
            exit_codes: What its exit codes mean.
            example: Arguments of the example in its help; by default only those that have to be there.
        """
        super().__init__(
            prog=f"genrecal {command}",
            description=description,
            epilog=f"exit codes: {exit_codes}",
            allow_abbrev=False,
        )
        self._example = example
        self.takes_run_file = False
        """Whether dotted overrides may follow."""

    @property
    def example(self) -> str:
        """Return a command line that works."""
        names = [str(action.metavar) for action in self.positionals() if action.nargs != "?"]
        needed = [EXAMPLE_VALUES.get(name, name) for name in names]
        return f"{self.prog} {self._example or ' '.join(needed)}".rstrip()

    def positionals(self) -> list[argparse.Action]:
        """Return the arguments that are given by their place."""
        return [action for action in self._actions if not action.option_strings]

    def options(self) -> list[argparse.Action]:
        """Return the arguments that are given by their name."""
        return [action for action in self._actions if action.option_strings]

    def format_help(self) -> str:
        """Return the help, with an example at its end."""
        return f"{super().format_help()}\nexample: {self.example}\n"

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all arguments.

        Raises:
            ConfigError: One is missing, unknown or wrong.
        """
        options, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return options

    def error(self, message: str) -> NoReturn:
        """Raise a usage error.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def _unknown(self, argument: str) -> str:
        if not argument.startswith("-"):
            return f"unexpected argument {argument!r}"
        name = argument.partition("=")[0]
        return f"unknown option {name!r}{suggestion(name, list(self._option_string_actions))}"

    def add_config(self, *, optional: bool = False) -> None:
        """Take a run file; what the parser does not know then overrides its fields."""
        self.takes_run_file = True
        self.add_argument(
            "config",
            metavar="CONFIG",
            nargs="?" if optional else None,
            help="run file; --dotted.name VALUE overrides any of its fields; `genrecal config example` lists them",
        )

    def add_json(self, what: str = "print everything as JSON") -> None:
        """Take --json."""
        self.add_argument("--json", action="store_true", help=what)


def cache_parser(command: str, *, description: str, exit_codes: str) -> ArgumentParser:
    """Return the parser of a command about one cache: its URI and --json."""
    parser = ArgumentParser(command, description=description, exit_codes=exit_codes)
    parser.add_argument("uri", metavar="URI", help="where the cache lies: a path, file://, s3://, gs:// or az://")
    parser.add_json()
    return parser


def run_parser(command: str, *, description: str, exit_codes: str, json: str = "", example: str = "") -> ArgumentParser:
    """Return the parser of a command about one run file, with --json where ``json`` says what it prints."""
    parser = ArgumentParser(command, description=description, exit_codes=exit_codes, example=example)
    parser.add_config()
    if json:
        parser.add_json(json)
    return parser
