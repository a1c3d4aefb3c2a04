"""pip install .            the package and the `drpo-megatron` command
pip install '.[test]'    what the tests and linters need
pip install '.[gpu]'     Transformer Engine, on a machine with CUDA
pip install '.[data]'    to read public data sets

Exact versions of a CPU install are in requirements/cpu-py311.lock.
"""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (ROOT / "drpo_megatron" / "__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)

REQUIRES = [
    "torch>=2.9,<3",  # tensors, autograd, process groups
    "megatron-core>=0.16.1,<0.20",  # the trainer; 0.16.1 is the newest for Python 3.11
    "einops>=0.8",  # imported by megatron-core, which does not declare it
    "psutil>=6",  # imported by megatron-core's checkpoints, which hang without it; process clean-up
    "ray>=2.50,<3",  # places and watches the processes
    "transformers>=5,<6",  # model configs, tokenizers, the embedded rollout engine
    "tokenizers>=0.22",  # builds the quickstart's tokenizer
    "aiohttp>=3.10",  # requests to SGLang servers
    "safetensors>=0.6",  # the only format of weights that is read or written
    "numpy>=2",  # counter-based random numbers of the sampler
    "pydantic>=2.10,<3",  # typed configuration
    "omegaconf>=2.3",  # YAML with ${...} references and dotted overrides
    "rich>=13",  # live progress and tables
    "matplotlib>=3.9",  # pictures of a run
    "tensorboard>=2.18",  # optional sink of metrics
    "wandb>=0.19",  # optional sink of metrics, offline by default
    "math-verify>=0.8",  # rewards for mathematical answers
]
DATA = ["pyarrow>=17"]  # parquet, in which public data sets come
TEST = [
    *DATA,
    "pytest>=8",  # the test runner
    "pytest-xdist>=3.6",  # two test files at a time
    "hypothesis>=6.100",  # invariants of packing and objectives over random inputs
    "ruff>=0.9",  # lint
    "mypy>=1.13",  # types of the lower layers
    "triton>=3.4; platform_system == 'Linux'",  # the GPU kernels, in Triton's interpreter
    "torchao>=0.18",  # the oracle of FP8 and FP4 rounding; needs nothing but torch
]
# NVIDIA's apex is used where its CUDA extensions are importable. The package called apex in the public index is another.
GPU = ["transformer-engine[pytorch]>=2.8"]  # fused and FP8 layers

setup(
    name="drpo_megatron",
    version=VERSION,
    description="Reinforcement learning of mixture-of-experts LLMs: DRPO on Megatron-Core, with or without a GPU",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["drpo_megatron", "drpo_megatron.*"]),
    install_requires=REQUIRES,
    extras_require={"test": TEST, "gpu": GPU, "data": DATA},
    entry_points={"console_scripts": ["drpo-megatron = drpo_megatron.cli:main"]},
)
