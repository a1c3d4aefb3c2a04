"""Starts an SGLang server, inside the environment that SGLang is installed in. Run by its path:

    PYTHON sglang_launch.py PARENT_PID cpu|cuda:GPUS SGLANG_FLAGS...       (stdin: the API key, one line)

It imports nothing of this package, and SGLang only after the environment is set. The server dies with its parent,
however that ends: the kernel kills it (PR_SET_PDEATHSIG), and SGLang's own processes kill themselves after it.

Without a GPU SGLang 0.5.23 has to be told three things before it is imported. Processes that it spawns run the top of
this file again, as `__mp_main__`, and so are told, too. What an installation has of its own stays as it is: torchvision's
operators exist where its library loads (beside the public torch, which has CUDA, but not beside a bare CPU build), and
`sgl_kernel` where a build of it can be imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.util
import os
import signal
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_MAX_CPU_RANKS = 64
_TORCHVISION_OPERATORS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}
"""That torchvision's Python part, which SGLang imports, expects to exist. Nothing calls them here."""


class _NoKernels(ModuleType):
    """In place of `sgl_kernel`, which has no wheel for this CPU: SGLang tries its ops one by one and takes torch's."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: Any, **kwargs: Any) -> NoReturn:
            raise NotImplementedError(f"sgl_kernel.{name} is not there on a CPU")

        return missing


def _prepare_cpu() -> Any:
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
    # Cores of each rank. Otherwise it refuses more ranks than the machine has NUMA nodes.
    all_cores = f"0-{(os.cpu_count() or 1) - 1}"
    os.environ.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join([all_cores] * _MAX_CPU_RANKS))
    library = add_torchvision_operators()
    add_kernels()
    if "--enable-return-routed-experts" in sys.argv:
        # It pins host memory by CUDA whether there is CUDA or not.
        import sglang.srt.mem_cache.pool_host.common as pool

        pool._cuda_host_register = lambda *args, **kwargs: None
    return library


def add_torchvision_operators() -> Any:
    """Define those that torchvision's own library doesn't bring. They exist as long as what is returned does."""
    import torch

    package = importlib.util.find_spec("torchvision")
    for directory in (package.submodule_search_locations if package else None) or ():
        for compiled in sorted(Path(directory).glob("_C*.so")):
            with contextlib.suppress(OSError):  # Built for CUDA, beside a torch without.
                torch.ops.load_library(compiled)
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _TORCHVISION_OPERATORS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    return library


def add_kernels() -> None:
    """A stand-in for `sgl_kernel`, unless one is installed that loads on this machine."""
    try:
        import sgl_kernel  # noqa: F401
    except Exception:  # Whatever a build for another machine raises: ImportError, OSError, RuntimeError of its own.
        for name in [name for name in sys.modules if name.partition(".")[0] == "sgl_kernel"]:
            del sys.modules[name]
        sys.modules["sgl_kernel"] = _NoKernels("sgl_kernel")


class Secret(str):
    """A key. SGLang logs its settings as Python shows them, to a file that others may read."""

    def __repr__(self) -> str:
        return "'(not shown)'"


def _listen_where_told(host: str) -> None:
    """torch's stores listen on all interfaces, whatever address they are given; SGLang's have to stay on `host`."""
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")  # The package has a function of the name.
    store_class = rendezvous.TCPStore

    def make_store(
        host_name: str, port: int, world_size: Any = None, is_master: bool = False, *args: Any, **more: Any
    ) -> Any:
        if is_master:
            listener = socket.create_server((host, port))
            more |= {"master_listen_fd": listener.detach(), "multi_tenant": False}
        return store_class(host_name, port, world_size, is_master, *args, **more)

    rendezvous.TCPStore = make_store


def _die_with(parent_pid: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # It died before the line above.
        sys.exit("the process that asked for this server is gone")


def main() -> None:
    api_key = sys.stdin.readline().strip()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    arguments = prepare_server_args(sys.argv[3:])
    arguments.api_key = Secret(api_key)
    try:
        run_server(arguments)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    _die_with(int(sys.argv[1]))
if __name__ in ("__main__", "__mp_main__"):
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Would report log-probs at temperature 1, whatever the temperature that tokens were drawn at.
    os.environ.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)
    if sys.argv[2] == "cpu":
        _library = _prepare_cpu()  # Its ops exist as long as it does.
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[2].removeprefix("cuda:")
        if "--enable-memory-saver" in sys.argv:
            # Otherwise CUDA graphs keep their memory, whatever tags it is asked to release.
            os.environ["SGLANG_MEMORY_SAVER_CUDA_GRAPH"] = "1"
    if "--host" in sys.argv:
        _listen_where_told(sys.argv[sys.argv.index("--host") + 1])
if __name__ == "__main__":
    main()
