"""Entry point of vLLM's general plugins: the teacher's own model class, with a pooler that returns targets.

vLLM loads this module in its engine, worker and inspection processes, so importing it must stay cheap.
Every architecture A that vLLM knows gets a twin named ``GenrecalA``; the twin's class is made when it is asked for.
"""

from functools import cache
from typing import Any

PREFIX = "Genrecal"


def register() -> None:
    """Tell vLLM about the twins."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for architecture in tuple(ModelRegistry.get_supported_archs()):
        if architecture.startswith(PREFIX):
            continue
        twin = PREFIX + architecture
        ModelRegistry.register_model(twin, f"{__name__}:{twin}")
        if architecture in MODELS_CONFIG_MAP:
            MODELS_CONFIG_MAP[twin] = MODELS_CONFIG_MAP[architecture]


def register_class(architecture: str) -> None:
    """Register one twin as a class, which vLLM inspects in this process; for a name it starts another one, slowly."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # would put the name back if it came later
    if architecture in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(PREFIX + architecture, teacher_class(architecture))


@cache
def teacher_class(architecture: str) -> type:
    """Return the twin of one of vLLM's model classes: it keeps its output head and pools targets."""
    from vllm import ModelRegistry

    from teacher_cache.vllm_pooler import TargetsPooler

    original: Any = ModelRegistry.models[architecture].load_model_cls()

    class Teacher(original):
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.pooler = TargetsPooler(self.compute_logits)

    Teacher.__name__ = Teacher.__qualname__ = PREFIX + architecture
    Teacher.__module__ = __name__
    return Teacher


def __getattr__(name: str) -> type:
    if name.startswith(PREFIX):
        return teacher_class(name.removeprefix(PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
