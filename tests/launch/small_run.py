"""A run file of tiny models whose whole job takes a minute, for tests that send it to a cluster."""

from pathlib import Path
from typing import Any

import yaml

STAGE = {"global_batch_size": 4, "micro_batch_size": 2}


def write_small_run(
    folder: Path, *, teacher: Path, student: Path, data: Path, cluster: dict[str, Any], align_steps: int = 12
) -> Path:
    """Write the run file of one student, two processes and the three stages; paths in it are absolute."""
    path = folder / "run.yaml"
    values = {
        "output_dir": str(folder / "run"),
        "cache": {
            "uri": str(folder / "run" / "cache"),
            "teacher": {"model": str(teacher), "dtype": "float32"},
            "data": {"path": str(data), "max_length": 512},
            "targets": {"topk": 8},
            "samples_per_shard": 16,
            "build": {"engine": "transformers", "num_replicas": 2},
        },
        "students": [{"name": "small", "model": str(student), "dtype": "float32", "max_length": 512}],
        "train": {
            "align": {"max_steps": align_steps, **STAGE},
            "distill": {"max_steps": 1, **STAGE},
            "finetune": {"max_steps": 1, **STAGE},
            "num_processes": 2,
            "zero": {"persistence_threshold": 0},
            "save_interval_steps": 2,
        },
        "evaluation": {"data": str(data), "max_samples": 1, "score_teacher": False, "max_new_tokens": 2},
        "cluster": cluster,
    }
    path.write_text(yaml.safe_dump(values))
    return path
