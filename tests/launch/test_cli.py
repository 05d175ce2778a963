import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.cli import COMMANDS, GROUPS, main, split_command, usage
from launch.command_reference import parser_of, reference
from launch.completion import completion_script, completions
from launch.field_comments import all_fields, annotate
from launch.overrides import dotted_names
from launch.run_config import RunConfig, load_run_config, write_run_config
from teacher_cache.errors import ConfigError

ROOT = Path(__file__).parents[2]
MINIMAL = {
    "output_dir": "runs/x",
    "cache": {"uri": "runs/x/cache", "teacher": {"model": "teacher"}, "data": {"path": "train.parquet"}},
    "students": [{"name": "small", "model": "student"}],
}


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys; from launch.cli import main; main(['--help']); import launch.run_config;"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'zarr')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == usage()


def cpu_seconds(*command: str) -> float:
    before = os.times()
    subprocess.run(command, capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_costs_little_more_than_python_itself() -> None:
    bare = min(cpu_seconds(sys.executable, "-c", "pass") for _ in range(5))
    with_help = min(cpu_seconds(sys.executable, "-m", "launch.cli", "--help") for _ in range(5))
    assert with_help - bare < 0.3


def test_every_command_belongs_to_one_group_and_is_importable() -> None:
    firsts = [first for group in GROUPS.values() for first in group]
    assert len(firsts) == len(set(firsts))
    assert {name.partition(" ")[0] for name in COMMANDS} == set(firsts)
    for command in COMMANDS.values():
        module, function = command.target.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n{heading}\n" in shown for heading in GROUPS)
    assert all(f"  {name} {command.arguments}".rstrip() in shown for name, command in COMMANDS.items())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cache", "bild", "x.yaml"], "no command 'cache bild', did you mean 'cache build'?"),
        (["trian", "x.yaml"], "did you mean 'train'?"),
        (["cashe", "verify", "x"], "did you mean 'cache verify'?"),
        (["cache"], "'cache' needs one more word"),
        (["qqqq"], "no command 'qqqq'\n"),
    ],
)
def test_unknown_command_is_a_usage_error(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([*name.split(), "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    parser = parser_of(name)
    assert f"example: {parser.example}\n" in shown
    assert "exit codes: 0" in " ".join(shown.split())
    command, arguments = split_command(shlex.split(parser.example)[1:])
    assert command == name
    _, overrides = parser.parse_known_args(arguments)
    assert overrides == [] or parser.takes_run_file


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["cache", "verify", "x", "--levle", "full"], "unknown option '--levle', did you mean '--level'?"),
        (["cache", "build", "RUN", "--jsn"], "unknown option '--jsn', did you mean '--json'?"),
        (["train", "RUN", "--studnt", "a"], "did you mean '--student'?"),
        (["run", "RUN", "--cache.teachr.model", "x"], "did you mean '--cache.teacher.model'?"),
        (["run", "RUN", "--train.distil.max_steps", "7"], "did you mean '--train.distill.max-steps'?"),
        (["run", "RUN", "--students.1.name", "x"], "there is no entry 1, the run file has 1"),
        (["run", "RUN", "extra"], "unexpected argument 'extra'"),
        (["run", "RUN", "--output-dir"], "--output-dir needs a value"),
        (["run", "RUN", "--output-dir", "a", "b"], "--output-dir takes one value, found a b"),
        (["run", "RUN", "--train.zero.overrides", "{a: ["], "is not YAML"),
        (["run", "RUN", "--train.align.max-steps", "many"], "train.align.max_steps: Input should be a valid integer"),
    ],
)
def test_wrong_options_are_named_with_what_was_probably_meant(
    run_file: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_file) if word == "RUN" else word for word in argv]) == 2
    assert message in capsys.readouterr().err


def test_the_page_about_commands_is_made_from_the_parsers() -> None:
    assert (ROOT / "docs" / "commands.md").read_text() == reference(), "run python -m launch.command_reference"


def complete(*words: str) -> set[str]:
    """What bash offers for the last of these words."""
    line = " ".join(map(shlex.quote, words))
    script = f"{completion_script('bash')}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _genrecal"
    done = subprocess.run(
        ["bash", "-c", f'{script}\nprintf "%s\\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["tra"], {"train"}),
        (["cache", "ve"], {"verify"}),
        (["cache", "verify", "runs/x", "--lev"], {"--level"}),
        (["cache", "build", "run.yaml", "--cache.build.compr"], {"--cache.build.compression"}),
        (["train", "run.yaml", "--stud"], {name for name in completions()["train"] if name.startswith("--stud")}),
        (["cache", "verify", "runs"], set()),
        (["cache", "verify", "runs/x", "--train"], set()),
    ],
)
def test_bash_completes_commands_options_and_fields(words: list[str], offered: set[str]) -> None:
    assert complete("genrecal", *words) == offered


def test_completion_knows_every_command_and_field() -> None:
    words = completions()
    assert {name.partition(" ")[0] for name in COMMANDS} == set(words[""])
    fields = {f"--{name.replace('_', '-')}" for name in dotted_names(RunConfig)}
    for name in COMMANDS:
        parser = parser_of(name)
        expected = {option for action in parser.options() for option in action.option_strings if option != "-h"}
        assert set(words[name]) == expected | (fields if parser.takes_run_file else set()), name


def test_the_script_for_zsh_has_the_same_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("#compdef genrecal\n")
    for typed, words in completions().items():
        assert f"{typed!r}) echo {' '.join(words)!r} ;;" in shown
    assert main(["completion", "fish"]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputdir": 1}, "outputdir: unknown key, did you mean 'output_dir'?"),
        ({"zzz": 1}, "zzz: unknown key; known here: output_dir, cache,"),
        ({"students": []}, "students"),
        ({"students": [{"name": "a", "model": "m"}, {"name": "a", "model": "n"}]}, "different names"),
        (
            {"cache": {"uri": "c", "teacher": {"model": "t", "dtyp": "x"}, "data": {"path": "p"}}},
            "line 5: cache.teacher.dtyp: unknown key, did you mean 'cache.teacher.dtype'?",
        ),
        ({"students": [{"name": "a", "model": "m", "metod": "sft"}]}, "students.0.metod: unknown key, did you mean"),
        ({"train": {"align": {"lr": 1}}}, "train.align.lr: unknown key; known here: max_steps,"),
        ({"train": {"align": {"learning_rate": -1}}}, "train.align.learning_rate"),
    ],
)
def test_faults_in_a_run_file_are_named_by_their_path(
    run_file: Path, change: dict[str, object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file.write_text(yaml.safe_dump(MINIMAL | change))
    assert main(["config", "show", str(run_file)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["- a list", "key: [unclosed", None])
def test_unreadable_run_files_are_config_errors(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_run_config(path)


def test_overrides_reach_nested_fields_and_students(run_file: Path) -> None:
    config = load_run_config(run_file, ["--cache.teacher.revision", "abc", "--students.0.max-length", "77"])
    assert config.cache.teacher.revision == "abc"
    assert config.student(None).max_length == 77


@pytest.mark.parametrize(
    ("overrides", "path", "value"),
    [
        (["--cache.build.extend"], "cache.build.extend", True),
        (["--cache.build.extend", "false"], "cache.build.extend", False),
        (["--cache.build.kv_cache_gib=1.5"], "cache.build.kv_cache_gib", 1.5),
        (["--train.align.learning-rate", "1e-5"], "train.align.learning_rate", 1e-5),
        (["--train.stages", "align", "distill"], "train.stages", ("align", "distill")),
        (["--train.stages", "[distill]"], "train.stages", ("distill",)),
        (["--train.stages", "finetune"], "train.stages", ("finetune",)),
        (["--train.align.adam-betas", "0.8", "0.9"], "train.align.adam_betas", (0.8, 0.9)),
        (["--cache.data.max-samples", "null"], "cache.data.max_samples", None),
        (["--cache.teacher.revision", "123"], "cache.teacher.revision", "123"),
        (["--train.zero.overrides", "{a: {b: 1}}"], "train.zero.overrides", {"a": {"b": 1}}),
        (["--evaluation.data", "x.parquet"], "evaluation.data", "x.parquet"),
        (["--train.seed", "1", "--train.seed", "2"], "train.seed", 2),
    ],
)
def test_overrides_take_the_form_of_their_field(run_file: Path, overrides: list[str], path: str, value: object) -> None:
    found: object = load_run_config(run_file, overrides)
    for part in path.split("."):
        found = getattr(found, part)
    assert found == value


def test_show_prints_a_file_that_loads_to_the_same_run(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "show", str(run_file)]) == 0
    shown = RunConfig.model_validate(yaml.safe_load(capsys.readouterr().out))
    assert shown == load_run_config(run_file)
    write_run_config(shown, tmp_path / "copy.yaml", header="two\nlines")
    assert load_run_config(tmp_path / "copy.yaml") == shown


def test_schema_describes_every_field_of_the_run_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    for definition in schema["$defs"].values():
        for name, field in definition["properties"].items():
            assert "description" in field or "$ref" in field, name


def test_student_must_be_named_where_there_are_several(run_file: Path) -> None:
    several = MINIMAL | {"students": [{"name": "a", "model": "m"}, {"name": "b", "model": "n"}]}
    run_file.write_text(yaml.safe_dump(several))
    config = load_run_config(run_file)
    assert config.student("b").model == "n"
    with pytest.raises(ConfigError, match="choose one of a, b"):
        config.student(None)


def test_the_file_with_every_field_is_a_run_file_of_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "example"]) == 0
    text = capsys.readouterr().out
    assert text == all_fields()
    values = yaml.safe_load(text)
    config = RunConfig.model_validate(values)
    least = {
        "output_dir": config.output_dir,
        "cache": {
            "uri": config.cache.uri,
            "teacher": {"model": config.cache.teacher.model},
            "data": {"path": config.cache.data.path},
        },
        "students": [{"name": config.students[0].name, "model": config.students[0].model}],
    }
    assert config == RunConfig.model_validate(least)
    for name in dotted_names(RunConfig):
        assert re.search(rf"(?m)^[ #-]*{name.rpartition('.')[2]}: ", text), name


def test_comments_are_made_from_docstrings_and_leave_the_rest_alone() -> None:
    text = "# mine\ncache:\n  uri: x  # here\n  #: old\n  teacher: {model: y}\nstudents:\n  - name: a\n    model: b\n"
    made = annotate(text)
    assert yaml.safe_load(made) == yaml.safe_load(text)
    assert annotate(made) == made
    lines = made.splitlines()
    assert lines[0] == "# mine"
    assert "  #: Where the cache lives: a local path, file:///path, s3://bucket/prefix, gs://… or az://…." in lines
    assert "    #: Hugging Face directory, or repository id, of the untouched student." in lines
    assert "  #: old" not in lines
