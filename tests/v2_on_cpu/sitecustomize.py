"""vLLM's V2 model runner where there is no GPU: its kernels run in Triton's interpreter.

For tests: a directory to put on PYTHONPATH, so that the server and every process that it starts has this before it
imports vLLM. vLLM asks Triton for a CPU backend, which Triton has not, and the interpreter does not need.
"""

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is first imported
os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"

from triton.backends import backends
from triton.runtime.interpreter import InterpreterBuilder

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)

_masked_store = InterpreterBuilder.create_masked_store


def _bool_masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
    """A comparison of scalars, spread over a block, is an int in the interpreter, which then refuses it as a mask."""
    mask.data = mask.data.astype(np.bool_)
    return _masked_store(self, pointers, value, mask, *rest)


InterpreterBuilder.create_masked_store = _bool_masked_store


class _TopKInTorch(MetaPathFinder):
    """vLLM's kernel for top-k and top-p, the same in both runners, takes half a second a row in the interpreter."""

    name = "vllm.v1.sample.ops.topk_topp_sampler"

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == self.name else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_without_triton(module: ModuleType) -> None:
            run(module)
            module.HAS_TRITON = False  # type: ignore[attr-defined]

        spec.loader.exec_module = run_without_triton  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _TopKInTorch())

# Python imports the first sitecustomize that it finds: there may be another one behind this.
_others = [path for path in sys.path if Path(path).resolve() != Path(__file__).parent.resolve()]
_spec = PathFinder.find_spec("sitecustomize", _others)
if _spec is not None and _spec.loader is not None:
    _spec.loader.exec_module(module_from_spec(_spec))
