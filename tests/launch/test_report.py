"""The report of a synthetic run: real data, cache, evaluation and feature files, drawn from a seed."""

import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from distill.scoring import EvaluationResult, read_sample_rows, write_result
from launch.cli import main
from launch.console import format_bytes
from launch.demo.digits import generate_digit_vqa
from launch.report import report_command, write_report
from launch.report.embedding import embed, unbiased_cka
from launch.report.examples import data_uri
from teacher_cache.config import DataConfig
from teacher_cache.errors import DataError
from teacher_cache.plan import PlannedShard
from teacher_cache.samples import read_samples
from teacher_cache.schema import Span, TeacherHead, TeacherTargets
from teacher_cache.writer import create_or_open_builder


def digest_of(sample_id: str) -> str:
    return hashlib.sha256(sample_id.encode()).hexdigest()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STUDENTS = ("internvl", "llava")
ACCURACY = {"teacher": 0.95, "untouched": 0.2, "sft": 0.6, "distilled": 0.8}
VOCABULARY, HIDDEN = 512, 32


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "demo"
    generate_digit_vqa(folder / "data", num_train=8, num_test=84, seed=0)
    write_evaluations(folder)
    write_training(folder)
    write_cache(folder / "cache")
    timings = {"cache": 61.3, "train internvl": 120.9, "train llava": 98.1, "evaluate internvl": 30.0}
    rows = [{"step": step, "seconds": seconds} for step, seconds in timings.items()]
    (folder / "timings.json").write_text(json.dumps(rows))
    (folder / "run-files").mkdir()
    (folder / "run-files" / "internvl.yaml").write_text(
        f"cache: {{uri: {folder / 'cache'}}}\nevaluation:\n  data: {folder / 'data' / 'test.parquet'}\n"
    )
    return folder


def write_evaluations(folder: Path) -> None:
    data = DataConfig(path=str(folder / "data" / "test.parquet"))
    rows = read_sample_rows(data, samples=read_samples(data).samples)
    random = np.random.default_rng(0)
    difficulty = random.random(len(rows))
    names = {"teacher": "teacher"} | {
        f"{student}{suffix}": kind
        for student in STUDENTS
        for kind, suffix in {"untouched": "-untouched", "sft": "-sft", "distilled": ""}.items()
    }
    results = {}
    for name, kind in names.items():
        noise = random.normal(scale=0.1, size=len(rows))
        right = dict(zip((row.sample_id for row in rows), difficulty + noise < ACCURACY[kind], strict=True))
        families: dict[str, list[float]] = {}
        for row in rows:
            families.setdefault(row.columns["family"], []).append(float(right[row.sample_id]))
        results[name] = EvaluationResult(
            name=name,
            num_samples=len(rows),
            accuracy=float(np.mean(list(right.values()))),
            accuracy_by_family={family: float(np.mean(values)) for family, values in families.items()},
            bits_per_byte=1.5 - ACCURACY[kind],
            teacher_agreement=None if kind == "teacher" else ACCURACY[kind],
            answers={row.sample_id: row.reference if right[row.sample_id] else "<b>seven & three" for row in rows},
            scores={key: float(value) for key, value in right.items()},
        )
        write_result(results[name], folder / "evaluation" / f"{name}.json")
    students = {
        student: {
            "accuracy": results[student].accuracy,
            "sft_accuracy": results[f"{student}-sft"].accuracy,
            "untouched_accuracy": results[f"{student}-untouched"].accuracy,
        }
        for student in STUDENTS
    }
    content = {"teacher_accuracy": results["teacher"].accuracy, "students": students, "seed": 1}
    (folder / "results.json").write_text(json.dumps(content))


def write_training(folder: Path) -> None:
    random = np.random.default_rng(1)
    for student in STUDENTS:
        for stage in ("align", "distill", "finetune"):
            records = stage_records(stage, random=random)
            target = folder / "training" / student / stage
            target.mkdir(parents=True)
            # a run that was killed while it wrote, and resumed: the step counts once, the torn line not at all
            lines = [json.dumps(record) for record in [*records[:20], *records[18:]]]
            (target / "metrics.jsonl").write_text("\n".join(lines) + '\n{"global_step": 9')
            if stage == "align":
                save_file(features(random, spread=3.0), target / "features_first.safetensors")
            if stage == "distill":
                save_file(features(random, spread=0.4), target / "features_last.safetensors")
            if stage != "align":
                baseline = folder / "training" / f"{student}-sft" / stage
                baseline.mkdir(parents=True)
                own = [{"global_step": r["global_step"], "train/sft_loss": 1.1 * r["train/sft_loss"]} for r in records]
                (baseline / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in own))


def stage_records(stage: str, *, random: np.random.Generator) -> list[dict[str, float]]:
    records = []
    for step in range(1, 101):
        noise = float(np.exp(random.normal(scale=0.1)))
        record: dict[str, float] = {"global_step": step, "train/loss": 4 * noise * np.exp(-step / 60)}
        if stage != "finetune":
            record |= {"train/ce_loss": 2 * noise * np.exp(-step / 40), "train/kl_loss": noise * np.exp(-step / 40)}
            record |= {"train/boundary_ce": 3 * np.exp(-step / 50), "train/rest_ce": 0.5 * np.exp(-step / 20)}
            if step % 20 == 0:
                record["eval/question_shuffle_gap"] = 0.02 * step
        if stage == "align":
            record["train/regularization_loss"] = 1.5 * noise * np.exp(-step / 30)
        else:
            record["train/sft_loss"] = 0.8 * noise * np.exp(-step / 90)
        records.append(record)
    return records


def features(random: np.random.Generator, *, spread: float) -> dict[str, np.ndarray]:
    centres = random.normal(size=(7, HIDDEN))
    teacher = (centres[np.arange(35) % 7] * 3 + random.normal(size=(35, HIDDEN))).astype(np.float32)
    noisy = (teacher + spread * random.normal(size=teacher.shape)).astype(np.float32)
    student = (noisy @ random.normal(size=(HIDDEN, 20))).astype(np.float32)
    return {"z_s": student, "r_s": noisy + np.float32(spread), "z_l": teacher, "r_l": teacher + np.float32(0.1)}


def write_cache(path: Path) -> None:
    ids = tuple(f"train-{index}" for index in range(8))
    random = torch.Generator().manual_seed(0)
    writer = create_or_open_builder(
        str(path),
        identity={"teacher": {"digest": "0"}, "processing": {}, "data": {}, "targets": {}, "tap": "final-norm"},
        plan=[
            PlannedShard(shard_id=shard_id, sample_ids=chosen, sample_digests=tuple(map(digest_of, chosen)))
            for shard_id, chosen in (("s0", ids[:4]), ("s1", ids[4:]))
        ],
        provenance={"engine": "vllm", "versions": {"vllm": "0.32.0", "torch": "2.13.0"}},
        head=TeacherHead(weight=torch.randn(VOCABULARY, HIDDEN, generator=random)),
    )
    for number, shard in enumerate(writer.missing_shards()):
        targets = [cached_sample(sample_id, random=random) for sample_id in shard.sample_ids]
        digests = {sample_id: digest_of(sample_id) for sample_id in shard.sample_ids}
        writer.commit_shard(
            shard.shard_id, targets, sample_digests=digests, skipped=(), provenance={"actor": f"actor-{number}"}
        )


def cached_sample(sample_id: str, *, random: torch.Generator) -> TeacherTargets:
    span = Span(10, 16)
    rows = torch.randn(17, HIDDEN, generator=random).bfloat16()
    logprobs = torch.log_softmax(torch.randn(6, VOCABULARY, generator=random), dim=-1)
    top = logprobs.topk(4)
    ids = torch.randint(0, VOCABULARY, (17,), generator=random)
    return TeacherTargets(
        sample_id=sample_id,
        token_ids=ids.int(),
        spans=(span,),
        hidden_states=rows[9:16],
        question_hidden_states=torch.cat([rows[:9], rows[16:]]),
        topk_ids=top.indices.int(),
        topk_logprobs=top.values,
        logsumexp=torch.zeros(6),
        target_logprobs=logprobs[torch.arange(6), ids[10:16]],
        answer_byte_ends=torch.arange(6),
    )


class Page(HTMLParser):
    """Collects what a browser would load, the visible text, and any unbalanced element."""

    VOID = frozenset({"meta", "link", "img", "br", "hr", "input"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.resources: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.resources += [
            value or "" for key, value in attrs if key in ("src", "href", "xlink:href", "action", "data")
        ]
        self.ids += [value or "" for key, value in attrs if key == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def html(run_dir: Path) -> str:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_loads_nothing_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert all(resource.startswith(("#", "data:")) for resource in page.resources)
    assert not re.search(r"https?://", html)
    assert "<script" not in html
    assert len(page.ids) == len(set(page.ids))
    local = {resource[1:] for resource in page.resources if resource.startswith("#")}
    assert local
    assert local <= set(page.ids)


def test_every_part_is_there_with_the_numbers_of_the_files(html: str, run_dir: Path) -> None:
    text = " ".join(" ".join(Page(html).text).split())
    for heading in ("Results on held-out data", "Accuracy by question family", "Examples", "Training"):
        assert heading in text
    for heading in (
        "Does the Recalibrator read the question?",
        "Features at the first and last step",
        "The teacher cache",
    ):
        assert heading in text
    results = json.loads((run_dir / "results.json").read_text())
    assert f"The teacher scores {100 * results['teacher_accuracy']:.1f} %" in text
    for values in results["students"].values():
        assert f"SFT only {100 * values['sft_accuracy']:.1f} %, distilled {100 * values['accuracy']:.1f} %" in text
    assert "Left out" not in text
    assert "8 samples with 48 answer tokens over a vocabulary of 512" in text
    assert "llava used the same cache: 98.1 s of training, no teacher, 61.3 s of its time saved" in text
    assert "actor-0, actor-1" in text
    assert "0.32.0" in text
    assert format_bytes(48 * VOCABULARY * 2) in text


def test_model_answers_are_shown_as_text_not_as_markup(html: str) -> None:
    assert "&lt;b&gt;seven &amp; three" in html
    assert "<b>seven" not in html


def test_the_page_is_deterministic(html: str, run_dir: Path) -> None:
    assert write_report(run_dir).read_text(encoding="utf-8") == html


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_chromium_opens_the_page_without_a_console_message(html: str, run_dir: Path, tmp_path: Path) -> None:
    opened = chromium("--dump-dom", str(run_dir / "report.html"), profile=tmp_path / "a")
    assert "CONSOLE" not in opened.stderr
    # the page allows itself no script: a copy that does tells whether its images decode and its figures have a size
    probe = (
        "<script>const images = [...document.images], figures = [...document.querySelectorAll('svg')];"
        "document.title = JSON.stringify({images: images.length, figures: figures.length,"
        " broken: images.filter(image => !(image.complete && image.naturalWidth > 0)).length,"
        " flat: figures.filter(figure => figure.getBoundingClientRect().height < 50).length,"
        " overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth});</script></body>"
    )
    copy = tmp_path / "probed.html"
    copy.write_text(re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", probe), encoding="utf-8")
    probed = chromium("--dump-dom", str(copy), profile=tmp_path / "b")
    title = re.search(r"<title>(.*?)</title>", probed.stdout)
    assert title is not None
    assert json.loads(title[1]) == {"images": 7, "figures": 6, "broken": 0, "flat": 0, "overflow": 0}


def chromium(*arguments: str, profile: Path) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=4000", f"--user-data-dir={profile}"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600, check=True)


@pytest.fixture
def copied(run_dir: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(run_dir, target)
    shutil.rmtree(target / "run-files")
    return target


def test_missing_parts_are_left_out_with_a_note(copied: Path) -> None:
    shutil.rmtree(copied / "cache")
    shutil.rmtree(copied / "data")
    (copied / "timings.json").unlink()
    for path in copied.glob("training/llava/*/features_*"):
        path.unlink()
    html = write_report(copied).read_text(encoding="utf-8")
    assert "the cache was not read" in html
    assert "examples are left out" in html
    assert "no timings.json" in html
    assert "features_last.safetensors of llava" in html
    assert "Features at the first and last step" in html
    assert "<h2>Examples</h2>" not in html
    assert "<h2>The teacher cache</h2>" not in html


def test_an_empty_folder_gives_a_page_of_notes(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "no results.json" in page.text
    assert "nothing has been trained" in " ".join(page.text)


def test_features_without_the_teachers_question_rows(copied: Path) -> None:
    random = np.random.default_rng(0)
    for path in copied.glob("training/llava/*/features_*"):
        whole = features(random, spread=1.0)
        save_file({"z_s": whole["z_s"], "r_s": whole["r_s"]}, path)
    text = " ".join(Page(write_report(copied).read_text(encoding="utf-8")).text)
    assert "widths: r_s 32, z_s 20" in text


def test_cache_and_data_may_lie_where_a_run_file_says(copied: Path, tmp_path: Path) -> None:
    for name in ("cache", "data"):
        (copied / name).rename(tmp_path / f"other-{name}")
    (copied / "run-files").mkdir()
    places = {
        "cache": {"uri": str(tmp_path / "other-cache")},
        "evaluation": {"data": str(tmp_path / "other-data" / "test.parquet")},
    }
    (copied / "run-files" / "a.yaml").write_text(json.dumps(places))
    html = write_report(copied).read_text(encoding="utf-8")
    assert "<h2>Examples</h2>" in html
    assert "<h2>The teacher cache</h2>" in html


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run folder"):
        write_report(tmp_path / "nothing")


def test_a_damaged_file_is_named(copied: Path) -> None:
    (copied / "results.json").write_text("{")
    with pytest.raises(DataError, match=r"results\.json is not JSON"):
        write_report(copied)


def test_the_command_prints_the_place(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_command([str(copied)]) == 0
    assert capsys.readouterr().out.strip() == str(copied / "report.html")


def test_similarity_ignores_rotation_scale_and_width_and_sees_chance() -> None:
    random = np.random.default_rng(0)
    left = random.normal(size=(60, 12))
    rotation, _ = np.linalg.qr(random.normal(size=(20, 20)))
    padded = np.concatenate([left, np.zeros((60, 8))], axis=1)
    assert unbiased_cka(left, 3 * padded @ rotation) == pytest.approx(1.0)
    assert abs(unbiased_cka(left, random.normal(size=(60, 500)))) < 0.1
    assert np.isnan(unbiased_cka(left[:3], left[:3]))


def test_embedding_keeps_the_spaces_apart_and_order() -> None:
    points = embed(features(np.random.default_rng(0), spread=0.1))
    assert {space: list(sets) for space, sets in points.items()} == {
        "student": ["z_s"],
        "teacher": ["z_l", "r_s", "r_l"],
    }
    near = np.linalg.norm(points["teacher"]["z_l"] - points["teacher"]["r_l"], axis=1)
    across = np.linalg.norm(points["teacher"]["z_l"] - np.roll(points["teacher"]["r_l"], 1, axis=0), axis=1)
    assert np.median(near) < 0.2 * np.median(across)


def test_images_that_no_browser_shows_become_png() -> None:
    import io

    import PIL.Image

    buffer = io.BytesIO()
    PIL.Image.new("RGB", (2, 2)).save(buffer, format="TIFF")
    assert data_uri(buffer.getvalue()).startswith("data:image/png;base64,")
    assert data_uri(b"\xff\xd8\xff").startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (1023 * 2**20, "1023 MiB"), (3.25 * 2**40, "3.25 TiB")]
)
def test_byte_counts_read_well(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_a_run_that_goes_on_shows_how_far_it_is(tmp_path: Path) -> None:
    write_live_run(tmp_path)
    text = " ".join(" ".join(Page(write_report(tmp_path).read_text(encoding="utf-8")).text).split())
    assert "internvl align done 100" in text
    assert re.search(r"distill at \d\d \w{3} [\d:]{8} 63 / 100 \d\.\d{4} 1\.600 1,000 25 % 2 0:37", text)
    assert "finetune not begun" in text
    assert "llava align not begun" in text
    for heading in ("Validation while training", "Throughput and memory", "Updates that were not made"):
        assert heading in text
    assert "internvl distill 41 loss spike 183.200 912.100 s0, s1, s2, s3 and 5 more" in text
    assert re.search(r"internvl distill 55 loss not finite \S \S s7", text)


def write_live_run(folder: Path) -> None:
    random = np.random.default_rng(0)
    for stage, steps in {"align": 100, "distill": 63}.items():
        target = folder / "training" / "internvl" / stage
        target.mkdir(parents=True)
        records = [
            record
            | {"max_steps": 100, "time/remaining_s": 100 - record["global_step"], "memory/peak_rss_gib": 2.0}
            | {"throughput/tokens_per_s": 1000.0, "data/wait_fraction": 0.25, "data/padding_fraction": 0.1}
            for record in stage_records(stage, random=random)[:steps]
        ]
        if stage == "distill":
            records.insert(0, {"global_step": 0, "validation/bits_per_byte": 1.9, "validation/accuracy": 0.1})
            records[60] |= {"validation/bits_per_byte": 1.6, "validation/accuracy": 0.3}
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (target / "metrics.jsonl").write_text(lines + '{"global_step": 64, "tr')
    (folder / "training" / "internvl" / "align" / "DONE.json").write_text("{}")
    many = {"rank": 0, "sample_ids": [f"s{index}" for index in range(9)], "reasons": []}
    one = {"rank": 1, "sample_ids": ["s7"], "reasons": ["why"]}
    faults = [
        {"global_step": 41, "kind": "loss spike", "loss": 183.2, "grad_norm": 912.1, "limit": 12.0, "shares": [many]},
        {"global_step": 55, "kind": "loss not finite", "loss": None, "grad_norm": None, "limit": None, "shares": [one]},
    ]
    path = folder / "training" / "internvl" / "distill" / "faults.jsonl"
    path.write_text("".join(json.dumps(fault) + "\n" for fault in faults))
    (folder / "run-files").mkdir()
    students = [{"name": name, "method": "genrecal"} for name in STUDENTS]
    (folder / "run-files" / "a.yaml").write_text(json.dumps({"cache": {"uri": "nowhere"}, "students": students}))


def test_a_watched_report_reloads_itself_and_ends_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_live_run(tmp_path)
    path = tmp_path / "report.html"
    pages = []

    def finish(_: float) -> None:
        pages.append(path.read_text(encoding="utf-8"))
        for student in STUDENTS:
            for stage in ("align", "distill", "finetune"):
                folder = tmp_path / "training" / student / stage
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "metrics.jsonl").touch()
                (folder / "DONE.json").write_text("{}")

    monkeypatch.setattr("launch.report.time", SimpleNamespace(sleep=finish))
    assert report_command([str(tmp_path), "--watch", "30"]) == 0
    (live,) = pages
    assert '<meta http-equiv="refresh" content="30">' in live
    assert 'http-equiv="refresh"' not in path.read_text(encoding="utf-8")
    assert capsys.readouterr().out == f"{path}\n{path}\n"


def test_a_watched_report_ends_on_ctrl_c_with_a_page_that_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("launch.report.time", SimpleNamespace(sleep=interrupt))
    assert report_command([str(tmp_path), "--watch", "5"]) == 0
    assert "refresh" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_report_of_nothing_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for name in ("misspelt", "file"):
        assert main(["report", str(tmp_path / name)]) == 1
        assert "error [data]: no run folder at" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
