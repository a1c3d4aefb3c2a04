"""The loss kernels as a GPU would run them, without a GPU: what the recipes launch, compiled for Hopper and Blackwell.

    python tools/loss_kernels.py                 print the tables of docs/loss.md
    python tools/loss_kernels.py --write         put them into docs/loss.md

Launches are not listed anywhere: the kernel's own walks over the vocabulary are run for each recipe on tensors without
memory that say they are on a GPU, and what they hand to Triton is written down: shapes, strides, alignment, dtypes. Triton
then compiles each of them with the assembler of its wheel. Times are a model of bytes and FLOPs at the published peaks of
the hardware, and no measurement.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from drpo_megatron.config import Config, load_config
from drpo_megatron.planner.activations import tokens_of_rank
from drpo_megatron.planner.hardware import PEAK_FLOPS
from drpo_megatron.planner.model import read_model
from drpo_megatron.trainer import vocab_parallel_triton as kernels
from drpo_megatron.trainer.setup import padded_vocab_size
from drpo_megatron.trainer.vocab_parallel_chunks import (
    GradientSums,
    Head,
    fused_gradient,
    loss_chunk_bytes,
    measure,
    recomputed_gradient,
)
from drpo_megatron.trainer.vocab_parallel_rows import SoftmaxRows

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs" / "loss.md"
BEGIN, END = "<!-- made by tools/loss_kernels.py -->", "<!-- end -->"
ARCHITECTURES = (90, 100)
NUM_ROWS = (1, 1000, 5000)
"""Rows of a micro-batch that reach the head, besides all of its tokens."""
GPUS = {"H100": (PEAK_FLOPS, 3.35e12), "B200": (2250e12, 8.0e12)}
"""FLOP/s of dense BF16, bytes/s of memory, as published."""
_KERNEL_BYTES = 4 + 4 + 2
"""A logit: read for its row's statistics, read again, and its gradient written in BF16."""
_DW_BYTES = 4 + 4
"""A number of dW, each time that it is added to."""
_BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


class OnGpu(torch.Tensor):
    """A tensor without memory that says it is on a GPU."""

    is_cuda = property(lambda self: True)

    @classmethod
    def empty(cls, *shape: int, dtype: torch.dtype = torch.float32) -> OnGpu:
        return torch.empty(*shape, dtype=dtype, device="meta").as_subclass(cls)


@dataclass(frozen=True, slots=True)
class Launch:
    """One way in which a kernel is compiled: what Triton's specialisation sees of its arguments."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int | bool], ...]
    divisible: frozenset[str]
    """Arguments that are multiples of 16, or point to multiples of 16 bytes."""

    @property
    def name(self) -> str:
        out = dict(self.signature)["out"].removeprefix("*")
        parts = [self.kernel.removeprefix("_"), out]
        return " ".join(parts + ["with entropy"] * dict(self.constants).get("HAS_ENTROPY", False))


@dataclass(frozen=True, slots=True)
class Compiled:
    architecture: int
    registers: int
    spilled_bytes: int
    loads: Counter[int]
    """Instructions that read global memory, by bits a thread."""
    stores: Counter[int]


# --- what is launched -------------------------------------------------------------------------------------------------


def recipes() -> dict[str, Config]:
    """The shipped recipes for GPUs. Their models' paths begin at the repository's root."""
    configs = {path.stem: load_config(path) for path in sorted((ROOT / "examples").glob("*.yaml"))}
    return {name: config for name, config in configs.items() if config.trainer.backend == "gpu"}


def heads(config: Config, dtype: torch.dtype) -> Iterator[Head]:
    """Of every tensor-parallel rank of a recipe, as `head_shard` makes them."""
    model, tensor = read_model(str(ROOT / config.model.hf_path)), config.parallel.tensor
    shard = padded_vocab_size(model.vocab_size, tensor) // tensor
    for rank in range(tensor):
        yield Head(
            weight=OnGpu.empty(shard, model.hidden, dtype=dtype)[: max(0, model.vocab_size - rank * shard)],
            start=rank * shard,
            vocab_size=model.vocab_size,
            max_shard=shard,
            inv_temperature=1.0 / config.rollout.temperature,
            group=None,
            chunk_bytes=loss_chunk_bytes(config.trainer.loss_chunk_mb, on_cuda=True),
        )


def recorded(head: Head, num_rows: int, num_picked: int = 1) -> list[tuple[Launch, int]]:
    """(launch, columns of the tile) of the three walks over a head for so many rows, with and without entropy bonus."""
    hidden = OnGpu.empty(num_rows, head.weight.shape[1], dtype=head.operand_dtype)
    ids = OnGpu.empty(num_rows, num_picked, dtype=torch.int64)
    row = OnGpu.empty(num_rows)
    softmax = SoftmaxRows(row, row, row, OnGpu.empty(num_picked, num_rows))
    sums = GradientSums(OnGpu.empty(num_rows, head.weight.shape[1]), OnGpu.empty(*head.weight.shape))
    with _recorder() as found:
        measure(head, hidden, ids)
        for entropy in (None, row):
            fused_gradient(head, hidden, ids, lambda rows, _, entropy=entropy: _scales(rows, row, entropy), sums)
            recomputed_gradient(head, hidden, ids[:, 0], softmax, (row, entropy), sums)
    return found


def _scales(rows: slice, row: torch.Tensor, entropy: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.empty_like(row[rows]), None if entropy is None else torch.empty_like(entropy[rows])


@contextmanager
def _recorder() -> Iterator[list[tuple[Launch, int]]]:
    """Within it kernels write down what they are launched with, and do nothing."""
    found: list[tuple[Launch, int]] = []
    names = kernel_names()
    originals = {name: getattr(kernels, name) for name in names}
    try:
        for name, kernel in originals.items():
            setattr(kernels, name, _Recorder(name, kernel, found))
        yield found
    finally:
        for name, kernel in originals.items():
            setattr(kernels, name, kernel)


def kernel_names() -> list[str]:
    return [name for name, value in vars(kernels).items() if isinstance(value, triton.runtime.jit.JITFunction)]


class _Recorder:
    def __init__(self, name: str, kernel: Any, found: list[tuple[Launch, int]]) -> None:
        self.name, self.kernel, self.found = name, kernel, found

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, **constants: Any) -> None:
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | constants
            self.found.append((_launch(self.name, self.kernel, given), given["logits"].shape[1]))

        return launch


def _launch(name: str, kernel: Any, given: dict[str, Any]) -> Launch:
    signature, constants, divisible = [], [], set()
    for parameter in kernel.params:
        value = given[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            constants.append((parameter.name, value))
            signature.append((parameter.name, "constexpr"))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((parameter.name, _TYPES[value.dtype]))
            number = value.storage_offset() * value.itemsize  # The allocator's own blocks begin at multiples of 512.
        else:
            signature.append((parameter.name, "i32" if value < 2**31 else "i64"))
            number = value
        if number % 16 == 0:
            divisible.add(parameter.name)
    return Launch(name, tuple(signature), tuple(constants), frozenset(divisible))


# --- what becomes of it -----------------------------------------------------------------------------------------------


@cache
def compiled(launch: Launch, architecture: int) -> Compiled:
    """By Triton, for a GPU that need not be there. RuntimeError if its wheel has no assembler for it."""
    kernel = getattr(kernels, launch.kernel)
    index = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=dict(launch.signature),
        constexprs={index[name]: value for name, value in launch.constants},
        attrs={index[name]: [["tt.divisibility", 16]] for name in launch.divisible},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(
        architecture,
        numbers["REG"],
        numbers["STACK"] + numbers["LOCAL"],
        _widths("LDG", code),
        _widths("STG", code),
    )


def _widths(instruction: str, code: str) -> Counter[int]:
    """Of every such instruction: 32 bits where its name gives no width."""
    suffixes = [
        re.findall(r"\.[A-Z]*?(8|16|64|128|256)\b", found) for found in re.findall(rf"\b{instruction}([.\w]*)", code)
    ]
    return Counter(int(widths[-1]) if widths else 32 for widths in suffixes)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(_BINARIES / name), *arguments], capture_output=True, text=True, check=True).stdout


@cache
def launches() -> dict[Launch, set[int]]:
    """What the recipes launch, each with the widths of its tiles: in BF16, and in FP32, which trainer.dtype can be."""
    found: dict[Launch, set[int]] = {}
    walked = set()
    for config in recipes().values():
        full = tokens_of_rank(config)
        for dtype, num_rows in (*product((torch.bfloat16,), (*NUM_ROWS, full)), *product((torch.float32,), NUM_ROWS)):
            for head in heads(config, dtype):
                walk = (head.weight.shape[0], head.max_shard, head.chunk_bytes, dtype, num_rows)
                if walk in walked:  # The hidden size is no kernel's argument.
                    continue
                walked.add(walk)
                for launch, num_columns in recorded(head, num_rows):
                    found.setdefault(launch, set()).add(num_columns)
    return found


# --- tables -----------------------------------------------------------------------------------------------------------


def tables() -> str:
    return f"{kernel_table()}\n\n{time_table()}"


def kernel_table() -> str:
    widths: dict[str, set[int]] = {}
    built: dict[str, dict[int, list[Compiled]]] = {}
    for launch, columns in launches().items():
        widths.setdefault(launch.name, set()).update(columns)
        for architecture in ARCHITECTURES:
            built.setdefault(launch.name, {}).setdefault(architecture, []).append(compiled(launch, architecture))
    lines = [
        f"Triton {triton.__version__}. Registers a thread; bits of the instructions that read logits and write dz.",
        "",
        "| kernel | tile widths | registers sm_90 | registers sm_100 | spilled bytes | loads | stores |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(built):
        every = [one for builds in built[name].values() for one in builds]
        registers = [max(one.registers for one in built[name][architecture]) for architecture in ARCHITECTURES]
        stores = max(width for one in every for width in one.stores)
        lines.append(
            f"| {name} | {len(widths[name])}, {min(widths[name])} to {max(widths[name])} | {registers[0]} | {registers[1]} | "
            f"{max(one.spilled_bytes for one in every)} | {min(max(one.loads) for one in every)} | "
            f"{stores if 'gradient' in name else 'three numbers a row'} |"
        )
    return "\n".join(lines)


def time_table() -> str:
    lines = [
        "| recipe | rows a rank x H | tokens | chunk, passes over dW | tile | "
        + " | ".join(f"{gpu}: matmuls + kernels + dW, ms" for gpu in GPUS)
        + " |",
        "|---|---|---|---|---|" + "---|" * len(GPUS),
    ]
    for name, config in recipes().items():
        head, tokens = next(heads(config, torch.bfloat16)), tokens_of_rank(config)
        rows, hidden = head.weight.shape
        chunk = min(tokens, head.chunk_rows())
        walks = -(-tokens // chunk)
        times = [
            " + ".join(
                f"{1e3 * seconds:.1f}"
                for seconds in (
                    3 * 2 * tokens * rows * hidden / flops,
                    tokens * rows * _KERNEL_BYTES / bandwidth,
                    walks * rows * hidden * _DW_BYTES / bandwidth,
                )
            )
            for flops, bandwidth in GPUS.values()
        ]
        lines.append(
            f"| `{name}` | {rows} x {hidden} | {tokens} | {chunk}, {walks} | {head.tile_width(chunk)} | {' | '.join(times)} |"
        )
    return "\n".join(lines)


def with_tables(page: str, made: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into docs/loss.md")
    made = tables()
    if parser.parse_args().write:
        DOCS.write_text(with_tables(DOCS.read_text(encoding="utf-8"), made), encoding="utf-8")
    print(made)


if __name__ == "__main__":
    main()
