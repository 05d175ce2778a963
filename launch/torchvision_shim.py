"""Make the registry's torchvision importable beside a CPU-only torch.

The published torchvision wheel links against CUDA builds of torch; its C library cannot load beside the
CPU build, and `import torchvision` then fails because the operators it registers fake kernels for do
not exist. Declaring their schemas first is enough for the pure-Python transforms that image processors
use. The installer copies this file into site-packages with a `.pth` line, so that every process, the
subprocesses of vLLM included, defines the schemas just before torchvision is first imported.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


class TorchvisionSchemas(importlib.abc.MetaPathFinder):
    """Define the operator schemas once, when torchvision is looked up, then step aside."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Never find anything: torchvision itself is found by the ordinary finders."""
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            self.define()
        return None

    @staticmethod
    def define() -> None:
        """Declare the schemas unless torch is a CUDA build, whose torchvision brings its own."""
        import torch

        if torch.version.cuda is None:
            for name, schema in SCHEMAS.items():
                torch.library.define(f"torchvision::{name}", schema)


sys.meta_path.insert(0, TorchvisionSchemas())
