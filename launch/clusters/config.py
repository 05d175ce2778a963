"""Where the jobs of a run go: Slurm, a Ray cluster, Kubernetes. Imports pydantic only, to keep the CLI quick.

No field holds a secret. Environment variables are named here, and their values never reach a rendered file.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from teacher_cache.config import StrictConfig

OWN_SBATCH_OPTIONS = (
    "array",
    "chdir",
    "dependency",
    "export",
    "export-file",
    "gpus-per-node",
    "job-name",
    "kill-on-invalid-dep",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "requeue",
    "signal",
    "wrap",
)
"""What the rendered scripts set themselves."""


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line of printable characters")
    return text


def _quoted_time(value: object) -> object:
    if isinstance(value, int):
        raise ValueError(  # noqa: TRY004 - pydantic reports ValueError alone
            f"YAML reads a time without quotes as the number {value}: write '12:00:00'"
        )
    return value


Line = Annotated[str, AfterValidator(_one_line)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,:=@+/-]*$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
DnsName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


class NodeResources(StrictConfig):
    """What one job occupies."""

    nodes: int | None = Field(default=None, gt=0)
    """Nodes; by default as few as have the GPUs that the job needs."""
    gpus_per_node: int = Field(default=8, ge=0)
    """GPUs that a node has, 0 where there are none; the job asks for those that its processes use."""


class SlurmJobConfig(NodeResources):
    """What one kind of job asks Slurm for."""

    partition: Word | None = None
    """Partition; the cluster's default where none is given."""
    account: Word | None = None
    """Account that is charged."""
    qos: Word | None = None
    """Quality of service."""
    time: Annotated[str, BeforeValidator(_quoted_time), Field(pattern=r"^(\d+-)?\d+(:\d+){0,2}$")] | None = None
    """Time limit as days-hours:minutes:seconds, or minutes, in quotes; the partition's own where none is given."""
    cpus_per_process: int = Field(default=8, gt=0)
    """CPU cores per training process, and per GPU of a node that builds the cache or evaluates."""
    sbatch: dict[str, Line] = Field(default_factory=dict)
    """Further options by their long names without dashes, `{constraint: a100}`; an empty value for a bare option."""

    @model_validator(mode="after")
    def _further_options_only(self) -> "SlurmJobConfig":
        for name in self.sbatch:
            if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
                raise ValueError(f"sbatch option {name!r} must be a long name without dashes in front")
            if name in OWN_SBATCH_OPTIONS or name in SlurmJobConfig.model_fields or name == "cpus-per-task":
                raise ValueError(f"sbatch option {name!r} is set by the rendered scripts or by a field of its own")
        return self


class SlurmReportConfig(SlurmJobConfig):
    """What evaluation and report ask Slurm for: one node, one GPU."""

    nodes: Literal[1] = 1
    """Models are scored one after the other."""
    gpus_per_node: int = Field(default=1, ge=0)
    """GPUs of the node."""


class SlurmConfig(StrictConfig):
    """Jobs on a Slurm cluster whose nodes share a file system."""

    cache: SlurmJobConfig = SlurmJobConfig()
    """The cache job: one task per node, Ray over all of them."""
    train: SlurmJobConfig = SlurmJobConfig()
    """One training job per student, as an array: one task per training process."""
    report: SlurmReportConfig = SlurmReportConfig()
    """Evaluation and report at the end, where the run file has `evaluation`."""
    setup: tuple[Line, ...] = ()
    """Shell lines that each job runs first: modules, activation of an environment."""
    environment: tuple[VariableName, ...] = ()
    """Names of variables that pass from the submitting shell into the jobs, beside HOME, PATH and USER."""
    signal_before_end_s: int = Field(default=300, gt=0)
    """Seconds before the time limit at which a job is told to save and end, to be queued again."""
    max_requeues: int = Field(default=50, ge=0)
    """Times that a job is queued again before it stays failed."""


class RayJobConfig(NodeResources):
    """What one kind of job reserves of a Ray cluster."""

    cpus_per_node: float = Field(default=8.0, gt=0)
    """CPUs that Ray reserves beside the GPUs, on each node that trains or evaluates."""


class RayReportConfig(RayJobConfig):
    """What evaluation and report reserve: one node, one GPU."""

    nodes: Literal[1] = 1
    """Models are scored one after the other."""
    gpus_per_node: int = Field(default=1, ge=0)
    """GPUs of the node."""


class RayConfig(StrictConfig):
    """Jobs on a Ray cluster that runs already and whose nodes share a file system."""

    address: Line | None = None
    """Dashboard of the cluster, http://HOST:8265; by default the address in RAY_API_SERVER_ADDRESS."""
    working_dir: Line | None = None
    """Folder in which the jobs run, on every node; by default the one from which they are submitted."""
    python: Line = "python3"
    """Interpreter on the cluster that has this project installed."""
    environment_file: Line | None = None
    """Shell file on the cluster that each job reads first. Secrets belong there: whoever may list jobs can read what
    is submitted with them."""
    train: RayJobConfig = RayJobConfig()
    """One training job per student."""
    report: RayReportConfig = RayReportConfig()
    """Evaluation and report at the end, where the run file has `evaluation`."""
    max_attempts: int = Field(default=5, gt=0)
    """Times that a job starts over after it was interrupted or left incomplete."""
    wait_s: int = Field(default=14 * 86400, gt=0)
    """Seconds that a job waits for those that it depends on."""


class SecretReference(StrictConfig):
    """A key of a Kubernetes Secret."""

    secret: DnsName
    """Name of the Secret, in the namespace of the jobs."""
    key: Word
    """Key in it."""


class KubeJobConfig(NodeResources):
    """What the pods of one kind of job ask Kubernetes for."""

    cpus_per_node: float = Field(default=8.0, gt=0)
    """CPUs of each pod."""
    memory_gib: float = Field(default=64.0, gt=0)
    """Memory of each pod in GiB, shared memory included."""
    shared_memory_gib: float = Field(default=16.0, gt=0)
    """Size of /dev/shm in GiB, for Ray's object store and for communication."""


class KubeReportConfig(KubeJobConfig):
    """What evaluation and report ask Kubernetes for: one pod, one GPU."""

    nodes: Literal[1] = 1
    """Models are scored one after the other."""
    gpus_per_node: int = Field(default=1, ge=0)
    """GPUs of the pod."""


class KubeHeadConfig(StrictConfig):
    """What the head of the cache job asks Kubernetes for: it runs the driver, no replica, and has no GPU."""

    cpus: float = Field(default=8.0, gt=0)
    """CPUs of its pod."""
    memory_gib: float = Field(default=64.0, gt=0)
    """Memory of its pod in GiB, shared memory included."""
    shared_memory_gib: float = Field(default=16.0, gt=0)
    """Size of /dev/shm in GiB, for Ray's object store."""
    node_selector: dict[Line, Line] = Field(default_factory=dict)
    """Labels that its node must have, and that of the pod which submits the driver; the other selector is for pods with
    GPUs."""


class KubeRayConfig(StrictConfig):
    """Jobs on Kubernetes: the cache through the KubeRay operator (1.5.1 or newer), training as Indexed Jobs."""

    image: Line | None = None
    """Container image with this project (see Dockerfile); needed to submit."""
    ray_version: Word = "2.60.0"
    """Ray in the image."""
    namespace: DnsName = "default"
    """Namespace of everything."""
    service_account: DnsName | None = None
    """Service account of the pods; the namespace's default where none is given."""
    queue: DnsName | None = None
    """Local queue of Kueue that admits the jobs; without it they start at once."""
    claim: DnsName | None = None
    """Persistent volume claim (ReadWriteMany) with data, cache and output; needed to submit."""
    mount_path: Line = "/workspace"
    """Where the claim is mounted, and the working directory of every job."""
    node_selector: dict[Line, Line] = Field(default_factory=dict)
    """Labels that nodes must have, but for the head's."""
    tolerations: tuple[dict[str, Any], ...] = ()
    """Taints that the pods tolerate, as in a pod's specification."""
    secrets: dict[VariableName, SecretReference] = Field(default_factory=dict)
    """Environment variables whose values Kubernetes takes from Secrets."""
    cache: KubeJobConfig = KubeJobConfig()
    """Ray workers of the cache job."""
    head: KubeHeadConfig = KubeHeadConfig()
    """Ray's head in the cache job."""
    train: KubeJobConfig = KubeJobConfig()
    """One training job per student."""
    report: KubeReportConfig = KubeReportConfig()
    """Evaluation and report at the end, where the run file has `evaluation`."""
    time_limit_s: int = Field(default=14 * 86400, gt=0)
    """Seconds after which a job is ended."""
    wait_s: int = Field(default=14 * 86400, gt=0)
    """Seconds that a job waits for those that it depends on."""
    max_attempts: int = Field(default=5, gt=0)
    """Times that the cache job and the report start over after they were interrupted or left incomplete."""
    max_restarts: int = Field(default=50, ge=0)
    """Pods of a training that may fail and are replaced, per node, before it stays failed: one that is preempted takes
    its partners with it, and these count."""
    grace_s: int = Field(default=600, gt=0)
    """Seconds that a training has to save when its pods are told to end."""
    keep_s: int = Field(default=86400, ge=0)
    """Seconds for which Kubernetes keeps a finished job."""


class ClusterConfig(StrictConfig):
    """Where `genrecal submit` sends the jobs of a run."""

    slurm: SlurmConfig = SlurmConfig()
    ray: RayConfig = RayConfig()
    kuberay: KubeRayConfig = KubeRayConfig()
