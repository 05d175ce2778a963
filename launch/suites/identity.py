"""What decides the figures of a suite, as a digest: a suite with the same one is not run again."""

import hashlib
import json
import os
from pathlib import Path

from launch.suites.environment import Suite, judge_address, judge_model
from launch.suites.harness import SuiteSettings


def suite_identity(suite: Suite, *, student: str, tasks: str | None, lmms_eval: str, settings: SuiteSettings) -> str:
    """Return the digest of what decides the figures.

    Args:
        suite: What runs.
        student: Digest of the files of the student.
        tasks: Digest of the folder with further tasks.
        lmms_eval: Its version.
        settings: How it runs.
    """
    judge = judge_of(suite, settings=settings)
    parts = {
        "student": student,
        "suite": suite.task,
        "lmms_eval": lmms_eval,
        "tasks": tasks,
        "judge": judge,
        "judge_address": None if judge is None else judge_address(os.environ),
        "dtype": settings.dtype,
        "limit": settings.limit,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def judge_of(suite: Suite, *, settings: SuiteSettings) -> str | None:
    """Return the judge model that reads answers of a suite, None where none does."""
    return judge_model(os.environ) if suite.judge and not settings.without_judge else None


def folder_digest(folder: Path) -> str:
    """Return the digest of the names and contents of all files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            with path.open("rb") as content:
                digest.update(f"{path.relative_to(folder)}\0".encode())
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()
