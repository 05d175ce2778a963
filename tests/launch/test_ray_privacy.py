"""Ray clusters that answer whoever reaches them get no work: not from a build, not from answers, not from Ray Train."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import yaml

from launch.doctor.ray_settings import check_ray
from launch.ray_train import train_with_ray
from launch.run_config import RunConfig, load_run_config
from teacher_cache import build, ray_guard
from teacher_cache.answers import write_answers
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.build import build_cache, ray_session
from teacher_cache.errors import ConfigError, GenrecalError
from teacher_cache.ray_guard import cluster_exposure
from tests.launch.small_run import write_small_run

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
OPEN_CLUSTER = """
import ray, sys
from teacher_cache.build import start_ray
start_ray(ray, address="local", num_cpus=3, include_dashboard=False, log_to_driver=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


def nothing(request: bytes, context: grpc.ServicerContext) -> bytes:
    return b""


def ask_for_token(request: bytes, context: grpc.ServicerContext) -> bytes:
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
    raise AssertionError


def say_nothing(request: bytes, context: grpc.ServicerContext) -> bytes:
    time.sleep(0.5)
    return b""


class Handler(grpc.GenericRpcHandler):
    """Answers every call in one way, whatever the method."""

    def __init__(self, answer: Callable[[bytes, grpc.ServicerContext], bytes]) -> None:
        self.answer = answer

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        return grpc.unary_unary_rpc_method_handler(self.answer)


@contextmanager
def control_store(answer: Callable[[bytes, grpc.ServicerContext], bytes]) -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1), handlers=[Handler(answer)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(grace=None).wait()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set exactly these variables of Ray."""

    def set_to(**values: str) -> None:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_to


class Ray(SimpleNamespace):
    """Stands in for Ray: connects to one address and takes note of it."""

    def __init__(self, gcs_address: str, *, connected: bool = False) -> None:
        super().__init__(gcs_address=gcs_address, connected=connected, calls=[])

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, **options: Any) -> None:
        self.calls.append(options["address"])

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def get_runtime_context(self) -> "Ray":
        return self


def session_calls(ray: Ray, monkeypatch: pytest.MonkeyPatch, *, insecure: bool = False) -> list[str]:
    monkeypatch.setattr(build, "import_ray", lambda: ray)
    with ray_session(num_cpus=1, insecure=insecure):
        ray.calls.append("used")
    return ray.calls


def test_a_control_store_is_private_when_it_refuses_who_has_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with control_store(nothing) as address:
        exposure = cluster_exposure(address)
        assert exposure is not None
        assert address in exposure.found
        (_, found) = check_ray({"RAY_ADDRESS": address, **TOKEN})
        assert (found.status, found.found) == ("problem", exposure.found)
    with control_store(ask_for_token) as address:
        assert cluster_exposure(address) is None
        assert [found.status for found in check_ray({"RAY_ADDRESS": address, **TOKEN})] == ["ok", "ok"]
    with pytest.raises(GenrecalError, match="UNAVAILABLE"):
        cluster_exposure("127.0.0.1:1")
    with monkeypatch.context() as patch:
        patch.setenv("RAY_USE_TLS", "1")
        assert cluster_exposure("127.0.0.1:1") is None
    monkeypatch.setattr(ray_guard, "ANSWER_TIMEOUT_S", 0.1)
    with control_store(say_nothing) as address, pytest.raises(GenrecalError, match="does not say within"):
        cluster_exposure(address)


@pytest.mark.parametrize("connected", [False, True], ids=["RAY_ADDRESS", "connected before"])
def test_a_session_takes_private_clusters_only(
    connected: bool, environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with control_store(nothing) as address:
        environment(RAY_ADDRESS=address, **TOKEN)
        ray = Ray(address, connected=connected)
        with pytest.raises(ConfigError, match=r"answers without a token.*insecure_ray"):
            session_calls(ray, monkeypatch)
        assert ray.calls == ([] if connected else [address, "shutdown"])
        used = session_calls(Ray(address, connected=connected), monkeypatch, insecure=True)
        assert "used" in used
    with control_store(ask_for_token) as address:
        environment(RAY_ADDRESS=address, **TOKEN)
        used = session_calls(Ray(address, connected=connected), monkeypatch)
        assert used == (["used"] if connected else [address, "used", "shutdown"])


@pytest.mark.parametrize("values", [{}, {"RAY_ADDRESS": "127.0.0.1:1"}], ids=["of our own", "RAY_ADDRESS"])
def test_without_a_token_no_cluster_is_started_or_joined(
    values: dict[str, str], environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(RAY_AUTH_MODE="disabled", **values)
    ray = Ray("127.0.0.1:1")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE is disabled"):
        session_calls(ray, monkeypatch)
    assert ray.calls == []


@pytest.mark.parametrize("mode", ["token", None])
def test_ray_that_was_imported_without_a_mode_is_looked_at_when_it_has_started(
    mode: str | None, environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    environment(RAY_AUTH_TOKEN=TOKEN["RAY_AUTH_TOKEN"])

    class Unset(Ray):
        def init(self, **options: Any) -> None:
            super().init(**options)
            if mode is not None:
                monkeypatch.setenv("RAY_AUTH_MODE", mode)

    with control_store(ask_for_token) as address:
        ray = Unset(address)
        if mode is None:
            with pytest.raises(ConfigError, match="RAY_AUTH_MODE is not set"):
                session_calls(ray, monkeypatch)
            assert ray.calls == ["local", "shutdown"]
        else:
            assert session_calls(ray, monkeypatch) == ["local", "used", "shutdown"]


def test_a_token_that_others_may_read_is_refused(
    environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("a" * 64)
    token.chmod(0o644)
    environment(RAY_ADDRESS="127.0.0.1:1", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    with pytest.raises(ConfigError, match="chmod 600"):
        session_calls(Ray("127.0.0.1:1"), monkeypatch)


@pytest.fixture
def run(tmp_path: Path, tiny_qwen2: Path, digit_samples: Path) -> RunConfig:
    return load_run_config(
        write_small_run(tmp_path, teacher=tiny_qwen2, student=tiny_qwen2, data=digit_samples, cluster={}), []
    )


def write_answers_of(config: RunConfig) -> None:
    data = Path(config.cache.data.path)
    written = Path(config.output_dir) / "written.parquet"
    changes = {"path": str(written), "image_root": str(data.parent)}
    cache = config.cache.model_copy(update={"data": config.cache.data.model_copy(update=changes)})
    write_answers(cache, answers=AnswersConfig(source=str(data)), log_dir=Path(config.output_dir))


@pytest.mark.parametrize(
    "start",
    [lambda config: build_cache(config.cache), write_answers_of, train_with_ray],
    ids=["cache build", "cache answers", "Ray Train"],
)
def test_everything_that_uses_ray_asks_for_a_private_cluster(
    start: Callable[[RunConfig], object], run: RunConfig, environment: Callable[..., None]
) -> None:
    environment(RAY_ADDRESS="127.0.0.1:1", RAY_AUTH_MODE="disabled")
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE is disabled"):
        start(run)


@pytest.mark.slow
def test_a_build_on_an_open_cluster_of_ray_itself(tmp_path: Path, tiny_qwen2_vl: Path, digit_samples: Path) -> None:
    run_file = write_small_run(tmp_path, teacher=tiny_qwen2_vl, student=tiny_qwen2_vl, data=digit_samples, cluster={})
    command = [sys.executable, "-m", "launch.cli", "cache", "build", str(run_file)]
    others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    open_one = others | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    cluster = subprocess.Popen(
        [sys.executable, "-c", OPEN_CLUSTER], env=open_one, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        with_token = others | TOKEN | {"RAY_ADDRESS": address}
        refused = subprocess.run(command, env=with_token, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert f"the Ray cluster at {address} answers without a token" in refused.stderr
        assert not list(Path(yaml.safe_load(run_file.read_text())["cache"]["uri"]).glob("commits/*.json"))
        allowed = [*command, "--cache.build.insecure-ray"]
        done = subprocess.run(
            allowed, env=open_one | {"RAY_ADDRESS": address}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        cluster.communicate("")
