"""S8: canary secrets that come in through environment, run file, command line and exceptions are written nowhere."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.logs import setup_logging
from launch.provenance import recorded
from launch.run_config import validated
from launch.secrets import HIDDEN, redact, secret_fields, secret_values
from teacher_cache.errors import ConfigError
from tests.launch.canaries import ENVIRONMENT, hits

IN_TEXT = {
    "url": "https://user:canary-url-9d1c@example.org/x",
    "proxy": "http://canary-only-user-55aa@proxy:3128",
    "hugging-face": "hf_CanaryCanaryCanary1234",
    "aws": "AKIACANARYCANARY0000",
    "github": "ghp_canarycanarycanarycanary01",
    "query": "https://host/x?token=canary-query-77ee",
}
CANARIES = ("canary", "CANARY", "Canary")


@pytest.fixture(autouse=True)
def secret_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def run_values(tmp_path: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "run"),
        "cache": {"uri": "c", "teacher": {"model": "t"}, "data": {"path": "d.parquet"}},
        "students": [{"name": "s", "model": "m"}],
    }


@pytest.mark.parametrize("text", [*IN_TEXT.values(), *ENVIRONMENT.values()], ids=[*IN_TEXT, *ENVIRONMENT])
def test_secrets_are_hidden_in_any_text(text: str) -> None:
    shown = redact(f"before {text}, after")
    assert shown.startswith("before ")
    assert shown.endswith("after")
    assert HIDDEN in shown
    assert not any(canary in shown for canary in CANARIES)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prefix/cache",
        "file:///shared/runs/mine",
        "1,272 tokens in 5.7 s (223 tokens/s)",
        "max_new_tokens=256, tokenizer=/models/x",
        "error [cache-mismatch]: teacher.revision 1f2e3d4c5b6a79881f2e3d4c5b6a79881f2e3d4c differs",
        "user@example.org",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_only_variables_with_secrets_count() -> None:
    found = secret_values(
        {"TOKENIZERS_PARALLELISM": "false-false", "RAY_AUTH_TOKEN_PATH": "/x/y/token", "A_KEY": "short"}
    )
    assert found == []
    assert secret_values({"GOOGLE_APPLICATION_CREDENTIALS": "/etc/gcp.json", "X_TOKEN": "12345678"}) == ["12345678"]


@pytest.mark.parametrize("secret", [*IN_TEXT.values(), *ENVIRONMENT.values()], ids=[*IN_TEXT, *ENVIRONMENT])
def test_a_run_file_with_a_secret_is_refused_without_showing_it(
    tmp_path: Path, secret: str, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values(tmp_path)
    values["cache"]["teacher"]["model"] = secret
    assert list(secret_fields(values)) == ["cache.teacher.model"]
    with pytest.raises(ConfigError, match=r"holds a secret in cache\.teacher\.model") as refused:
        validated(values, source="run.yaml")
    assert secret not in str(refused.value)
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(run_values(tmp_path)))
    assert main(["run", str(run_file), "--cache.uri", secret]) == 2
    shown = capsys.readouterr()
    assert not any(canary in shown.out + shown.err for canary in CANARIES)
    assert not (tmp_path / "run").exists()


def test_logs_and_tracebacks_hide_secrets(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        setup_logging(log, console=False)
        logger = logging.getLogger("launch.test")
        for secret in (*IN_TEXT.values(), *ENVIRONMENT.values()):
            logger.info("opening %s", secret)
            try:
                raise OSError(f"cannot reach {secret}")
            except OSError:
                logger.exception("failed")
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers, root.level = before
        logging.captureWarnings(capture=False)
    text = log.read_text()
    assert text.count(HIDDEN) >= 3 * len(ENVIRONMENT)
    assert not any(canary in text for canary in CANARIES)


def test_an_unforeseen_exception_hides_secrets() -> None:
    code = (
        "import os, launch.run_config as module, launch.cli as cli\n"
        "def fail(*_, **__): raise RuntimeError('lost ' + os.environ['WANDB_API_KEY'] + ' " + IN_TEXT["url"] + "')\n"
        "module.RunConfig.model_json_schema = fail\n"
        "cli.main(['config', 'schema'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"RuntimeError: lost {HIDDEN} https://{HIDDEN}@example.org/x" in done.stderr
    assert not any(canary in done.stderr.splitlines()[-1] for canary in CANARIES)


def test_records_hide_the_secrets_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["genrecal", *IN_TEXT.values(), *ENVIRONMENT.values()])
    with recorded(lambda: [tmp_path / "out"], config=validated(run_values(tmp_path), source="test")):
        pass
    record = json.loads((tmp_path / "out.provenance.json").read_text())
    assert len(record["runs"][0]["argv"]) == 1 + len(IN_TEXT) + len(ENVIRONMENT)
    assert hits(tmp_path) == []
    assert not any(canary in (tmp_path / "out.provenance.json").read_text() for canary in CANARIES)


def test_the_search_for_hits_sees_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\0" + ENVIRONMENT["HF_TOKEN"].encode() + b"\0")
    assert hits(tmp_path) == [(tmp_path / "a", "HF_TOKEN")]
