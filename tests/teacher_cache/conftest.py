"""The image server that tests of fetching ask."""

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.teacher_cache.image_server import Quiet, Server, certificate


@pytest.fixture(scope="session")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def port(pem: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(Server, "asked", [], raising=False)
    monkeypatch.setattr(Server, "hosts", [], raising=False)
    monkeypatch.setattr(Server, "busy_for", 0, raising=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    with Quiet(("127.0.0.1", 0), Server) as listening:
        listening.socket = context.wrap_socket(listening.socket, server_side=True)
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening.server_port
        listening.shutdown()
        thread.join()
