"""Python imports this at its start where the folder is on PYTHONPATH: the ranks of a stage get a pretended GPU each.

tests/pretended_gpu says what that is. Megatron has to be told more once it is imported, which the trainer does late.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

_LAST = "drpo_megatron.trainer.trainer"
"""Its import ends with the platform known; then the rest of Megatron may come."""
_STARTED = ("drpo_megatron.doctor.accept.identity", "spawn_main")
"""Who looks at the devices, and ranks. Not a stage itself: transformers, which is the reference, builds wrong models there."""


class _AfterTrainer(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _LAST:
            return None
        sys.meta_path.remove(self)
        import importlib.util

        spec = importlib.util.find_spec(fullname)
        assert spec is not None and spec.loader is not None
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            import drpo_megatron.trainer.forward
            import drpo_megatron.trainer.weights  # noqa: F401
            from tests.pretended_gpu import cuda

            cuda.after_megatron()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _pretend() -> None:
    sys.modules["torchao"] = None  # type: ignore[assignment]  # transformers would load it, with its CUDA libraries.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    from tests.gloo import share_device
    from tests.pretended_gpu import cuda

    share_device()
    cuda.pretend()
    import torch

    torch.cuda.device_count = lambda: 2  # Each rank's is its cuda:0.
    torch.cuda.nccl.version = lambda: (2, 29, 0)
    sys.meta_path.insert(0, _AfterTrainer())


if any(name in argument for argument in sys.orig_argv for name in _STARTED):
    _pretend()
