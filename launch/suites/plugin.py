"""Makes students a model of lmms-eval: the entry point `lmms_eval.models` names `manifest`."""

from typing import TYPE_CHECKING

from launch.processes import end_with_parent

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODEL = "genrecal"
"""Name of the model that runs a student."""


def manifest() -> "ModelManifest":
    """Return where lmms-eval finds the model; called while it fills its registry, before it reads tasks and data."""
    end_with_parent()
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL, chat_class_path="launch.suites.student_model.StudentModel")
