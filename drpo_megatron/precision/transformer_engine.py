"""Is there a Transformer Engine that works? The one answer that layers, recipes and reports go by."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys


@functools.cache
def find_transformer_engine() -> str | None:
    """The version of a Transformer Engine that works, None where there is none.

    It is imported: its package alone, without the extension that is compiled for this torch, has no layers. Raises:
    ValueError for one that is installed and doesn't import: a run without it is slower and has no FP8, so it is said.
    """
    if sys.modules.get("transformer_engine", sys) is None:  # Forgotten, see below.
        return None
    try:
        version = importlib.metadata.version("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # The import loads libraries and runs checks: it fails in many ways.
        raise ValueError(
            f"Transformer Engine {version} is installed, but transformer_engine.pytorch doesn't import: {error}; install "
            "it for this torch and CUDA (pip install --no-build-isolation 'transformer-engine[pytorch]'), or uninstall "
            "transformer-engine to train with Megatron's own layers"
        ) from error
    return version


def forget_transformer_engine() -> None:
    """As on a machine without it. Call before `trainer.platform.activate`, and before anything imports megatron."""
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]  # From now on its import is an ImportError.
    find_transformer_engine.cache_clear()
