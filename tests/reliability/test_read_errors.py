"""R8: a read that fails or comes up short never gives wrong data, and the error says whose data it was."""

import base64
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from teacher_cache import open_cache
from teacher_cache.documents import encode_document
from teacher_cache.errors import CacheError
from teacher_cache.reader import TeacherCache
from teacher_cache.repair import repair_cache
from tests.reliability.checks import require_kept, require_whole
from tests.reliability.faults import Refusal
from tests.reliability.processes import quick_folder, spread
from tests.reliability.read_faults import TROUBLES, ReadFault, Trouble, troubled_reads
from tests.reliability.scenarios import SCENARIOS, Scenario, ignore
from tests.reliability.shim import READS, Point, Step, intercept, one_thread
from tests.teacher_cache.store import assert_same, build, make_samples

SAMPLES = make_samples(4)


def require_clear(error: CacheError, *, step: Step, root: Path) -> None:
    """Check that an error names the file, and the shard and sample that it holds."""
    assert str(step.path) in str(error), f"{error} does not name {step.path}"
    folder, _, rest = step.path.relative_to(root).as_posix().partition("/")
    if folder == "shards":
        shard = int(rest[:5])
        ids = [repr(sample.sample_id) for sample in SAMPLES[2 * shard : 2 * shard + 2]]
        assert f"shard {shard:05}, sample" in str(error)
        assert any(sample_id in str(error) for sample_id in ids)


@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}], ids=["raw", "zstd"])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_no_wrong_data_after_any_read(tmp_path: Path, trouble: Trouble, options: dict[str, Any]) -> None:
    root = tmp_path / "cache"
    build(root, SAMPLES, **options)
    expected = {sample.sample_id: open_cache(str(root)).read([sample.sample_id])[0] for sample in SAMPLES}

    def read_all(cache: TeacherCache) -> None:
        for sample_id, sample in expected.items():
            assert_same(cache.read([sample_id])[0], sample)

    count = 0
    for allow_incomplete in (False, True):
        counter = ReadFault()
        with one_thread(), troubled_reads(counter):
            read_all(open_cache(str(root), allow_incomplete=allow_incomplete))
        for number in range(1, len(counter.steps) + 1):
            fault, cache, error = ReadFault(number=number, trouble=trouble), None, None
            with one_thread(), troubled_reads(fault):
                try:
                    cache = open_cache(str(root), allow_incomplete=allow_incomplete)
                    read_all(cache)
                except CacheError as caught:
                    error = caught
            assert fault.struck is not None
            if trouble == "short" and fault.struck.kind == "read":
                assert error is None
            else:
                assert error is not None, f"nothing was said of {fault.struck}"
                require_clear(error, step=fault.struck, root=root)
            if cache is not None:
                read_all(cache)
        count += len(counter.steps)
    print(f"R8: {count} reads {trouble}, {options or 'raw'}: 0 wrong data, each error names file, shard and sample")


@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=list(SCENARIOS))
def test_a_builder_survives_a_failed_read(scenario: Scenario) -> None:
    with one_thread(), quick_folder() as folder:
        base, reference = folder / "base", folder / "reference"
        scenario.prepare(base)
        if base.exists():
            shutil.copytree(base, reference)
        steps: list[Step] = []
        with intercept(steps.append, kinds=READS):
            scenario.act(reference, ignore)

        def work(step: Step, place: Path) -> None:
            root, told, error = place / "cache", set(scenario.acknowledged), None
            if base.exists():
                shutil.copytree(base, root)
            refusal = Refusal(point=Point(number=step.number), error=errno.EIO, sticky=False, kinds=READS)
            with intercept(refusal, kinds=READS):
                try:
                    scenario.act(root, lambda *words: told.update(words))
                except CacheError as caught:
                    error = caught
            assert error is None or refusal.is_named_by(str(error)), f"{error} names none of {refusal.refused}"
            require_kept(root, scenario, acknowledged=told)
            scenario.resume(root, ignore)
            require_whole(root, scenario)

        spread([Step(number=step.number, kind=step.kind, path=step.path) for step in steps], work)
    print(f"R8: {scenario.name}: {len(steps)} failed reads of a builder: 0 lost, 0 corrupt")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("CACHE.json", {"provenance": {"release": "another"}}),
        ("plans/000001.json", {"sample_digests": base64.b64encode(bytes(64)).decode()}),
    ],
)
def test_a_repair_removes_nothing_that_no_build_restores(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    root = tmp_path / "cache"
    build(root, SAMPLES[:2])
    build(root, SAMPLES, extend=True)
    body = json.loads((root / name).read_bytes()) | changes
    del body["sha256"]
    (root / name).write_bytes(encode_document(body))
    report = repair_cache(str(root))
    assert [problem.path for problem in report.beyond_repair] == [name]
    assert (report.removed, report.withdrawn_shards) == ((), ())
    assert json.loads((root / name).read_bytes()).items() > changes.items()
