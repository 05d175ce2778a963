"""`genrecal cache build`, `status`, `inspect` and `verify`."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from launch.logs import setup_logging
from launch.run_config import load_run_config, split_config_path


def build_command(argv: Sequence[str]) -> int:
    """Run or resume the Ray job that fills the cache of a run file."""
    path, overrides = split_config_path(argv, command="cache build")
    config = load_run_config(path, overrides)
    log_dir = Path(config.output_dir) / "logs"
    setup_logging(log_dir / "cache-build.log")
    from teacher_cache.build import build_cache

    summary = build_cache(config.cache, log_dir=log_dir)
    print(json.dumps(dataclasses.asdict(summary), indent=2, default=str))
    return 0


def status_command(argv: Sequence[str]) -> int:
    """Print what is committed; exit 3 while shards are missing."""
    options = _parser("status").parse_args(argv)
    from teacher_cache.inspect import cache_status

    status = cache_status(options.uri)
    print(json.dumps(dataclasses.asdict(status), indent=2, default=str))
    return 0 if not status.missing_shards else 3


def inspect_command(argv: Sequence[str]) -> int:
    """Print identity and provenance, or the shapes of one sample's targets."""
    parser = _parser("inspect")
    parser.add_argument("--sample", help="sample id whose targets are read and described")
    options = parser.parse_args(argv)
    from teacher_cache.reader import open_cache

    cache = open_cache(options.uri, allow_incomplete=True)
    if options.sample is None:
        record: dict[str, object] = {
            "fingerprint": cache.fingerprint,
            "identity": cache.identity,
            "provenance": cache.provenance,
        }
    else:
        (targets,) = cache.read([options.sample])
        record = {field.name: _described(getattr(targets, field.name)) for field in dataclasses.fields(targets)}
    print(json.dumps(record, indent=2, default=str))
    return 0


def verify_command(argv: Sequence[str]) -> int:
    """Check every stored byte; exit 4 when something is damaged or extra, 3 while shards are not built."""
    options = _parser("verify").parse_args(argv)
    from teacher_cache.verify import verify_cache

    report = verify_cache(options.uri)
    print(json.dumps(dataclasses.asdict(report), indent=2, default=str))
    if not report.ok:
        return 4
    return 3 if report.missing_shards else 0


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"genrecal cache {name}")
    parser.add_argument("uri", help="where the cache lies")
    return parser


def _described(value: object) -> object:
    import torch

    if isinstance(value, torch.Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return value
