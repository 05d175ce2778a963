"""`genrecal data fetch`: the images that a data file gives as URLs, fetched once under a strict list of hosts."""

from collections.abc import Sequence
from pathlib import Path

from launch.arguments import ArgumentParser
from launch.console import count_of, first_of, print_facts, print_json
from launch.secrets import redact

MIB = 2**20


def fetch_parser() -> ArgumentParser:
    """Return the parser of `data fetch`."""
    parser = ArgumentParser(
        "data fetch",
        description="Write a data file whose images are files from one whose images are https URLs. Nothing else here "
        "fetches images. Only named hosts are asked, at public addresses; no redirect is followed. "
        "docs/data.md shows the form of rows.",
        exit_codes="0 all are there, 2 wrong usage, 3 some were not fetched: their rows keep the URL (run it again)",
        example="original.parquet train.parquet --host images.example.org",
    )
    parser.add_argument("source", metavar="SOURCE", help="data file, .parquet or .jsonl")
    parser.add_argument("target", metavar="TARGET", help="data file to write, beside it; images go to TARGET-images/")
    parser.add_argument(
        "--host", metavar="HOST", action="append", required=True, help="a host that may be asked; repeat for several"
    )
    parser.add_argument("--max-mib", metavar="MIB", type=float, default=20.0, help="largest image (default: 20)")
    parser.add_argument("--timeout-s", metavar="S", type=float, default=30.0, help="for one attempt (default: 30)")
    parser.add_argument("--attempts", metavar="N", type=int, default=3, help="for one image (default: 3)")
    parser.add_json("print the summary as JSON")
    return parser


def fetch_command(argv: Sequence[str]) -> int:
    """Fetch what is not there and write the data file; exit 3 while any image is missing."""
    parser = fetch_parser()
    options = parser.parse(argv)
    if min(options.max_mib, options.timeout_s, options.attempts) <= 0:
        parser.error("--max-mib, --timeout-s and --attempts must be greater than 0")
    if any(not host or set(host) & set("/:@") for host in options.host):
        parser.error("--host takes the name of a host, such as images.example.org, without https:// and port")
    if not Path(options.source).is_file():
        parser.error(f"no data file at {options.source}: SOURCE is a .parquet or .jsonl file on this machine")
    from teacher_cache.fetched_data import fetch_data
    from teacher_cache.image_fetch import ImageFetcher

    fetcher = ImageFetcher(
        hosts=frozenset(host.lower() for host in options.host),
        max_bytes=round(options.max_mib * MIB),
        timeout_s=options.timeout_s,
        attempts=options.attempts,
    )
    summary = fetch_data(Path(options.source), Path(options.target), fetcher=fetcher)
    # a query may be a signature
    refused = [
        {"url": redact(url.partition("?")[0]), "reason": redact(reason)} for url, reason in summary.refused.items()
    ]
    if options.json:
        print_json({**vars(summary), "refused": refused})
    else:
        print_facts(
            {
                "data": f"{options.target}: {count_of(summary.rows, 'row')}",
                "images": f"{summary.fetched:,} fetched, {summary.present:,} there before, {len(refused):,} refused",
                "refused": first_of([f"{image['url']!r}: {image['reason']}" for image in refused]),
            }
        )
    return 3 if summary.refused else 0
