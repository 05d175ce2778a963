"""What launchers say, and what is refused of it."""

from typing import Any

import pytest

from distill.processes import SLURM_PORTS, first_host, launch_environment, require_visible_gpu
from teacher_cache.errors import ConfigError

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}


def test_a_lone_process_gets_all_variables() -> None:
    environment = launch_environment({"MASTER_ADDR": "somewhere"})
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("0", "1", "0")
    assert int(environment["MASTER_PORT"]) > 0


def test_a_launchers_variables_are_kept() -> None:
    assert launch_environment(LAUNCHED | {"OTHER": "x"}) == LAUNCHED


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE"])
def test_a_partial_environment_names_what_is_missing(missing: str) -> None:
    partial = {name: value for name, value in LAUNCHED.items() if name != missing}
    with pytest.raises(ConfigError, match=f"but not {missing}"):
        launch_environment(partial)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": "2"}, r"RANK is 2, expected less than WORLD_SIZE \(2\)"),
        ({"LOCAL_RANK": "5"}, r"LOCAL_RANK is 5, expected less than WORLD_SIZE"),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK is 1, expected less than LOCAL_WORLD_SIZE"),
        ({"RANK": "one", "MASTER_PORT": ""}, "RANK is 'one', expected a number; MASTER_PORT is '', expected a number"),
        ({"RANK": "-1"}, "RANK is '-1', expected a number"),
        ({"MASTER_PORT": "99999"}, "MASTER_PORT is 99999, expected 1 to 65535"),
        ({"WORLD_SIZE": "0"}, "expected less than WORLD_SIZE"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is empty"),
    ],
)
def test_contradictions_are_named(changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        launch_environment(LAUNCHED | changes)


def test_srun_tasks_are_ranks() -> None:
    environment = launch_environment(SLURM | {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"})
    assert (environment["RANK"], environment["WORLD_SIZE"], environment["LOCAL_RANK"]) == ("3", "4", "1")
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("node0", "29500")
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        launch_environment(SLURM)


def test_srun_gives_address_and_port() -> None:
    step = {"SLURM_STEP_NODELIST": "gpu[07-09,12]", "SLURM_JOB_ID": "812345", "SLURM_STEP_ID": "0"}
    environment = launch_environment(SLURM | step)
    assert environment["MASTER_ADDR"] == "gpu07"
    assert int(environment["MASTER_PORT"]) in SLURM_PORTS
    assert launch_environment(SLURM | step | {"SLURM_PROCID": "0"})["MASTER_PORT"] == environment["MASTER_PORT"]
    assert launch_environment(SLURM | step | {"SLURM_STEP_ID": "1"})["MASTER_PORT"] != environment["MASTER_PORT"]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("login1", "login1"),
        ("n1,n2", "n1"),
        ("gpu[007-012,20],login1", "gpu007"),
        ("gpu[3,5-7]", "gpu3"),
        ("rack[1-2]-node[04-09].cluster", "rack1-node04.cluster"),
        ("a.b-c,d[1-2]", "a.b-c"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", "gpu[", "gpu[]", "[", "gpu]1", "a b", ",n1", "gpu[[1-2]]", "$(x)"])
def test_an_unclear_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        first_host(nodes)


@pytest.mark.parametrize(("local_rank", "accepted"), [(0, True), (1, True), (2, False)])
def test_every_process_needs_a_visible_gpu(local_rank: int, accepted: bool) -> None:
    arguments: dict[str, Any] = {"num_gpus": 2, "environment": {"CUDA_VISIBLE_DEVICES": "4,5"}}
    if accepted:
        require_visible_gpu(local_rank, **arguments)
        return
    with pytest.raises(ConfigError, match=r"LOCAL_RANK is 2, .* 2 GPUs \(CUDA_VISIBLE_DEVICES 4,5\)"):
        require_visible_gpu(local_rank, **arguments)
