"""S15: a checkpoint that names Python code of its own is refused before anything is loaded, teacher or student."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.student import load_student
from teacher_cache.chat import load_processor
from teacher_cache.config import TeacherConfig
from teacher_cache.errors import ConfigError
from teacher_cache.model_files import CODE_NAMING_FILES, refuse_own_code
from teacher_cache.teacher_checkpoint import checkpoint_directory, load_teacher_head, teacher_identity
from teacher_cache.teacher_size import local_directory

LOADERS: dict[str, Callable[[Path], object]] = {
    "identity": lambda path: teacher_identity(TeacherConfig(model=str(path))),
    "head": lambda path: load_teacher_head(TeacherConfig(model=str(path))),
    "engine": lambda path: checkpoint_directory(TeacherConfig(model=str(path))),
    "plan": lambda path: local_directory(TeacherConfig(model=str(path))),
    "processor": lambda path: load_processor(str(path)),
    "student": lambda path: load_student(path, dtype="float32"),
}


@pytest.fixture
def checkpoint(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """A working checkpoint with a module that leaves a mark when it is run."""
    path = tmp_path / "model"
    shutil.copytree(tiny_qwen2, path)
    (path / "own.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'canary')!r}).touch()\n")
    return path


def name_own_code(checkpoint: Path, file: str) -> None:
    path = checkpoint / file
    entries = json.loads(path.read_text()) if path.exists() else {}
    own = {"AutoConfig": "own.Config", "AutoTokenizer": ["own.Tokenizer", None], "AutoProcessor": "own.Processor"}
    path.write_text(json.dumps(entries | {"auto_map": own}))


@pytest.mark.parametrize("file", CODE_NAMING_FILES)
@pytest.mark.parametrize("loader", LOADERS)
def test_code_of_a_checkpoint_is_refused(checkpoint: Path, file: str, loader: str, tmp_path: Path) -> None:
    name_own_code(checkpoint, file)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        LOADERS[loader](checkpoint)
    assert not (tmp_path / "canary").exists()


def test_a_trusted_checkpoint_and_one_without_code_pass(checkpoint: Path) -> None:
    refuse_own_code(checkpoint, trusted=False)
    name_own_code(checkpoint, "config.json")
    refuse_own_code(checkpoint, trusted=True)
    for load in LOADERS.values():
        with pytest.raises(ConfigError):
            load(checkpoint)


@pytest.mark.parametrize("text", ["{", "[1]", '"auto_map"'])
def test_a_file_that_is_no_record_names_no_code(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    if text == "{":
        with pytest.raises(ConfigError, match="is not JSON"):
            refuse_own_code(tmp_path, trusted=False)
    else:
        refuse_own_code(tmp_path, trusted=False)
