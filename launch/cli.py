"""The `genrecal` command: one table of subcommands, each imported when it is called.

Exit codes: 0 done, 1 failed, 2 usage or config, 3 incomplete (a retry makes sense), 4 identity or
integrity (a retry is useless), 128 + n on signal n.
"""

import importlib
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType

from launch.secrets import redact
from launch.suggestions import suggestion
from teacher_cache.errors import GenrecalError


@dataclass(frozen=True, kw_only=True)
class Command:
    """One subcommand: where its function is (``module:function``), its arguments and one line of help."""

    target: str
    arguments: str
    help: str


GROUPS = {
    "the whole job": ("run", "demo", "doctor", "report"),
    "the teacher cache": ("data", "cache"),
    "students": ("train", "eval", "export", "reshard", "study"),
    "clusters": ("submit", "jobs"),
    "settings": ("config", "completion"),
}
"""Headings of the overview, and the first words of the commands under each."""

COMMANDS = {
    "demo": Command(
        target="launch.demo.run:demo_command",
        arguments="[--output DIR]",
        help="the whole job on this machine's CPU, with real handwritten digits",
    ),
    "run": Command(
        target="launch.pipeline:run_command",
        arguments="CONFIG",
        help="cache, train, evaluate and report every student; skips what is complete",
    ),
    "data fetch": Command(
        target="launch.data_commands:fetch_command",
        arguments="SOURCE TARGET --host HOST",
        help="fetch the images that a data file gives as URLs, from named hosts",
    ),
    "cache plan": Command(
        target="launch.plan:plan_command",
        arguments="CONFIG",
        help="tokens, bytes, shards, GPU-hours and break-even; runs nothing",
    ),
    "cache answers": Command(
        target="launch.cache_commands:answers_command",
        arguments="CONFIG",
        help="have the teacher replace very short answers before the build",
    ),
    "cache build": Command(
        target="launch.cache_commands:build_command",
        arguments="CONFIG",
        help="run or resume the Ray job that fills the cache",
    ),
    "cache status": Command(
        target="launch.cache_commands:status_command",
        arguments="URI",
        help="committed and missing shards, samples, bytes by tier",
    ),
    "cache inspect": Command(
        target="launch.cache_commands:inspect_command",
        arguments="URI [--sample ID]",
        help="identity, origin and digest, or one sample decoded",
    ),
    "cache verify": Command(
        target="launch.cache_upkeep:verify_command",
        arguments="URI [--level LEVEL] [--trusted-digest HEX]",
        help="check every stored byte against what was committed",
    ),
    "cache repair": Command(
        target="launch.cache_upkeep:repair_command",
        arguments="URI",
        help="give up what is damaged; the next build computes it again",
    ),
    "cache gc": Command(
        target="launch.cache_upkeep:gc_command",
        arguments="URI [--drop-question-rows]",
        help="remove what killed builds left; on request tier Q",
    ),
    "cache diff": Command(
        target="launch.cache_comparison:diff_command",
        arguments="URI URI",
        help="what two caches do not have in common",
    ),
    "cache find": Command(
        target="launch.cache_comparison:find_command",
        arguments="FOLDER CONFIG",
        help="which caches under a folder serve a run file",
    ),
    "train": Command(
        target="launch.train_commands:train_command",
        arguments="CONFIG [--student NAME] [--stage STAGE]",
        help="distil one student from the cache; resumes by itself",
    ),
    "eval": Command(
        target="launch.train_commands:eval_command",
        arguments="CONFIG | --suite NAME,... --student DIR",
        help="score the teacher and every student on held-out data, or students on published benchmarks",
    ),
    "export": Command(
        target="launch.train_commands:export_command",
        arguments="CHECKPOINT OUT",
        help="write the student of a stage or of a checkpoint as a Hugging Face directory",
    ),
    "reshard": Command(
        target="launch.train_commands:reshard_command",
        arguments="RUN/training/STUDENT/STAGE",
        help="make a checkpoint readable by another number of processes",
    ),
    "report": Command(
        target="launch.report:report_command",
        arguments="DIR",
        help="write report.html of a run",
    ),
    "study": Command(
        target="launch.study.command:study_command",
        arguments="CONFIG [--report]",
        help="run arms, seeds and pairs of teacher and student alike, and compare them",
    ),
    "submit slurm": Command(
        target="launch.clusters.submit:slurm_command",
        arguments="CONFIG [--plan]",
        help="submit cache, training and report to Slurm; --plan only prints the scripts",
    ),
    "submit ray": Command(
        target="launch.clusters.submit:ray_command",
        arguments="CONFIG [--plan] [--insecure]",
        help="submit them to a Ray cluster that runs already",
    ),
    "submit kuberay": Command(
        target="launch.clusters.submit:kuberay_command",
        arguments="CONFIG [--plan]",
        help="submit them to Kubernetes with KubeRay; --plan prints pure YAML",
    ),
    "jobs": Command(
        target="launch.clusters.listing:jobs_command",
        arguments="[DIR]",
        help="what was submitted from the runs under a folder, and how it stands",
    ),
    "doctor": Command(
        target="launch.doctor:doctor_command",
        arguments="[CONFIG]",
        help="whether this machine, and a run file, are fit to run; with remedies",
    ),
    "config show": Command(
        target="launch.config_commands:show_command",
        arguments="CONFIG",
        help="print the run file with all defaults filled in",
    ),
    "config schema": Command(
        target="launch.config_commands:schema_command",
        arguments="",
        help="print the JSON schema of run files",
    ),
    "config example": Command(
        target="launch.config_commands:example_command",
        arguments="",
        help="print a run file with every field, its default and what it means",
    ),
    "completion": Command(
        target="launch.completion:completion_command",
        arguments="SHELL",
        help="print what completes commands and options in bash or zsh",
    ),
}


class SystemFault(GenrecalError):
    """A file, folder or connection that the operating system refused."""

    code = "system"


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].startswith("--local_rank="):
        argv = argv[1:]  # put first by DeepSpeed's launcher, which sets LOCAL_RANK too
    signal.signal(signal.SIGTERM, _unwind)
    sys.excepthook = _print_redacted
    name, rest = split_command(argv)
    try:
        try:
            return _call(name, rest)
        finally:
            sys.stdout.flush()  # at exit Python would report a reader that has gone in words of its own
    except GenrecalError as error:
        return _tell(name, error)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _silence_unread_output():
            return 128 + signal.SIGPIPE
        # for the log file, where there is one: no handler for the console takes this name
        logging.getLogger("genrecal").info("what the operating system refused, and where", exc_info=error)
        return _tell(name, SystemFault(_in_a_line(error)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _call(name: str | None, rest: list[str]) -> int:
    if name is not None:
        module, function = COMMANDS[name].target.split(":")
        return getattr(importlib.import_module(module), function)(rest)
    if not rest or rest[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    print(f"genrecal: {_no_command(rest)}", file=sys.stderr)
    return 2


def _tell(name: str | None, error: GenrecalError) -> int:
    command = "genrecal" if name is None else f"genrecal {name}"
    print(redact(f"{command}: error [{error.code}]: {error}"), file=sys.stderr)
    return error.exit_code


def _in_a_line(error: OSError) -> str:
    words = error.strerror or str(error).partition("\n")[0] or type(error).__name__
    places = [str(place) for place in (error.filename, error.filename2) if place is not None]
    return f"{' -> '.join(places)}: {words}" if places else words


def _silence_unread_output() -> bool:
    """Return whether nobody reads this process's output any more; what is left of it then goes nowhere."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    broken = [stream for stream, event in poll.poll(0) if event & select.POLLERR]
    for stream in broken:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream)
        os.close(nowhere)
    return bool(broken)


def split_command(argv: list[str]) -> tuple[str | None, list[str]]:
    """Split the words that name a subcommand from its arguments; the name is None when there is none."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in COMMANDS:
            return name, argv[words:]
    return None, argv


def _no_command(argv: list[str]) -> str:
    """Return what is wrong with words that name no command, and which ones may be meant."""
    group = [name for name in COMMANDS if name.startswith(f"{argv[0]} ")]
    if group and (len(argv) == 1 or argv[1].startswith("-")):
        return f"{argv[0]!r} needs one more word:\n\n{_table(group)}"
    words = next((words for words in (2, 1) if suggestion(" ".join(argv[:words]), list(COMMANDS))), 2)
    name = " ".join(argv[:words])
    return f"no command {' '.join(argv[:2])!r}{suggestion(name, list(COMMANDS))}\n`genrecal` alone lists all commands"


def _table(names: Sequence[str]) -> str:
    width = max(len(f"{name} {command.arguments}") for name, command in COMMANDS.items())
    return "\n".join(f"  {f'{name} {COMMANDS[name].arguments}':<{width}}  {COMMANDS[name].help}" for name in names)


def usage() -> str:
    """Return the help text of the whole command, commands in groups."""
    groups = [
        f"{heading}\n{_table([name for first in firsts for name in COMMANDS if name.partition(' ')[0] == first])}"
        for heading, firsts in GROUPS.items()
    ]
    return "\n\n".join(
        [
            "genrecal: run a large vision-language teacher once, distil many small students from its cached targets",
            *groups,
            "CONFIG is a YAML run file; any of its fields is overridden by --dotted.name VALUE, and\n"
            "`genrecal config example` shows all of them. `genrecal COMMAND --help` has an example.\n"
            "Exit codes: 0 done, 1 failed, 2 usage or config, 3 incomplete (run again), 4 identity or integrity.",
        ]
    )


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(redact("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def _unwind(signum: int, frame: FrameType | None) -> None:
    # one signal unwinds the stack so that `finally` blocks run; a second one ends the process at once
    signal.signal(signum, signal.SIG_DFL)
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
