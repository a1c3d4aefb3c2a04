"""Starts an SGLang server, inside the environment that SGLang is installed in. Run by its path:

    PYTHON sglang_launch.py PARENT_PID cpu|cuda:GPUS SGLANG_FLAGS...       (stdin: the API key, one line)

It imports nothing of this package, and SGLang only after the environment is set. The server dies with its parent,
however that ends: the kernel kills it (PR_SET_PDEATHSIG), and SGLang's own processes kill themselves after it.

Without a GPU SGLang 0.5.23 has to be told three things before it is imported. Processes that it spawns run the top of
this file again, as `__mp_main__`, and so are told, too.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from types import ModuleType
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1
_MAX_CPU_RANKS = 64


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
    import torch

    # torchvision's own library is built for CUDA and can't be loaded beside a CPU torch; SGLang imports its Python part.
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    sys.modules["sgl_kernel"] = _NoKernels("sgl_kernel")
    if "--enable-return-routed-experts" in sys.argv:
        # It pins host memory by CUDA whether there is CUDA or not.
        import sglang.srt.mem_cache.pool_host.common as pool

        pool._cuda_host_register = lambda *args, **kwargs: None
    return library


def _die_with(parent_pid: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:  # It died before the line above.
        sys.exit("the process that asked for this server is gone")


def main() -> None:
    api_key = sys.stdin.readline().strip()
    flags = [*sys.argv[3:], "--api-key", api_key]
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args(flags))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    _die_with(int(sys.argv[1]))
os.environ["HF_HUB_OFFLINE"] = "1"
# Would report log-probs at temperature 1, whatever the temperature that tokens were drawn at.
os.environ.pop("SGLANG_RETURN_ORIGINAL_LOGPROB", None)
if sys.argv[2] == "cpu":
    _library = _prepare_cpu()  # Its ops exist as long as it does.
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = sys.argv[2].removeprefix("cuda:")
if __name__ == "__main__":
    main()
