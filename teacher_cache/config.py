"""What decides a cache's content and how it is built. Imports pydantic only, to keep the CLI quick."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Dtype = Literal["float32", "bfloat16", "float16"]
RowCodec = Literal["exact", "fp8"]
Compression = Literal["none", "zstd"]
Sharing = Literal["private", "group"]
Level = Literal["full", "rows", "quick"]
LEVELS: dict[Level, str] = {
    "full": "the digest of every file",
    "rows": "the checksum of every sample's rows",
    "quick": "names and lengths of all files, and the documents",
}
"""How much a verification reads."""


class StrictConfig(BaseModel):
    """Frozen model that refuses unknown keys; the docstring under a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class TeacherConfig(StrictConfig):
    """The teacher checkpoint."""

    model: str
    """Hugging Face directory, or repository id, of the teacher."""
    revision: str | None = None
    """Commit of the repository; not used for a directory."""
    dtype: Dtype = "bfloat16"
    """Element type in which the teacher computes and its hidden states are stored, bit for bit."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoint."""


class DataConfig(StrictConfig):
    """Conversations in the common chat form: `messages` and `images` in Parquet or JSON lines."""

    path: str
    """Parquet or JSON-lines file."""
    image_root: str | None = None
    """Folder that image paths are relative to and must stay inside; by default the data file's own."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first so many rows; all of them by default."""
    max_length: int = Field(default=4096, gt=1)
    """Longest sample in teacher tokens, image tokens included; a longer one is a bad sample."""
    max_skipped_samples: int = Field(default=0, ge=0)
    """Bad samples (corrupt image, empty answer, too long) that are skipped and listed; one more stops the build."""


class TargetsConfig(StrictConfig):
    """Which teacher targets are stored per sample."""

    question_fraction: float = Field(default=1.0, ge=0.0, le=1.0)
    """Fraction of the samples whose question rows (tier Q, for the regularization loss) are stored."""
    topk: int = Field(default=64, gt=0)
    """Highest logits stored per supervised row (tier L)."""
    codec: RowCodec = "exact"
    """Hidden states bit for bit in the teacher's dtype, or as 8-bit floats (e4m3) with a scale per row: half the bytes,
    at a cost in KL that is measured while writing and kept per shard."""


class BuildConfig(StrictConfig):
    """How the cache is built: free to change between resumes, never part of its identity."""

    engine: Literal["vllm", "transformers"] = "vllm"
    """Engine that runs the teacher; transformers is the slow reference."""
    num_replicas: int = Field(default=1, gt=0)
    """Ray actors, each with its own copy of the teacher."""
    tensor_parallel_size: int = Field(default=1, gt=0)
    """GPUs per replica that share one copy of the teacher."""
    cpus_per_replica: float = Field(default=1.0, gt=0)
    """CPUs that Ray reserves per replica."""
    gpus_per_replica: float | None = Field(default=None, ge=0)
    """GPUs that Ray reserves per replica; by default as many as share one copy where CUDA exists, else 0."""
    pipeline_parallel_size: int = Field(default=1, gt=0)
    """Groups of tensor_parallel_size GPUs that share the layers of one copy; all of them must be on one node."""
    max_batched_tokens: int = Field(default=8192, gt=0)
    """Tokens per engine step."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory of the engine's key-value cache in GiB; by default the engine decides."""
    max_attempts: int = Field(default=3, gt=0)
    """Times that a shard is tried before the build gives up on it and exits 3; also the failed starts of an engine in a
    row after which a node gets no further replica."""
    compression: Compression = "none"
    """Lossless compression of new shards: none for a local disk, zstd where the store is slower than about 1 GB/s."""
    extend: bool = False
    """Add the samples that the cache does not hold yet to it; without this, a run with such samples is refused."""
    sharing: Sharing = "private"
    """Who may read a new cache folder beside its owner: nobody, or its group."""
    spot_check_every: int = Field(default=1000, ge=0)
    """One sample in so many, at most 1,024 at each start of a build, is computed by plain transformers before the build
    starts, on the resources of the replicas, and compared before its shard is committed; 0 checks none. Not done where
    transformers is the engine."""
    spot_check_tolerance: float | None = Field(default=None, gt=0)
    """Largest difference allowed, as relative L2 of a sample's hidden states; by default 1e-3 in float32, 3e-2 in
    float16 and 1e-1 in bfloat16."""
    start_timeout_s: float = Field(default=3600.0, gt=0)
    """Seconds that a replica may take to start its engine before it is replaced."""
    stall_timeout_s: float = Field(default=900.0, gt=0)
    """Seconds without a finished sample after which a replica counts as hung and is replaced."""
    lease_s: float = Field(default=300.0, gt=0)
    """Seconds without a sign of life after which another builder may take over a claimed shard."""
    insecure_ray: bool = False
    """Use a Ray cluster even if it asks for no token, so that whoever reaches it can run commands there."""


class CacheConfig(StrictConfig):
    """One teacher cache."""

    uri: str
    """Where the cache lives: a local path, file:///path, s3://bucket/prefix, gs://… or az://…."""
    teacher: TeacherConfig
    data: DataConfig
    targets: TargetsConfig = TargetsConfig()
    samples_per_shard: int = Field(default=1024, gt=0)
    """Samples per shard, the unit of work, of commit and of loss when a worker dies."""
    build: BuildConfig = BuildConfig()
