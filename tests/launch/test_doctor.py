"""S14, and the other findings of `genrecal doctor`: each kind of trouble is told, with its remedy."""

import configparser
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from launch.cli import main
from launch.doctor import machine
from launch.doctor.findings import Finding
from launch.doctor.machine import check_build_locks, check_gpus, check_home, check_toolchain, check_umask
from launch.doctor.ray_settings import check_authentication, check_dashboard, check_ray, check_reachable
from launch.doctor.run_inputs import check_data, check_folders, check_models, check_space, check_store
from launch.doctor.versions import FLOORS, check_requirements, check_versions
from launch.run_config import RunConfig, validated
from launch.software import Gpu
from teacher_cache.storage import open_store
from tests.teacher_cache.store import build, make_samples

ROOT = Path(__file__).parents[2]
OLD = {"torch": "2.9.1", "vllm": "0.17.9", "ray": "2.53.0", "numcodecs": "0.16.5"}
REASONS = {"torch": "CVE-2026-24747", "vllm": "CVE-2026-27893", "ray": "CVE-2026-27482", "numcodecs": "run code"}


def of(findings: Iterator[Finding], check: str) -> Finding:
    (found,) = [finding for finding in findings if finding.check == check]
    return found


def run_config(tmp_path: Path, digit_samples: Path, model: Path, **changes: Any) -> RunConfig:
    values = {
        "output_dir": str(tmp_path / "run"),
        "cache": {
            "uri": str(tmp_path / "cache"),
            "teacher": {"model": str(model)},
            "data": {"path": str(digit_samples)},
        },
        "students": [{"name": "small", "model": str(model)}],
    }
    return validated(values | changes, source="test")


@pytest.mark.parametrize("package", OLD)
def test_versions_with_known_holes_are_refused(package: str) -> None:
    def find(name: str) -> str | None:
        return OLD[package] if name == package else FLOORS[name].version

    found = of(check_versions(find), package)
    assert found.status == "problem"
    assert OLD[package] in found.found
    assert REASONS[package] in found.found
    assert f"{package}>={FLOORS[package].version}" in found.remedy


@pytest.mark.parametrize("suffix", ["", ".1", "+cpu"])
def test_the_floors_themselves_and_local_builds_pass(suffix: str) -> None:
    findings = check_versions(lambda name: f"{FLOORS[name].version}{suffix}")
    assert {finding.status for finding in findings} == {"ok"}


def test_a_version_that_cannot_be_compared_is_told() -> None:
    assert of(check_versions(lambda _: "unknown"), "torch").status == "warning"


def test_absent_packages_are_told_by_what_they_are_needed_for() -> None:
    findings = {finding.check: finding for finding in check_versions(lambda _: None)}
    assert findings["torch"].status == "problem"
    assert findings["vllm"].status == "warning"
    assert "building a cache" in findings["vllm"].remedy


def test_what_the_project_asks_for_is_no_older_than_the_floors() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].split() + setup["options.extras_require"]["all"].split()
    lowest = {
        requirement.name: max(Version(clause.version) for clause in requirement.specifier if clause.operator != "<")
        for requirement in map(Requirement, lines)
        if requirement.specifier
    }
    for name, floor in FLOORS.items():
        assert lowest[name] >= Version(floor.version), name


def test_this_installation_satisfies_its_own_requirements() -> None:
    assert check_requirements().status == "ok"
    missing = check_requirements(lambda name: None if name == "zarr" else "999")
    assert missing.status == "problem"
    assert "zarr missing" in missing.found


def test_gpus_and_a_torch_that_cannot_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    card = Gpu(name="NVIDIA H100", memory_mib=81559, driver="580.65")
    monkeypatch.setattr(machine, "gpus", lambda: [card, card])
    monkeypatch.setattr(machine, "installed_version", lambda _: "2.13.0+cu130")
    assert check_gpus().found == "2 x NVIDIA H100, driver 580.65"
    monkeypatch.setattr(machine, "installed_version", lambda _: "2.13.0+cpu")
    assert check_gpus().status == "problem"
    monkeypatch.setattr(machine, "gpus", list)
    assert check_gpus().status == "ok"


def test_toolchain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert check_toolchain().status == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_toolchain().status == "problem"


def test_home_that_cannot_be_written(tmp_path: Path) -> None:
    assert check_home(tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == []
    found = check_home(tmp_path / "absent")
    assert found.status == "problem"
    assert "TORCH_EXTENSIONS_DIR" in found.remedy


@pytest.mark.parametrize(("mask", "status"), [(0o022, "ok"), (0o077, "ok"), (0o000, "warning"), (0o020, "warning")])
def test_umask(mask: int, status: str) -> None:
    before = os.umask(mask)
    try:
        assert check_umask().status == status
        assert os.umask(mask) == mask
    finally:
        os.umask(before)


def test_stale_build_locks(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert check_build_locks(tmp_path).status == "ok"
    os.utime(lock, (0, 0))
    found = check_build_locks(tmp_path)
    assert found.status == "problem"
    assert str(lock) in found.remedy
    assert lock.exists()


@pytest.mark.parametrize(
    ("environment", "status", "text"),
    [
        ({}, "ok", "of its own"),
        ({"RAY_ADDRESS": "10.0.0.1:6379"}, "problem", "not set"),
        ({"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "disabled"}, "problem", "disabled"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "abc-secret"}, "ok", "from the environment"),
        ({"RAY_AUTH_MODE": "TOKEN", "RAY_AUTH_TOKEN": "abc-secret"}, "ok", "from the environment"),
    ],
)
def test_ray_without_a_token_is_a_problem(environment: Mapping[str, str], status: str, text: str) -> None:
    found = check_authentication(environment, uses_cluster="RAY_ADDRESS" in environment)
    assert found.status == status
    assert text in found.found
    assert "secret" not in found.found


def test_the_token_file_must_be_private(tmp_path: Path) -> None:
    token = tmp_path / "token"
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    assert check_authentication(environment, uses_cluster=True).status == "problem"
    token.write_text("abc")
    token.chmod(0o640)
    assert "chmod 600" in check_authentication(environment, uses_cluster=True).remedy
    token.chmod(0o600)
    assert check_authentication(environment, uses_cluster=True).status == "ok"


class Dashboard(BaseHTTPRequestHandler):
    """Answers every request with one status."""

    code = 200

    def do_GET(self) -> None:
        """Answer; a page that something redirects to is always there."""
        self.send_response(200 if self.path == "/login" else self.code)
        if self.code == 302:
            self.send_header("Location", "/login")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def dashboard() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Dashboard)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("code", "status"), [(200, "problem"), (401, "ok"), (403, "ok"), (302, "warning"), (404, "warning")]
)
def test_a_dashboard_must_ask_for_a_token(
    dashboard: str, code: int, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Dashboard, "code", code)
    assert check_dashboard(dashboard).status == status
    found = list(check_ray({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x"}, dashboard=dashboard))
    assert [finding.status for finding in found] == ["ok", status]


def test_a_cluster_that_is_not_there(dashboard: str) -> None:
    address = dashboard.removeprefix("http://")
    assert check_reachable("Ray cluster", address).status == "ok"
    assert check_reachable("Ray cluster", "127.0.0.1:1").status == "problem"
    assert check_reachable("Ray cluster", "host:port").status == "problem"
    assert check_dashboard("http://127.0.0.1:1").status == "problem"
    assert check_dashboard("127.0.0.1:8265").status == "problem"


def test_the_probe_of_a_store_leaves_nothing_behind(tmp_path: Path) -> None:
    assert check_store(str(tmp_path / "new" / "cache")).status == "ok"
    assert list(tmp_path.iterdir()) == []
    build(str(tmp_path / "cache"), make_samples(3))
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert check_store(str(tmp_path / "cache")).status == "ok"
    after = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert before == after
    assert check_store("http://example.org/cache").status == "problem"


def test_a_store_that_gives_a_name_twice_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(open_store(str(tmp_path))), "create", lambda *_: True)
    assert "second create" in check_store(str(tmp_path / "cache")).found


def test_world_writable_folders_are_problems(tmp_path: Path, digit_samples: Path, tiny_qwen2: Path) -> None:
    config = run_config(tmp_path, digit_samples, tiny_qwen2)
    assert {finding.status for finding in check_folders(config)} == {"ok"}
    (tmp_path / "run").mkdir(mode=0o777)
    (tmp_path / "run").chmod(0o777)
    assert [finding.status for finding in check_folders(config)] == ["problem", "ok"]
    (tmp_path / "run").chmod(0o1777)
    assert {finding.status for finding in check_folders(config)} == {"ok"}
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    assert check_store(str(tmp_path / "cache")).status == "problem"


def test_data_and_models(tmp_path: Path, digit_samples: Path, tiny_qwen2: Path) -> None:
    config = run_config(tmp_path, digit_samples, tiny_qwen2)
    assert [finding.status for finding in check_data(config)] == ["ok"]
    assert [finding.status for finding in check_models(config)] == ["ok", "ok"]
    empty, broken = tmp_path / "empty.jsonl", tmp_path / "broken.jsonl"
    empty.touch()
    broken.write_text('{"messages": []}\n')
    evaluation = {"data": str(broken)}
    values = config.model_dump(mode="json")
    values["cache"]["data"]["path"] = str(empty)
    values["students"][0]["model"] = "no-such-owner/no-such-model"
    changed = validated(values | {"evaluation": evaluation}, source="test")
    assert [finding.status for finding in check_data(changed)] == ["problem", "warning"]
    assert [finding.status for finding in check_models(changed)] == ["ok", "warning"]


def test_space_is_compared_with_the_plan(
    tmp_path: Path, digit_samples: Path, tiny_qwen2_vl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(tmp_path, digit_samples, tiny_qwen2_vl)
    assert check_space(config).status == "ok"
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert check_space(config).status == "problem"


def test_the_command_exits_by_what_it_finds(
    tmp_path: Path, digit_samples: Path, tiny_qwen2_vl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_file = tmp_path / "run.yaml"
    config = run_config(tmp_path, digit_samples, tiny_qwen2_vl)
    run_file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["doctor", str(run_file), "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"torch", "cache store", "space", "model small"} <= {finding["check"] for finding in findings}
    assert main(["doctor", str(run_file), "--cache.data.path", "/absent.parquet"]) == 1
    assert "PROBLEM" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.yaml"]


def test_without_a_run_file_no_heavy_library_is_loaded() -> None:
    code = (
        "import sys; from launch.cli import main; code = main(['doctor']);"
        "sys.exit(code or sum(name in sys.modules for name in ('torch', 'ray', 'vllm', 'transformers', 'zarr')))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
