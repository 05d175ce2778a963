"""One self-contained report.html about a run: no script, no network, light and dark.

It is made from what lies in the run's folder; what is missing is left out and listed at the end:

    results.json                 {"teacher_accuracy": a, "students": {name: {"accuracy": a, "sft_accuracy": a, ...}}}
    evaluation/<model>.json      distill.scoring.EvaluationResult; <model> is teacher, <student>,
                                 <student>-untouched, -sft, -kd, -uld
    suites.json                  launch.suites.results.SuiteRecord, of `genrecal eval --suite`
    training/<student>/<stage>/  metrics.jsonl: objects with global_step and, in any group (train/loss), the
                                 losses loss, sft_loss, ce_loss, kl_loss, regularization_loss, boundary_ce,
                                 rest_ce, question_shuffle_gap; features_first.safetensors and
                                 features_last.safetensors: z_s, r_s, z_l, r_l [samples, width].
                                 Baselines train as <student>-sft, -kd, -uld. DONE.json once trained, faults.jsonl
                                 of updates that were not made
    cache/                       the teacher cache, or where a run file says
    data/test.parquet            held-out data with a column family, or where a run file says
    timings.json                 [{"step": "cache" | "train <student>" | ..., "seconds": s}]
    run-files/<name>.yaml        run files, shown as they are
"""

import argparse
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2

from launch.arguments import ArgumentParser
from launch.provenance import recorded
from launch.report.cache import cache_section, provenance_facts
from launch.report.data import RunData, read_run
from launch.report.examples import example_items
from launch.report.live import progress_rows, skipped_rows, watch_figures
from launch.report.results import family_section, gain_rows, headline_caption, headline_rows, summary_sentences
from launch.report.suites import suite_section
from launch.report.training import feature_items, training_figures


def report_parser() -> ArgumentParser:
    """Return the parser of `report`."""
    parser = ArgumentParser(
        "report", description="Write report.html of a run folder.", exit_codes="0 done, 1 the folder cannot be read"
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="output_dir of a run")
    parser.add_argument(
        "--watch",
        type=_seconds,
        metavar="SECONDS",
        help="write it anew every so many seconds, as a page that reloads itself, until the run is complete or Ctrl-C",
    )
    return parser


def report_command(argv: Sequence[str]) -> int:
    """Write the report of a run folder and print its place."""
    options = report_parser().parse(argv)
    if options.watch is not None:
        _watch(options.directory, interval_s=options.watch)
    run = read_run(options.directory)  # before anything is written: a record would make a folder that is not there
    with recorded(lambda: [options.directory / "report.html"], config=None):
        print(write_report(options.directory, run=run))
    return 0


def write_report(run_dir: Path, *, run: RunData | None = None, reload_s: float | None = None) -> Path:
    """Write report.html into a run's folder and return its path.

    Args:
        run_dir: The run's folder.
        run: What was read of it; by default it is read now.
        reload_s: Seconds after which a browser reloads the page.

    Raises:
        DataError: The folder is missing, or a file in it holds something else than it should.
    """
    page = render(read_run(run_dir) if run is None else run, reload_s=reload_s)
    path = run_dir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def _watch(run_dir: Path, *, interval_s: float) -> None:
    """Keep the report of a running run up to date until the run is complete or the user interrupts."""
    try:
        while not (run := read_run(run_dir)).is_finished:
            print(write_report(run_dir, run=run, reload_s=interval_s), flush=True)
            time.sleep(interval_s)
    except KeyboardInterrupt:
        return


def _seconds(text: str) -> float:
    seconds = float(text)
    if seconds < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than a second")
    return seconds


def render(run: RunData, *, reload_s: float | None = None) -> str:
    """Return the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("launch.report").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    notes = list(run.notes)
    return template.render(
        title="Distillation report: " + (", ".join(run.students) or run.run_dir.name),
        summary=summary_sentences(run),
        reload_s=reload_s,
        progress=progress_rows(run),
        watched=watch_figures(run),
        skipped=skipped_rows(run),
        headline=headline_rows(run),
        headline_caption=headline_caption(run),
        gains=gain_rows(run),
        families=family_section(run),
        suites=suite_section(run),
        examples=example_items(run),
        training=training_figures(run),
        features=feature_items(run, notes=notes),
        cache=cache_section(run),
        timings=run.timings,
        provenance=provenance_facts(run),
        run_files=run.run_files,
        notes=notes,
    )
