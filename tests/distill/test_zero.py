"""ZeRO-3 over two processes against the torch backend."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from distill import trainer
from distill.config import StudentConfig, TrainConfig
from distill.processes import Processes
from distill.reshard import separate_steps
from distill.trainer import train_student
from distill.watchdog import LAST_WORDS_S, collective_timeout
from distill.zero import launched_processes
from teacher_cache.config import CacheConfig
from teacher_cache.errors import ConfigError
from tests.distill.engine_runs import EngineRun
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import GAPS
from tests.distill.zero_scenarios import ENGINE_RUNS, OTHER_METHODS, run_variant

STAGES = ("align", "distill", "finetune")
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}


def test_another_number_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ConfigError, match="num_processes is 2, but 1"),
        launched_processes(backend="zero3", num_processes=2),
    ):
        pass
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="backend torch"), launched_processes(backend="torch", num_processes=2):
        pass


@pytest.mark.parametrize("made_by_others", [False, True], ids=["ours", "Ray Train's"])
def test_no_group_ends_a_wait_that_a_watchdog_allows(made_by_others: bool) -> None:
    import deepspeed

    limit = collective_timeout(TrainConfig(hang_timeout_s=9000.0, slow_timeout_s=100.0))
    assert limit > timedelta(seconds=9000.0 + LAST_WORDS_S)
    if made_by_others:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=timedelta(seconds=5))
    try:
        with launched_processes(backend="zero3", num_processes=1, timeout=limit) as joined:
            # ZeRO-3 works in a group that DeepSpeed makes
            groups: list[Any] = [torch.distributed.group.WORLD, deepspeed.comm.new_group([0])]
            found = [group._get_backend(joined.device).options._timeout for group in groups]
    finally:
        if made_by_others:
            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None
    assert found == [limit, limit]


def test_training_asks_for_the_limit_of_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def launched(**options: Any) -> None:
        asked.update(options)
        raise InterruptedError

    monkeypatch.setattr(trainer, "launched_processes", launched)
    train = TrainConfig(hang_timeout_s=5.0, slow_timeout_s=20_000.0)
    with pytest.raises(InterruptedError):
        train_student(
            cache=CacheConfig.model_construct(),
            student=StudentConfig(name="tiny", model="nowhere"),
            train=train,
            output_dir=tmp_path,
        )
    assert asked["timeout"] > timedelta(seconds=20_000.0 + LAST_WORDS_S)


def test_steps_of_a_converted_checkpoint_lie_beside_their_parameters() -> None:
    shared = torch.tensor(3.0)
    parameters = [torch.nn.Parameter(torch.zeros(2, device=device)) for device in ("cpu", "cpu", "meta")]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        optimizer.state[parameter]["step"] = shared
    separate_steps(optimizer)
    first, second, other = (optimizer.state[parameter]["step"] for parameter in parameters)
    first += 1
    assert (float(first), float(second), float(shared)) == (4.0, 3.0, 3.0)
    assert other.device == parameters[2].device


def settings(**changes: Any) -> dict[str, Any]:
    stage = {"global_batch_size": 8, "micro_batch_size": 2, "learning_rate": 1e-3}
    return {
        "align": stage | {"max_steps": 6},
        "distill": stage | {"max_steps": 4},
        "finetune": stage | {"max_steps": 4},
        "zero": {"persistence_threshold": 0},
        "save_interval_steps": 2,
        "shuffle_gap_interval_steps": 2,
        **changes,
    }


def read_metrics(output_dir: Path, stage: str) -> list[dict[str, Any]]:
    lines = (output_dir / "training" / "tiny" / stage / "metrics.jsonl").read_text().splitlines()
    kept = ("global_step", "train", "optim")
    return [{k: v for k, v in json.loads(line).items() if k.split("/")[0] in kept} for line in lines]


@pytest.fixture(scope="module")
def launched(
    tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path, tiny_internvl: Path
) -> tuple[Path, dict[str, Any]]:
    """One launch of two ZeRO-3 processes through every scenario of zero_scenarios.py."""
    folder = tmp_path_factory.mktemp("zero")
    # some micro-batches have no image, some no question rows: both processes must call the same modules even so
    data = write_data(folder / "data", num_samples=18, text_only=(1, 3, 4, 9, 12, 13), multi_turn=(2, 7))
    cache = build_small_cache(
        folder, teacher=tiny_qwen2_vl, data=data, without_question_rows=[f"s{index:03d}" for index in range(0, 18, 2)]
    )
    student = StudentConfig(name="tiny", model=str(tiny_internvl), dtype="float32", max_length=512)
    inputs = {
        "cache": cache.model_dump(mode="json"),
        "student": student.model_dump(mode="json"),
        "train": settings(num_processes=2),
    }
    (folder / "inputs.json").write_text(json.dumps(inputs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("zero_scenarios.py")
    environment = os.environ | {"PYTHONPATH": str(script.parents[2]), "PYTHONWARNINGS": "ignore::FutureWarning"}
    finished = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    return folder, inputs


def test_zero3_over_two_processes_equals_one_torch_process(launched: tuple[Path, dict[str, Any]]) -> None:
    folder, inputs = launched
    train_student(
        cache=CacheConfig.model_validate(inputs["cache"]),
        student=StudentConfig.model_validate(inputs["student"]),
        train=TrainConfig.model_validate(settings(backend="torch")),
        output_dir=folder / "torch",
    )
    for stage in STAGES:
        runs = [read_metrics(folder / backend, stage) for backend in ("whole", "torch")]
        for left, right in zip(*runs, strict=True):
            # measured over one micro-batch per process, so over other samples
            assert ("train/question_shuffle_gap" in left) == ("train/question_shuffle_gap" in right)
            for record in (left, right):
                for gap in GAPS:
                    record.pop(gap, None)
            assert left == pytest.approx(right, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", OTHER_METHODS)
def test_other_methods_equal_one_torch_process(launched: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, inputs = launched
    method, changes = OTHER_METHODS[name]
    train_student(
        cache=CacheConfig.model_validate(inputs["cache"]),
        student=StudentConfig.model_validate(inputs["student"] | {"method": method}),
        train=TrainConfig.model_validate(settings(backend="torch") | changes),
        output_dir=folder / "torch" / name,
        stages=["distill"],
    )
    runs = [read_metrics(parent / name, "distill") for parent in (folder, folder / "torch")]
    for left, right in zip(*runs, strict=True):
        alike = [{key: value for key, value in record.items() if key not in GAPS} for record in (left, right)]
        assert alike[0] == pytest.approx(alike[1], rel=1e-5, abs=1e-5)


def engine_run(folder: Path, name: str) -> EngineRun:
    found: EngineRun = torch.load(folder / f"engine-{name}.pt", weights_only=False)
    return found


@pytest.fixture(scope="module")
def references(launched: tuple[Path, dict[str, Any]]) -> dict[str, EngineRun]:
    """What one torch process makes of the same steps, by stage and whether there are adapters."""
    _, inputs = launched
    alone = Processes(rank=0, world_size=1, device=torch.device("cpu"))
    return {
        name: run_variant(inputs, ENGINE_RUNS[name], processes=alone, backend="torch")
        for name in ("align", "distill", "adapters")
    }


@pytest.mark.parametrize("name", [name for name, variant in ENGINE_RUNS.items() if "dtype" not in variant.student])
def test_steps_of_unequal_micro_batches_equal_one_torch_process(
    launched: tuple[Path, dict[str, Any]], references: dict[str, EngineRun], name: str
) -> None:
    variant, found = ENGINE_RUNS[name], engine_run(launched[0], name)
    expected = references["adapters" if variant.student else variant.stage]
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert found.parameters.keys() == expected.parameters.keys()
    for parameter_name, parameter in expected.parameters.items():
        if parameter_name in expected.frozen or parameter_name.endswith("k_proj.bias"):
            continue  # a key bias has no gradient but rounding, which Adam divides by itself
        moved = torch.linalg.vector_norm(parameter - expected.initial[parameter_name])
        apart = torch.linalg.vector_norm(parameter - found.parameters[parameter_name])
        # Norms, since Adam makes a whole step of one element's gradient that is all but 0, in whatever direction.
        assert apart <= 1e-3 * moved, parameter_name


@pytest.mark.parametrize("name", ENGINE_RUNS)
def test_what_is_frozen_keeps_every_bit(launched: tuple[Path, dict[str, Any]], name: str) -> None:
    run = engine_run(launched[0], name)
    assert 0 < len(run.frozen) < len(run.parameters)
    for parameter_name, before in run.frozen.items():
        assert torch.equal(run.parameters[parameter_name], before), parameter_name
    trained = run.parameters.keys() - run.frozen.keys()
    assert not any(torch.equal(run.parameters[n], run.initial[n]) for n in trained if n.endswith("proj.weight"))


@pytest.mark.parametrize("name", ENGINE_RUNS)
def test_the_teachers_head_is_one_tensor_outside_of_zero3(launched: tuple[Path, dict[str, Any]], name: str) -> None:
    facts = engine_run(launched[0], name).facts
    assert facts["head_is_plain"]
    assert facts["head_stayed"]


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16-in-shares"])
def test_bfloat16_has_float32_masters_moments_gradient_sums_and_rotary_frequencies(
    launched: tuple[Path, dict[str, Any]], name: str
) -> None:
    run = engine_run(launched[0], name)
    assert run.facts["parameter_dtypes"] == {"torch.bfloat16"}
    for kind in ("master_dtypes", "moment_dtypes", "gradient_sum_dtypes", "rotary_dtypes"):
        assert run.facts[kind] == {"torch.float32"}, kind
    assert run.losses == pytest.approx(engine_run(launched[0], "distill").losses, rel=0.02)


@pytest.mark.parametrize("name", ENGINE_RUNS)
def test_every_engine_partitions_its_parameters(launched: tuple[Path, dict[str, Any]], name: str) -> None:
    report = engine_run(launched[0], name).facts["partition"]
    assert report.partitioned == report.parameters > 0
    assert report.held == pytest.approx(report.parameters / 2, rel=0.01)


def test_zero3_resumes_bit_identically(launched: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = launched
    assert [(folder / "halted" / f"exit-code-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    for stage in STAGES:
        assert read_metrics(folder / "halted", stage) == read_metrics(folder / "whole", stage)
    students = [folder / name / "students" / "tiny" / "model.safetensors" for name in ("halted", "whole")]
    assert students[0].read_bytes() == students[1].read_bytes()


def test_parameters_are_partitioned(launched: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = launched
    for stage in STAGES:
        report = json.loads((folder / "whole" / "training" / "tiny" / stage / "DONE.json").read_text())["partition"]
        assert report["partitioned"] == report["parameters"] > 0
        assert report["held"] == pytest.approx(report["parameters"] / 2, rel=0.01)


def test_a_finished_training_is_not_repeated_by_another_number_of_processes(
    launched: tuple[Path, dict[str, Any]],
) -> None:
    folder, inputs = launched
    files = {path: path.stat().st_mtime_ns for path in (folder / "whole").rglob("*.safetensors")}
    train_student(
        cache=CacheConfig.model_validate(inputs["cache"]),
        student=StudentConfig.model_validate(inputs["student"]),
        train=TrainConfig.model_validate(settings(backend="torch")),
        output_dir=folder / "whole",
    )
    assert {path: path.stat().st_mtime_ns for path in (folder / "whole").rglob("*.safetensors")} == files


def test_bfloat16_trains_and_exports_bfloat16(launched: tuple[Path, dict[str, Any]]) -> None:
    from safetensors.torch import load_file

    folder, _ = launched
    losses = [record["train/loss"] for record in read_metrics(folder / "bfloat16", "align")]
    reference = [record["train/loss"] for record in read_metrics(folder / "whole", "align")][: len(losses)]
    assert losses == pytest.approx(reference, rel=0.02)
    export = load_file(folder / "bfloat16" / "training" / "tiny" / "align" / "export" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in export.values()} == {"torch.bfloat16"}
