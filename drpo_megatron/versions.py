"""What is needed and what fits together: the one table that setup.py, the set-up, the locks, the doctor and the docs read.

It imports nothing but the standard library, and is read by its path where nothing is installed yet.
"""

from __future__ import annotations

from typing import NamedTuple

PYTHONS = ("3.11", "3.12", "3.13")
"""What the locks are resolved for."""
TORCH = "2.13.0"
"""Of both environments without a GPU. It is installed first and by this pin: a CPU build is taken where there is one."""
SGLANG = "0.5.23"
"""The version whose server the weight sync is tested against."""
TORCHVISION = "0.28.0"
"""SGLang imports it. Of the release that goes with TORCH."""
CPU_TORCH_RELEASES = ("2.13", "2.14")
"""Releases (major.minor) that the CPU platform ran its tests with."""
CPU_MEGATRON = ("0.16.1", "0.19.2")
"""Megatron-Core versions whose CPU lines (trainer/platform.py) were checked one by one."""


class Requirement(NamedTuple):
    specifier: str
    """As pip reads it."""
    why: str
    """What it is there for, in a line."""


REQUIRED = (
    Requirement("torch>=2.13,<2.15", "tensors, autograd, process groups; both releases were run"),
    Requirement("megatron-core>=0.16.1,<0.20", "the trainer; 0.16.1 is the newest for Python 3.11"),
    Requirement("einops>=0.8", "imported by megatron-core, which does not declare it"),
    Requirement("psutil>=6", "imported by megatron-core's checkpoints, which hang without it; process clean-up"),
    Requirement("ray>=2.60,<3", "places and watches the processes; parts of 2.60 are used that older ones lack"),
    Requirement("transformers>=5,<6", "model configs, tokenizers, the embedded rollout engine"),
    Requirement("tokenizers>=0.22", "builds the quickstart's tokenizer"),
    Requirement("jinja2>=3.1", "chat templates, whose errors are told apart"),
    Requirement("aiohttp>=3.10", "requests to SGLang servers"),
    Requirement("safetensors>=0.6", "the only format of weights that is read or written"),
    Requirement("numpy>=2", "counter-based random numbers of the sampler"),
    Requirement("packaging>=24", "versions are compared by its rules"),
    Requirement("pydantic>=2.10,<3", "typed configuration"),
    Requirement("omegaconf>=2.3", "YAML with ${...} references and dotted overrides"),
    Requirement("pyyaml>=6", "YAML as it is written down"),
    Requirement("rich>=13", "live progress and tables"),
    Requirement("matplotlib>=3.9", "pictures of a run"),
    Requirement("tensorboard>=2.18", "optional sink of metrics"),
    Requirement("wandb>=0.19", "optional sink of metrics, offline by default"),
    Requirement("xxhash>=3.4", "checksums of checkpoints, at the speed of memory"),
    Requirement("math-verify>=0.8", "rewards for mathematical answers"),
)

EXTRAS = {
    "data": (Requirement("pyarrow>=17", "parquet, in which public data sets come"),),
    "test": (
        Requirement("pyarrow>=17", "parquet, in which public data sets come"),
        Requirement("pytest>=8", "the test runner"),
        Requirement("pytest-xdist>=3.6", "two test files at a time"),
        Requirement("hypothesis>=6.100", "invariants of packing and objectives over random inputs"),
        Requirement("ruff>=0.9", "lint"),
        Requirement("mypy>=1.13", "types of the lower layers"),
        Requirement("triton>=3.4; platform_system == 'Linux'", "the GPU kernels, in Triton's interpreter"),
        Requirement("setuptools>=77", "installs the package in place, without asking the network for a builder"),
        Requirement("torchao>=0.18", "the oracle of FP8 and FP4 rounding; needs nothing but torch"),
    ),
    # NVIDIA's apex is used where its CUDA extensions are importable. The package called apex in the index is another.
    "gpu": (Requirement("transformer-engine[pytorch]>=2.8", "fused and FP8 layers"),),
}


class Stack(NamedTuple):
    """Versions of one environment that go together."""

    name: str
    lock: str
    pythons: tuple[str, ...]
    torch: str
    cuda: str
    """Of torch's public build. A bare CPU build has none."""
    nccl: str
    """Of torch's public build: one communicator takes ranks of one version only."""
    triton: str
    """What torch's public build pins. The locks pin it, too: a bare CPU build brings none."""
    megatron_core: str = ""
    transformer_engine: str = ""
    sglang: str = ""
    proof: str = ""
    """What was run, and on what."""


STACKS = (
    Stack(
        "trainer without a GPU",
        "cpu.lock",
        PYTHONS,
        torch=TORCH,
        cuda="13.0",
        nccl="2.29.7",
        triton="3.7.1",
        megatron_core="0.16.1",
        proof="all tests on 3.11; short runs and tests without processes on 3.12 and 3.13",
    ),
    Stack(
        "SGLang without a GPU",
        "sglang-cpu.lock",
        PYTHONS,
        torch=TORCH,
        cuda="13.0",
        nccl="2.29.7",
        triton="3.7.1",
        sglang=SGLANG,
        proof="all tests on 3.11; log-probs against transformers on 3.12 and 3.13",
    ),
    Stack(
        "trainer on GPUs",
        "gpu-py312.lock",
        ("3.12",),
        torch="2.14.1",
        cuda="13.0",
        nccl="2.30.7",
        triton="3.8.0",
        megatron_core="0.19.2",
        transformer_engine="2.20.2",
        proof="resolved; these Megatron-Core and Transformer Engine, beside torch 2.13, on the pretended device",
    ),
    Stack(
        "SGLang on GPUs",
        "sglang-gpu-py312.lock",
        ("3.12",),
        torch="2.14.1",
        cuda="13.0",
        nccl="2.30.7",
        triton="3.8.0",
        sglang=SGLANG,
        proof="resolved; its launch lines and checksums judged by its own code",
    ),
)


def stack(lock: str) -> Stack:
    return next(row for row in STACKS if row.lock == lock)


def table() -> str:
    """The stacks as Markdown, for docs/gpu.md."""
    head = ("environment", "lock", "Python", "torch", "CUDA", "NCCL", "Triton", "Megatron-Core", "Transformer Engine")
    lines = [f"| {' | '.join((*head, 'SGLang', 'proof'))} |", f"|{'---|' * (len(head) + 2)}"]
    for row in STACKS:
        cells = (row.name, f"`{row.lock}`", ", ".join(row.pythons), *row[3:])
        lines.append(f"| {' | '.join(cell or '-' for cell in cells)} |")
    return "\n".join(lines)
