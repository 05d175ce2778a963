"""Kubernetes manifests: KubeRay's schema, golden files, hostile values, who waits for whom, secrets by reference."""

import json
import os
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.cli import main
from launch.clusters.config import ClusterConfig, KubeRayConfig
from launch.clusters.jobs import run_jobs
from launch.clusters.kuberay import as_yaml, literal, manifests
from launch.clusters.kuberay_submit import describe_kuberay, submit_kuberay
from launch.clusters.states import kube_state
from launch.clusters.wait import JobsEnded, JobsMissing, wait_for_jobs
from launch.run_config import RunConfig
from teacher_cache.errors import ConfigError
from tests.launch.golden import compare
from tests.launch.hostile import HOSTILE
from tests.launch.test_submit_slurm import VALUES

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "tests" / "fixtures" / "kuberay" / "rayjob-v1.schema.json"
KUBE = {
    "image": "registry.example/genrecal:1",
    "namespace": "vision",
    "service_account": "trainer",
    "queue": "gpus",
    "claim": "shared",
    "node_selector": {"gpu": "h100"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "secrets": {"HF_TOKEN": {"secret": "hub", "key": "token"}},
}


def run_config(**changes: object) -> RunConfig:
    return RunConfig.model_validate(VALUES | {"cluster": {"kuberay": KUBE | changes}})


SUBMITTED = "2026-01-02T03:04:05+00:00"


def rendered(config: RunConfig) -> list[dict[str, Any]]:
    return manifests(config, run_jobs(config), submitted=SUBMITTED)


def strict(schema: Any) -> Any:
    """Refuse unknown fields too, which Kubernetes would drop in silence."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(value) for name, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema:
        closed["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return closed


@pytest.fixture(scope="module")
def rayjob_schema() -> Any:
    schema = strict(json.loads(SCHEMA.read_text()))
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(schema)


def only(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [item for item in objects if item["kind"] == kind]


def pods(objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = [item["spec"]["template"]["spec"] for item in only(objects, "Job")]
    for job in only(objects, "RayJob"):
        found.append(job["spec"]["submitterPodTemplate"]["spec"])
        cluster = job["spec"]["rayClusterSpec"]
        found += [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return found


def test_manifests_are_those_that_were_reviewed() -> None:
    compare("kuberay/run.yaml", as_yaml(rendered(run_config())))


def test_the_cache_job_fits_the_schema_of_kuberay(rayjob_schema: Any) -> None:
    for config in (run_config(), run_config(queue=None, claim=None, secrets={}, node_selector={}, tolerations=[])):
        (job,) = only(rendered(config), "RayJob")
        rayjob_schema.validate(job)
    job["spec"]["shutdownAfterJobFinish"] = True
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
        rayjob_schema.validate(job)


def test_the_ray_of_the_manifests_is_the_pinned_one() -> None:
    assert f"ray=={KubeRayConfig().ray_version}\n" in (ROOT / "constraints.txt").read_text()


def test_a_cluster_asks_for_a_token_and_kueue_admits_the_jobs() -> None:
    objects = rendered(run_config())
    (cache,) = only(objects, "RayJob")
    assert cache["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    for job in (cache, *only(objects, "Job")):
        assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
        assert job["spec"]["suspend"] is True
    for job in rendered(run_config(queue=None)):
        assert "suspend" not in job.get("spec", {})


def test_pods_are_unprivileged_and_name_secrets_only() -> None:
    for pod in pods(rendered(run_config())):
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in (*pod["containers"], *pod.get("initContainers", [])):
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["env"] == [
                {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
            ]


def test_training_waits_for_the_cache_and_the_report_for_every_student() -> None:
    training, other, report = only(rendered(run_config()), "Job")
    for job in (training, other):
        (waiting,) = job["spec"]["template"]["spec"]["initContainers"]
        assert waiting["command"][-6:-2] == ["--limit-s", str(KubeRayConfig().wait_s), "--since", SUBMITTED]
        assert waiting["command"][-2:] == ["--job", "cache"]
    (waiting,) = report["spec"]["template"]["spec"]["initContainers"]
    assert waiting["command"][-4:] == ["--job", "train internvl", "--job", "train qwen2-vl"]


def test_the_pods_of_one_training_find_each_other() -> None:
    objects = rendered(run_config())
    job, service = only(objects, "Job")[0], only(objects, "Service")[0]
    name, pod = job["metadata"]["name"], job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"] == name
    command = pod["containers"][0]["command"]
    assert command[command.index("--master") + 1] == f"{name}-0.{name}:29500"
    assert (job["spec"]["completions"], command[command.index("--processes-per-node") + 1]) == (2, "8")
    for item in objects:
        assert len(item["metadata"]["name"]) <= 60


def test_a_refusal_fails_the_job_and_a_preemption_does_not_count() -> None:
    for job in only(rendered(run_config()), "Job"):
        refused, disrupted = job["spec"]["podFailurePolicy"]["rules"]
        assert refused == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2, 4]}}, (
            "of the container that waits too"
        )
        assert disrupted["action"] == "Ignore"


def test_the_partners_of_preempted_pods_do_not_use_up_the_attempts() -> None:
    training, _, report = only(rendered(run_config(max_restarts=30, max_attempts=3)), "Job")
    assert training["spec"]["backoffLimit"] == 30 * training["spec"]["completions"]
    assert report["spec"]["backoffLimit"] == 3


def test_a_refused_cache_job_starts_few_clusters() -> None:
    (cache,) = only(rendered(run_config(max_attempts=9)), "RayJob")
    assert cache["spec"]["backoffLimit"] == 2
    words = shlex.split(cache["spec"]["entrypoint"])
    assert words[words.index("--attempts") + 1] == "9"
    assert words[words.index("--since") + 1] == SUBMITTED


def test_a_training_has_the_time_to_save() -> None:
    training, _, report = only(rendered(run_config(grace_s=900)), "Job")
    pod = training["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] == 900
    assert "terminationGracePeriodSeconds" not in report["spec"]["template"]["spec"]


def test_the_head_takes_no_share_of_a_worker() -> None:
    large = {"cpus_per_node": 64, "memory_gib": 512}
    (cache,) = only(rendered(run_config(cache=large, head={"node_selector": {"pool": "cpu"}})), "RayJob")
    cluster = cache["spec"]["rayClusterSpec"]
    head, worker = cluster["headGroupSpec"]["template"]["spec"], cluster["workerGroupSpecs"][0]["template"]["spec"]
    assert head["containers"][0]["resources"]["requests"] == {"cpu": "8000m", "memory": f"{64 * 1024}Mi"}
    assert worker["containers"][0]["resources"]["requests"]["cpu"] == "64000m"
    assert (head["nodeSelector"], worker["nodeSelector"]) == ({"pool": "cpu"}, {"gpu": "h100"})
    (cache,) = only(rendered(run_config()), "RayJob")
    assert "nodeSelector" not in cache["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def test_the_pod_that_submits_the_driver_is_like_the_others() -> None:
    (cache,) = only(rendered(run_config()), "RayJob")
    pod = cache["spec"]["submitterPodTemplate"]["spec"]
    assert (pod["serviceAccountName"], pod["tolerations"]) == ("trainer", KUBE["tolerations"])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["restartPolicy"] == "Never", "a Job takes no other"
    (container,) = pod["containers"]
    assert "command" not in container, "the operator's own"
    assert container["resources"]["requests"] == {"cpu": "500m", "memory": "2048Mi"}


def test_no_gpu_is_reserved_that_nothing_uses() -> None:
    values = VALUES | {"train": {"num_processes": 1}, "cache": VALUES["cache"] | {"build": {"num_replicas": 1}}}
    objects = rendered(RunConfig.model_validate(values | {"cluster": {"kuberay": KUBE}}))
    asked = [pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0) for pod in pods(objects)]
    assert sorted(asked) == [0, 0, 1, 1, 1, 1], "submitter, head, one worker, two students, report"


def test_the_run_file_in_the_cluster_is_the_one_at_hand() -> None:
    config = run_config()
    (config_map,) = only(rendered(config), "ConfigMap")
    assert RunConfig.model_validate(yaml.safe_load(config_map["data"]["run.yaml"])) == config
    for pod in pods(rendered(config)):
        assert {"name": "run-file", "configMap": {"name": config_map["metadata"]["name"]}} in pod["volumes"]


def test_no_image_is_an_error_except_in_a_plan() -> None:
    config = run_config(image=None)
    with pytest.raises(ConfigError, match=r"cluster\.kuberay\.image.*Dockerfile"):
        rendered(config)
    text = describe_kuberay(config)
    assert all(isinstance(item, dict) for item in yaml.safe_load_all(text))
    assert "image: IMAGE" in text


@lru_cache(maxsize=1)
def one_student() -> RunConfig:
    values = {name: value for name, value in VALUES.items() if name not in ("answers", "evaluation")}
    return RunConfig.model_validate(values | {"students": VALUES["students"][:1]})


def check_round_trip(value: str) -> None:
    """Whatever a run file holds arrives in the cluster as it is, and reaches no shell unquoted."""
    hostile = {"image": value, "node_selector": {"label": value}, "tolerations": [{"key": value}]}
    kube = KubeRayConfig.model_validate(KUBE | hostile | {"mount_path": f"/m{value}"})
    cluster = ClusterConfig(kuberay=kube)
    config = one_student().model_copy(update={"output_dir": f"/out/{value}", "cluster": cluster})
    objects = rendered(config)
    assert list(yaml.safe_load_all(as_yaml(objects))) == objects
    (config_map,) = only(objects, "ConfigMap")
    assert yaml.safe_load(config_map["data"]["run.yaml"])["output_dir"] == f"/out/{value}"
    (cache,) = only(objects, "RayJob")
    assert shlex.split(cache["spec"]["entrypoint"])[:4] == ["python", "-m", "launch.clusters.ray_driver", "cache"]
    assert {pod["containers"][0]["workingDir"] for pod in pods(objects)} == {f"/m{value}"}
    command = only(objects, "Job")[0]["spec"]["template"]["spec"]["containers"][0]["command"]
    log_dir = command[command.index("--log-dir") + 1]
    assert expanded(log_dir) == f"/out/{value}/logs/train-internvl-ranks"


OPERATOR = (
    "if ! ray job status --address http://head:8265 cache-1 >/dev/null 2>&1 ; then ray job submit --address "
    "http://head:8265 --no-wait --submission-id cache-1 -- {entrypoint} ; fi ; ray job logs --follow cache-1"
)
"""What KubeRay gives to `bash -ce --` in the submitter's pod: the entrypoint stands in it as it is."""


def test_the_driver_runs_as_the_job_of_the_cluster(tmp_path: Path) -> None:
    """The stand-in for `ray` joins the words after `--` as `ray job submit` does; a shell on the head runs them."""
    programs = {
        "ray": f"import shlex, subprocess, sys\nwords = sys.argv[1:]\nif words[1] == 'status': sys.exit(1)\n"
        "if words[1] == 'logs': sys.exit()\nline = shlex.join(words[words.index('--') + 1:])\n"
        f"subprocess.run(line, shell=True, check=True, env={{'PATH': {str(tmp_path / 'head')!r}}})",
        "head/python": f"import json, sys\nopen({str(tmp_path / 'argv')!r}, 'a').write(json.dumps(sys.argv[1:]))",
        "python": "raise SystemExit('the driver runs in the pod of the submitter')",
    }
    (tmp_path / "head").mkdir()
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!{sys.executable}\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (cache,) = only(rendered(run_config()), "RayJob")
    line = OPERATOR.format(entrypoint=cache["spec"]["entrypoint"])
    done = subprocess.run(
        ["bash", "-ce", "--", line],
        cwd=tmp_path,
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    driver = ["-m", "launch.clusters.ray_driver", "cache", "/etc/genrecal/run.yaml", "--attempts", "5"]
    driver += ["--since", SUBMITTED]
    assert json.loads((tmp_path / "argv").read_text()) == driver


def expanded(text: str) -> str:
    """Replace ``$(NAME)`` and ``$$`` as the kubelet does."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda found: "$" if found[1] == "$" else "EXPANDED", text)


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_arrive_or_are_refused(value: str) -> None:
    if not value.isprintable():
        with pytest.raises(ValidationError, match="one line of printable"):
            run_config(image=value)
        return
    check_round_trip(value)


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=40).filter(str.isprintable))
def test_any_printable_text_arrives(value: str) -> None:
    check_round_trip(value)


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_names_of_objects_are_refused_or_plain(value: str) -> None:
    for field in ("namespace", "service_account", "queue", "claim"):
        try:
            accepted = getattr(KubeRayConfig.model_validate({field: value}), field)
        except ValidationError:
            continue
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", accepted)
    for secrets in ({f"{value} ": {"secret": "a", "key": "b"}}, {"A": {"secret": f"{value} ", "key": "b"}}):
        with pytest.raises(ValidationError):
            KubeRayConfig.model_validate({"secrets": secrets})


def test_a_dollar_is_no_reference() -> None:
    assert expanded(literal("$(HF_TOKEN) $$ $HOME")) == "$(HF_TOKEN) $$ $HOME"


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that writes down what it is called with, and answers from files."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(
        f'#!/bin/bash\necho "$@" >>{folder}/calls\ncase "$1" in\n'
        f"apply) cat >{folder}/applied ;;\nget) cat {folder}/$3 2>/dev/null || exit 1 ;;\nesac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return folder


def test_what_runs_is_left_alone_and_what_failed_is_made_anew(kubectl: Path) -> None:
    config = run_config()
    cache, first, second, report = run_jobs(config)
    (kubectl / cache.name).write_text('{"status": {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}}')
    (kubectl / first.name).write_text('{"status": {"conditions": [{"type": "Failed", "status": "True"}]}}')
    states = {outcome.job.label: outcome.state for outcome in submit_kuberay(config)}
    assert states == {
        "cache": "under way already",
        "train internvl": "submitted",
        "train qwen2-vl": "submitted",
        "report": "submitted",
    }
    applied = list(yaml.safe_load_all((kubectl / "applied").read_text()))
    assert not only(applied, "RayJob")
    assert only(applied, "Job")[0]["spec"]["template"]["spec"]["initContainers"], "the cache is still waited for"
    calls = (kubectl / "calls").read_text()
    assert f"delete jobs.batch {first.name} --namespace=vision" in calls
    assert "delete rayjobs" not in calls
    assert [json.loads(line)["job_id"] for line in Path("run/submit/jobs.jsonl").read_text().splitlines()] == [
        first.name,
        second.name,
        report.name,
    ]


@pytest.mark.parametrize(
    ("cache_status", "first_status"),
    [
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING"}, "Complete"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "Complete"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "Failed"),
    ],
)
def test_what_has_ended_without_its_marks_is_made_anew(
    kubectl: Path, cache_status: dict[str, str], first_status: str
) -> None:
    config = run_config()
    cache, first, second, _ = run_jobs(config)
    (kubectl / cache.name).write_text(json.dumps({"status": cache_status}))
    condition = {"type": first_status, "status": "True"}
    (kubectl / first.name).write_text(json.dumps({"status": {"conditions": [condition]}}))
    waits_in_kueue = {"type": "Suspended", "status": "True"}
    (kubectl / second.name).write_text(json.dumps({"status": {"conditions": [waits_in_kueue]}}))
    assert [outcome.state for outcome in submit_kuberay(config)] == [
        "submitted",
        "submitted",
        "under way already",
        "submitted",
    ]
    deleted = [line.split()[1:3] for line in (kubectl / "calls").read_text().splitlines() if line.startswith("delete")]
    assert deleted == [["rayjobs.ray.io", cache.name], ["jobs.batch", first.name]]


@pytest.mark.parametrize("uri", ["run/cache", "s3://bucket/cache"])
def test_pods_without_a_shared_folder_are_refused(kubectl: Path, uri: str) -> None:
    config = run_config(claim=None)
    with pytest.raises(ConfigError, match="ReadWriteMany"):
        submit_kuberay(config.model_copy(update={"cache": config.cache.model_copy(update={"uri": uri})}))
    assert not (kubectl / "applied").exists()
    assert "# cluster.kuberay.claim is not set: submitting is refused" in describe_kuberay(config)
    assert "claim is not set" not in describe_kuberay(run_config())


def test_kinds_of_jobs_are_submitted_in_turn(kubectl: Path) -> None:
    config = run_config()
    cache, first, second, report = run_jobs(config)
    (kubectl / report.name).write_text('{"status": {"conditions": [{"type": "Failed", "status": "True"}]}}')

    def applied() -> list[str]:
        return [item["metadata"]["name"] for item in yaml.safe_load_all((kubectl / "applied").read_text())][1:]

    assert [outcome.job for outcome in submit_kuberay(config, only=["cache"])] == [cache]
    assert applied() == [cache.name]
    assert [outcome.job for outcome in submit_kuberay(config, only=["train"])] == [first, second]
    assert applied() == [first.name, first.name, second.name, second.name]
    (waiting,) = list(yaml.safe_load_all((kubectl / "applied").read_text()))[2]["spec"]["template"]["spec"][
        "initContainers"
    ]
    assert waiting["command"][-2:] == ["--job", "cache"], "the marks in the claim decide, not those that are seen here"
    assert "delete" not in (kubectl / "calls").read_text(), "what was not asked for is left alone"
    assert [outcome.job for outcome in submit_kuberay(config, only=["report", "train"])] == [first, second, report]


def test_the_command_takes_kinds_of_jobs(kubectl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("run.yaml").write_text(yaml.safe_dump(VALUES | {"cluster": {"kuberay": KUBE}}))
    assert main(["submit", "kuberay", "run.yaml", "--plan", "--only", "cache", "--only", "report"]) == 0
    printed = capsys.readouterr()
    assert [item["kind"] for item in yaml.safe_load_all(printed.out)] == ["ConfigMap", "RayJob", "Job"]
    assert "original.parquet is not seen from here" in printed.err
    Path("original.parquet").touch()
    assert main(["submit", "kuberay", "run.yaml", "--only", "train"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["submit", "kuberay", "run.yaml", "--only", "all"]) == 2
    assert main(["submit", "kuberay", "run.yaml", "--plan", "--only", "cache", "--cluster.kuberay.queue", "other"]) == 0
    assert "kueue.x-k8s.io/queue-name: other" in capsys.readouterr().out


def test_a_run_file_that_cannot_be_rendered_deletes_nothing(kubectl: Path) -> None:
    config = run_config(train={"nodes": 3})
    cache = run_jobs(config)[0]
    (kubectl / cache.name).write_text('{"status": {"jobDeploymentStatus": "Failed"}}')
    with pytest.raises(ConfigError, match="cannot spread"):
        submit_kuberay(config)
    assert "delete" not in (kubectl / "calls").read_text()


@pytest.mark.parametrize(
    ("status", "word"),
    [
        ({}, "PENDING"),
        ({"active": 2}, "RUNNING"),
        ({"conditions": [{"type": "Complete", "status": "True"}]}, "COMPLETE"),
        ({"conditions": [{"type": "Failed", "status": "False"}], "active": 1}, "RUNNING"),
        ({"jobDeploymentStatus": "Initializing"}, "INITIALIZING"),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "FAILED"}, "FAILED"),
        ({"jobDeploymentStatus": "Failed", "jobStatus": "RUNNING"}, "FAILED"),
        ({"jobDeploymentStatus": "Failed"}, "FAILED"),
        ({"jobDeploymentStatus": "ValidationFailed"}, "FAILED"),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, "RETRYING"),
        ({"jobDeploymentStatus": "Suspended", "jobStatus": ""}, "SUSPENDED"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, "SUCCEEDED"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "STOPPED"),
    ],
)
def test_states_of_kubernetes(status: dict[str, object], word: str) -> None:
    assert kube_state(status) == word


def test_waiting_ends_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    with pytest.raises(JobsMissing, match=r"cache of .* not complete after 0 s"):
        wait_for_jobs(str(path), ["cache"], limit_s=0)
    with pytest.raises(JobsEnded, match=r"cache of .* will not become complete: it failed"):
        wait_for_jobs(str(path), ["cache"], limit_s=60, ended=lambda: {"cache": "it failed"})
    with pytest.raises(JobsMissing, match="not complete after 0 s"):
        wait_for_jobs(str(path), ["cache"], limit_s=0, ended=lambda: {"train internvl": "it failed"})


def test_no_field_holds_a_secret() -> None:
    names = re.findall(
        r'"([a-z_]*(?:token|password|secret|credential)[a-z_]*)":', json.dumps(ClusterConfig.model_json_schema())
    )
    assert set(names) <= {"secret", "secrets"}


def test_the_dockerfile_pins_versions_and_drops_root() -> None:
    text = (ROOT / "Dockerfile").read_text()
    assert "constraints.txt" in text
    assert re.search(r"^ARG BASE=nvidia/cuda:", text, re.MULTILINE)
    assert re.findall(r"^USER (\S+)$", text, re.MULTILINE)[-1] == "1000"
    assert ":latest" not in text
    for instruction in re.findall(r"^RUN ((?:.|\\\n)*?)$", text, re.MULTILINE):
        subprocess.run(["bash", "-n"], input=instruction, text=True, check=True)
