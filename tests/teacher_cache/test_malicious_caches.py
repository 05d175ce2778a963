"""S2, S3, S4 and S12: caches that an attacker has written are refused, with no harm done."""

import ast
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from teacher_cache.errors import CacheError, ConfigError
from teacher_cache.schema import SkippedSample
from teacher_cache.verify import snapshot_digest, verify_cache
from tests.reliability.processes import quick_folder
from tests.teacher_cache.assault import CPU_LIMIT_S, MEMORY_LIMIT_BYTES, Attack, assault
from tests.teacher_cache.attacks import COMPRESSED, HEADERS, SHAPES, TEXTS
from tests.teacher_cache.payloads import CODE
from tests.teacher_cache.store import build, make_samples, open_builder
from tests.teacher_cache.tampering import TAMPERING

SAMPLES = {sample.sample_id: sample for sample in make_samples(2)}
SOURCES = ("teacher_cache", "recalibrator", "distill", "launch")
MIB = 1024**2


@pytest.fixture(scope="module")
def templates() -> Iterator[dict[str, Path]]:
    """Return a cache as it is and one that is compressed."""
    with quick_folder() as folder:
        for compression in ("none", "zstd"):
            build(folder / compression, list(SAMPLES.values()), per_shard=1, compression=compression)
        yield {compression: folder / compression for compression in ("none", "zstd")}


def withstand(template: Path, attacks: Mapping[str, Attack]) -> str:
    """Check that each attack is noticed and does no harm; return the figures."""
    failures, most, longest = {}, 0, 0.0
    for name, outcome in assault(template, attacks, samples=SAMPLES):
        most, longest = max(most, outcome.grown_bytes), max(longest, outcome.cpu_s)
        if outcome.wrong or not outcome.noticed:
            failures[name] = outcome
    assert not failures, "\n".join(f"{name}: {outcome}" for name, outcome in failures.items())
    return (
        f"{len(attacks)} of {len(attacks)} refused, at most {most / MIB:.0f} MiB (limit {MEMORY_LIMIT_BYTES // MIB}) "
        f"and {longest:.2f} s (limit {CPU_LIMIT_S:.0f}) for one use"
    )


def test_a_cache_as_it_is_passes_every_use(templates: dict[str, Path]) -> None:
    for template in templates.values():
        ((_, outcome),) = assault(template, {"nothing": lambda root: None}, samples=SAMPLES)
        assert not outcome.wrong
        assert not outcome.noticed
        assert set(outcome.answers.values()) == {"done"}


def test_absurd_shapes_are_refused_before_memory_is_taken(templates: dict[str, Path]) -> None:
    print(f"S2: absurd shapes: {withstand(templates['none'], SHAPES)}")


@pytest.mark.parametrize(
    ("what", "compression", "attacks"),
    [("compressed chunks", "zstd", COMPRESSED), ("documents", "none", TEXTS), ("headers", "none", HEADERS)],
)
def test_bombs_are_refused_by_what_they_declare(
    templates: dict[str, Path], what: str, compression: str, attacks: Mapping[str, Attack]
) -> None:
    print(f"S3: {what}: {withstand(templates[compression], attacks)}")


def test_no_code_is_run_that_a_cache_brings(templates: dict[str, Path]) -> None:
    print(f"S4: payloads: {withstand(templates['none'], CODE)}")


def test_no_source_can_run_code_from_data() -> None:
    files = [path for source in SOURCES for path in Path(source).rglob("*.py")]
    assert len(files) > 80
    found = [f"{path}:{line}: {what}" for path in files for line, what in dangerous(ast.parse(path.read_text()))]
    assert not found, "\n".join(found)
    print(f"S4: sources: {len(files)} files, 0 that unpickle, evaluate or load tags")


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval('1')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_search_of_the_sources_finds(source: str) -> None:
    assert list(dangerous(ast.parse(source)))


def dangerous(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield what could run code that comes from a file."""
    unpicklers = {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
    calls = {"eval", "exec", "compile", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "").split(".")[0]}
        else:
            names = set()
        for name in names & unpicklers:
            yield node.lineno, f"imports {name}"
        if isinstance(node, ast.Call):
            called, options = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            is_open_load = called.endswith("torch.load") and options.get("weights_only") != "True"
            is_option = "True" in (options.get("allow_pickle"), options.get("shell"))
            if called in calls or is_open_load or is_option:
                yield node.lineno, f"calls {ast.unparse(node)}"


def test_a_trusted_digest_refuses_every_change(templates: dict[str, Path]) -> None:
    template = templates["none"]
    trusted = snapshot_digest(str(template))
    assert passes(template, trusted=trusted)
    attacks = {**SHAPES, **TEXTS, **HEADERS, **CODE, **TAMPERING}
    unseen_without, missed = [], []
    with quick_folder() as folder:
        for number, (name, attack) in enumerate(attacks.items()):
            (folder / str(number) / "outside").mkdir(parents=True)
            root = folder / str(number) / "cache"
            shutil.copytree(template, root)
            attack(root)
            if name in TAMPERING and passes(root, trusted=None):
                unseen_without.append(name)
            if passes(root, trusted=trusted):
                missed.append(name)
            shutil.rmtree(root)
    assert not missed
    # the digest is needed: these changes fit all the digests that the cache itself holds
    assert {"another provenance", "another checksum", "a later record", "a later plan"} <= set(unseen_without)
    print(
        f"S12: {len(attacks)} of {len(attacks)} changed caches refused with a trusted digest; "
        f"{len(unseen_without)} of them pass without one"
    )


def passes(root: Path, *, trusted: str | None) -> bool:
    try:
        return verify_cache(str(root), trusted_digest=trusted).ok
    except CacheError:
        return False


def test_nothing_is_committed_that_no_reader_would_take(tmp_path: Path) -> None:
    (sample,) = make_samples(1)
    with pytest.raises(ConfigError, match=r"the manifest of .* at most 16777216 are read"):
        open_builder(tmp_path / "cache", [sample], provenance={"text": "x" * 2**24})
    writer = open_builder(tmp_path / "cache", [sample])
    skipped = [SkippedSample(sample_id=sample.sample_id, reason="too-long", message="m" * 2**23)]
    with pytest.raises(CacheError, match=r"shard 00000: its commit record has .* at most 4259840 are read"):
        writer.commit_shard("00000", [], sample_digests={}, skipped=skipped, provenance={})
    assert len(writer.missing_shards()) == 1
    build(tmp_path / "cache", [sample])
    assert verify_cache(str(tmp_path / "cache")).ok
