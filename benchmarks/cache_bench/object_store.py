"""Requests to an object store, counted at an S3 server on the loopback."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from cache_bench.figures import Figure
from cache_bench.rows import build_cache, make_samples
from cache_bench.settings import Settings
from teacher_cache.codec import layout_of, stored_fields
from teacher_cache.reader import open_cache

SECTION = "object store"
_BUCKET = "bucket"
_SAMPLES = 6


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield the requests for opening a cache and reading samples."""
    samples = make_samples(_SAMPLES, shape=settings.shape, seed=5)
    fields = stored_fields(layout_of(samples[0], codec="exact", compression="none"))
    arrays = len(fields) - 1  # spans are in the index
    with _server() as requests:
        uri = f"s3://{_BUCKET}/cache"
        build_cache(uri, samples, per_shard=_SAMPLES // 2)
        requests.clear()
        cache = open_cache(uri)
        opening = list(requests)
        requests.clear()
        cache.read([sample.sample_id for sample in samples])
        reading = list(requests)
    yield Figure(
        section=SECTION,
        name="requests per sample and array",
        value=len(reading) / _SAMPLES / arrays,
        unit="requests",
        bar=1,
        at_most=True,
        note=f"{_SAMPLES} samples, {arrays} arrays, {len(reading)} requests, first reads included",
    )
    lists = sum("list-type" in query for _, query in [*opening, *reading])
    yield Figure(section=SECTION, name="LISTs to open and read", value=lists, unit="requests", bar=0, at_most=True)
    methods = sorted({method for method, _ in opening})
    counts = ", ".join(f"{sum(found == method for found, _ in opening)} {method}" for method in methods)
    yield Figure(section=SECTION, name="requests to open", value=len(opening), unit="requests", note=counts)


@contextmanager
def _server() -> Iterator[list[tuple[str, str]]]:
    """Run an S3 server, point the environment at it, and give the list of its requests: method and query."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    application = DomainDispatcherApplication(create_backend_app)
    requests: list[tuple[str, str]] = []

    def counting(environment: WSGIEnvironment, start_response: StartResponse) -> Any:
        requests.append((environment["REQUEST_METHOD"], environment.get("QUERY_STRING", "")))
        return application(environment, start_response)

    server = make_server("127.0.0.1", 0, counting, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    saved = dict(os.environ)
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("AWS_")]:
        del os.environ[name]
    os.environ |= {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark",
        "AWS_REGION": "us-east-1",
    }
    try:
        _create_bucket(server.server_port)
        yield requests
    finally:
        server.shutdown()
        os.environ.clear()
        os.environ |= saved


def _create_bucket(port: int) -> None:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("PUT", f"/{_BUCKET}", headers={"Host": "127.0.0.1"})
    status = connection.getresponse().status
    connection.close()
    if status != 200:
        raise RuntimeError(f"the S3 server answers {status}")
