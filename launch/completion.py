"""`genrecal completion`: shell functions that complete commands, options and fields of a run file."""

from collections.abc import Sequence
from typing import Literal, get_args

from launch.arguments import ArgumentParser
from launch.overrides import dotted_names
from launch.run_config import RunConfig

Shell = Literal["bash", "zsh"]

BASH = """\
# source <(genrecal completion bash)
_genrecal_words() {{
    case "$1" in
{cases}
    esac
}}
_genrecal() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" typed="${{COMP_WORDS[*]:1:COMP_CWORD-1}}"
    COMPREPLY=()
    if [[ "$current" == -* || $COMP_CWORD -eq 1 ]] || [[ $COMP_CWORD -eq 2 && -n "$(_genrecal_words "$typed")" ]]; then
        local two="${{COMP_WORDS[*]:1:2}}" one="${{COMP_WORDS[1]}}" words
        [[ $COMP_CWORD -eq 1 ]] && two="" one=""
        [[ $COMP_CWORD -eq 2 ]] && two="$one"
        words="$(_genrecal_words "$two")"
        [[ -z "$words" ]] && words="$(_genrecal_words "$one")"
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    fi
}}
complete -o default -F _genrecal genrecal
"""
ZSH = """\
#compdef genrecal
# source <(genrecal completion zsh), after compinit
_genrecal_words() {{
    case "$1" in
{cases}
    esac
}}
_genrecal() {{
    local found
    if (( CURRENT == 2 )); then
        found="$(_genrecal_words "")"
    elif (( CURRENT == 3 )); then
        found="$(_genrecal_words "${{words[2]}}")"
    else
        found="$(_genrecal_words "${{words[2]}} ${{words[3]}}")"
        [[ -z "$found" ]] && found="$(_genrecal_words "${{words[2]}}")"
    fi
    [[ -n "$found" ]] && compadd -- ${{=found}}
    [[ "${{words[CURRENT]}}" == -* ]] || _files
}}
compdef _genrecal genrecal
"""


def completion_parser() -> ArgumentParser:
    """Return the parser of `completion`."""
    parser = ArgumentParser(
        "completion",
        description="Print a script that completes commands, options and fields: source <(genrecal completion bash).",
        exit_codes="0 done, 2 wrong usage",
    )
    parser.add_argument("shell", metavar="SHELL", choices=get_args(Shell), help=" or ".join(get_args(Shell)))
    return parser


def completion_command(argv: Sequence[str]) -> int:
    """Print the completion script of a shell."""
    print(completion_script(completion_parser().parse(argv).shell), end="")
    return 0


def completion_script(shell: Shell) -> str:
    """Return the script, made from the table of commands and their parsers."""
    cases = "\n".join(f"        {typed!r}) echo {' '.join(words)!r} ;;" for typed, words in completions().items())
    return {"bash": BASH, "zsh": ZSH}[shell].format(cases=cases)


def completions() -> dict[str, list[str]]:
    """Return what may follow: the first words of commands after nothing, then second words, or a command's options."""
    from launch.cli import COMMANDS
    from launch.command_reference import parser_of

    fields = [f"--{name.replace('_', '-')}" for name in dotted_names(RunConfig)]
    found: dict[str, list[str]] = {"": sorted({name.partition(" ")[0] for name in COMMANDS})}
    for name in COMMANDS:
        first, _, second = name.partition(" ")
        if second:
            found.setdefault(first, []).append(second)
        parser = parser_of(name)
        options = [option for action in parser.options() for option in action.option_strings if option != "-h"]
        found.setdefault(name, []).extend([*options, *(fields if parser.takes_run_file else [])])
    return found
