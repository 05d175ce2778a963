"""One self-contained report.html about a run: no script, no network, light and dark.

It is made from what lies in the run's folder; what is missing is left out and listed at the end:

    results.json                 {"teacher_accuracy": a, "students": {name: {"accuracy": a, "sft_accuracy": a, ...}}}
    evaluation/<model>.json      distill.scoring.EvaluationResult; <model> is teacher, <student>,
                                 <student>-untouched, -sft, -kd, -uld
    training/<student>/<stage>/  metrics.jsonl: objects with global_step and, in any group (train/loss), the
                                 losses loss, sft_loss, ce_loss, kl_loss, regularization_loss, boundary_ce,
                                 rest_ce, question_shuffle_gap; features_first.safetensors and
                                 features_last.safetensors: z_s, r_s, z_l, r_l [samples, width].
                                 Baselines train as <student>-sft, -kd, -uld
    cache/                       the teacher cache, or where a run file says
    data/test.parquet            held-out data with a column family, or where a run file says
    timings.json                 [{"step": "cache" | "train <student>" | ..., "seconds": s}]
    run-files/<name>.yaml        run files, shown as they are
"""

import argparse
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import jinja2

from launch.report.cache import cache_section, provenance_facts
from launch.report.data import RunData, read_run
from launch.report.examples import example_items
from launch.report.results import family_section, gain_rows, headline_caption, headline_rows, summary_sentences
from launch.report.training import feature_items, training_figures


def report_command(argv: Sequence[str]) -> int:
    """Write the report of a run folder and print its place."""
    parser = argparse.ArgumentParser(prog="genrecal report", description=report_command.__doc__)
    parser.add_argument("directory", type=Path, metavar="DIR", help="output_dir of a run")
    print(write_report(parser.parse_args(argv).directory))
    return 0


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run's folder and return its path.

    Raises:
        DataError: The folder is missing, or a file in it holds something else than it should.
    """
    page = render(read_run(run_dir))
    path = run_dir / "report.html"
    temporary = path.with_suffix(".html.tmp")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def render(run: RunData) -> str:
    """Return the page."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("launch.report").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    notes = list(run.notes)
    return template.render(
        title="Distillation report: " + (", ".join(run.students) or run.run_dir.name),
        summary=summary_sentences(run),
        headline=headline_rows(run),
        headline_caption=headline_caption(run),
        gains=gain_rows(run),
        families=family_section(run),
        examples=example_items(run),
        training=training_figures(run),
        features=feature_items(run, notes=notes),
        cache=cache_section(run),
        timings=run.timings,
        provenance=provenance_facts(run),
        run_files=run.run_files,
        notes=notes,
    )
