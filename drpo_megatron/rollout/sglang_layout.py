"""What an SGLang server must hold after an update, from the tensors that were sent: its checksum of every parameter.

SGLang keeps a checkpoint's tensors fused and cut: q, k and v in one matrix, gate and up in one, all experts of a layer
in two, rows or columns shared between tensor-parallel ranks, the vocabulary padded, and on a CPU the MLPs' inner sizes,
too. /weights_checker hashes those parameters, so here the exported tensors are fused, cut and hashed in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from drpo_megatron.config.hf_config import HFModelConfig
from drpo_megatron.rollout.sglang_hash import cpu_hash, gpu_hash

_VOCABULARY_MULTIPLE = 64
_CPU_INNER_MULTIPLE = 32
"""Of a rank's share of an MLP's inner size."""
_SCALE = "_scale_inv"
"""Behind the name of a block-FP8 weight's scales, which are fused and cut as the weight is."""
_EXPERT = re.compile(
    r"(?P<stem>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight(?P<scale>_scale_inv)?"
)
_PARTS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
_STACKED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


@dataclass
class ServerChecksums:
    """Collects exported tensors; `of_rank` says what a rank must hold. `tensor_parallel` as the server was launched."""

    model: HFModelConfig
    tensor_parallel: int
    on_gpu: bool = False
    _pieces: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    _checksums: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._checksums = [{} for _ in range(self.tensor_parallel)]

    def add(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Tensors in the server's dtype, in any order. Kept until their parameter is complete, then hashed."""
        for name, tensor in named_tensors:
            fused, index, count = self._place(name)
            pieces = self._pieces.setdefault(fused, {})
            pieces[index] = tensor
            if len(pieces) == count:
                self._hash(fused, [pieces[i] for i in range(count)])
                del self._pieces[fused]

    def of_rank(self, rank: int) -> dict[str, str]:
        """Checksum by the server's parameter names. ValueError if a parameter lacks some of its tensors."""
        if self._pieces:
            raise ValueError(f"tensors of {', '.join(sorted(self._pieces)[:5])} were not all exported")
        return self._checksums[rank]

    def _place(self, name: str) -> tuple[str, int, int]:
        """(the server's parameter, index in it, how many tensors it is made of)."""
        if expert := _EXPERT.fullmatch(name):
            index, count = int(expert["expert"]), self.model.num_experts or 0
            scale = expert["scale"] or ""
            if expert["part"] in _PARTS:
                return f"{expert['stem']}.w13_weight{scale}", 2 * index + _PARTS[expert["part"]], 2 * count
            return f"{expert['stem']}.w2_weight{scale}", index, count
        stem, _, part = name.rpartition(".")
        module = stem.rpartition(".")[2]
        if module in _STACKED:
            fused, index = _STACKED[module]
            return f"{stem.removesuffix(module)}{fused}.{part}", index, 3 if fused == "qkv_proj" else 2
        return name, 0, 1

    def _hash(self, name: str, pieces: list[torch.Tensor]) -> None:
        hash_of = gpu_hash if self.on_gpu else cpu_hash
        for rank, checksums in enumerate(self._checksums):
            checksums[name] = hash_of(self._shard(name, pieces, rank))

    def _shard(self, name: str, pieces: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
        """This rank's part of each piece; end to end they are the rank's parameter."""
        size, is_scale = self.tensor_parallel, name.endswith(_SCALE)
        name, multiple = name.removesuffix(_SCALE), size * (1 if is_scale or self.on_gpu else _CPU_INNER_MULTIPLE)
        if name.endswith("o_proj.weight"):
            return [piece.chunk(size, dim=1)[rank] for piece in pieces]
        if name.endswith(("w2_weight", "down_proj.weight")):
            return [_padded(piece, 1, multiple).chunk(size, dim=1)[rank] for piece in pieces]
        if name.endswith(("qkv_proj.weight", "qkv_proj.bias")):
            kv_ranks = min(size, self.model.num_key_value_heads)  # Fewer KV heads than ranks: neighbours share one.
            query, *key_value = pieces
            return [query.chunk(size)[rank], *(x.chunk(kv_ranks)[rank * kv_ranks // size] for x in key_value)]
        if name.endswith(("gate_up_proj.weight", "w13_weight")):
            return [_padded(piece, 0, multiple).chunk(size)[rank] for piece in pieces]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return [_padded(piece, 0, _VOCABULARY_MULTIPLE).chunk(size)[rank] for piece in pieces]
        return pieces


def _padded(matrix: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """With zeros behind its last row or column."""
    padding = -matrix.shape[dim] % multiple
    return torch.nn.functional.pad(matrix, (0, padding) if dim == 1 else (0, 0, 0, padding))
