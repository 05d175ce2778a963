"""Arguments of subcommands: faults are errors of ours, and a misspelt option gets a suggestion."""

import argparse
import difflib
from collections.abc import Sequence
from typing import NoReturn

from teacher_cache.errors import ConfigError


class ArgumentParser(argparse.ArgumentParser):
    """Parser of one subcommand that raises where argparse would print and exit."""

    def __init__(self, command: str, *, description: str, exit_codes: str) -> None:
        """Take the words that name the command, and what its exit codes mean."""
        super().__init__(
            prog=f"genrecal {command}",
            description=description,
            epilog=f"exit codes: {exit_codes}",
            allow_abbrev=False,
        )

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
        close = difflib.get_close_matches(argument.partition("=")[0], self._option_string_actions, n=1)
        return f"unknown option {argument!r}" + (f", did you mean {close[0]!r}?" if close else "")

    def add_config(self) -> None:
        """Take a run file; what the parser does not know then overrides its fields."""
        self.add_argument(
            "config",
            metavar="CONFIG",
            help="run file; --dotted.name VALUE overrides any of its fields; "
            "`genrecal config show CONFIG --help` lists them",
        )


def cache_parser(command: str, *, description: str, exit_codes: str) -> ArgumentParser:
    """Return the parser of a command about one cache: its URI and --json."""
    parser = ArgumentParser(command, description=description, exit_codes=exit_codes)
    parser.add_argument("uri", metavar="URI", help="where the cache lies: a path, file://, s3://, gs:// or az://")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    return parser
