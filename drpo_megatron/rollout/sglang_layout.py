"""What an SGLang server must hold after an update, from the tensors that were sent: its checksum of every parameter.

SGLang keeps a checkpoint's tensors fused and cut: q, k and v in one matrix, gate and up in one, all experts of a layer
in two, rows or columns shared between tensor-parallel ranks, the vocabulary padded, and on a CPU the MLPs' inner sizes,
too. /weights_checker hashes those parameters, so here the exported tensors are fused, cut and hashed in the same way.

Weights in block FP8 it hashes as what they stand for, rounded to BF16, and their scales not at all: two pairs of weights
and scales that mean the same are the same to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from drpo_megatron.config.hf_config import HFModelConfig
from drpo_megatron.precision.quantize import dequantize_block128
from drpo_megatron.rollout.sglang_hash import cpu_hash, gpu_hash

_VOCABULARY_MULTIPLE = 64
_CPU_INNER_MULTIPLE = 32
"""Of a rank's share of an MLP's inner size."""
_SCALE = "_scale_inv"
"""Behind the name of a block-FP8 weight's scales."""
_EXPERT = re.compile(r"(?P<stem>.*\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
_STACKED_EXPERTS = {"gate_up_proj": "w13_weight", "down_proj": "w2_weight"}
_PARTS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
_STACKED = {
    "q_proj": ("qkv_proj", 0),
    "k_proj": ("qkv_proj", 1),
    "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    # Of a gated delta net.
    "in_proj_qkv": ("in_proj_qkvz", 0),
    "in_proj_z": ("in_proj_qkvz", 1),
    "in_proj_b": ("in_proj_ba", 0),
    "in_proj_a": ("in_proj_ba", 1),
}
_ONE_PLUS_NORM = re.compile(r"(?!.*linear_attn).*norm\.weight")
"""Qwen3.5's norms that scale by 1 + weight, which SGLang keeps beside the weight."""
_VISION = "visual."
"""Before the names of what Qwen3.5 sees with: it is not trained, nor sent."""


@dataclass
class ServerChecksums:
    """Collects exported tensors; `of_rank` says what a rank must hold. `tensor_parallel` as the server was launched."""

    model: HFModelConfig
    tensor_parallel: int
    on_gpu: bool = False
    _halves: dict[str, torch.Tensor] = field(default_factory=dict)
    """Block-FP8 weights that wait for their scales, and scales for their weights."""
    _pieces: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    _checksums: list[dict[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._checksums = [{} for _ in range(self.tensor_parallel)]

    def add(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Tensors in the server's dtype, in any order. Kept until their parameter is complete, then hashed."""
        for name, tensor in self._dequantized(named_tensors):
            fused, index, count = self._place(name)
            pieces = self._pieces.setdefault(fused, {})
            pieces[index] = tensor
            if len(pieces) == count:
                self._hash(fused, [pieces[i] for i in range(count)])
                del self._pieces[fused]
                if self._is_hybrid and _ONE_PLUS_NORM.fullmatch(fused):
                    self._hash(fused.removesuffix("weight") + "gemma_weight", [tensor + 1.0])

    def of_rank(self, rank: int) -> dict[str, str]:
        """Checksum by the server's parameter names. ValueError if a parameter lacks some of its tensors."""
        if waiting := sorted(self._pieces.keys() | self._halves.keys()):
            raise ValueError(f"tensors of {', '.join(waiting[:5])} were not all exported")
        return self._checksums[rank]

    def ignores(self, name: str) -> bool:
        """Whether a server's parameter is one that nobody trains or sends."""
        return name.startswith(_VISION)

    def _dequantized(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Block-FP8 weights as what SGLang hashes, when both halves are there; other tensors as they are."""
        for name, tensor in named_tensors:
            if tensor.dtype != torch.float8_e4m3fn and not name.endswith(_SCALE):
                yield name, tensor
                continue
            weight = name.removesuffix(_SCALE)
            if (other := self._halves.pop(weight, None)) is None:
                self._halves[weight] = tensor
                continue
            values, scale_inv = (other, tensor) if name.endswith(_SCALE) else (tensor, other)
            yield weight, dequantize_block128(values, scale_inv).to(torch.bfloat16)

    def _place(self, name: str) -> tuple[str, int, int]:
        """(the server's parameter, index in it, how many tensors it is made of)."""
        if self._is_hybrid:
            name = name.replace("model.language_model.", "model.").replace(".self_attn.", ".")
        stem, _, part = name.rpartition(".")
        if stem.endswith(".experts") and part in _STACKED_EXPERTS:
            return f"{stem}.{_STACKED_EXPERTS[part]}", 0, 1
        if expert := _EXPERT.fullmatch(name):
            index, count = int(expert["expert"]), self.model.num_experts or 0
            if expert["part"] in _PARTS:
                return f"{expert['stem']}.w13_weight", 2 * index + _PARTS[expert["part"]], 2 * count
            return f"{expert['stem']}.w2_weight", index, count
        module = stem.rpartition(".")[2]
        if module in _STACKED:
            fused, index = _STACKED[module]
            return f"{stem.removesuffix(module)}{fused}.{part}", index, 3 if fused == "qkv_proj" else 2
        return name, 0, 1

    @property
    def _is_hybrid(self) -> bool:
        return self.model.linear_num_key_heads is not None

    def _hash(self, name: str, pieces: list[torch.Tensor]) -> None:
        hash_of = gpu_hash if self.on_gpu else cpu_hash
        for rank, checksums in enumerate(self._checksums):
            checksums[name] = hash_of(self._shard(name, pieces, rank))

    def _shard(self, name: str, pieces: list[torch.Tensor], rank: int) -> list[torch.Tensor]:
        """This rank's part of each piece; end to end they are the rank's parameter."""
        size, multiple = self.tensor_parallel, self.tensor_parallel * (1 if self.on_gpu else _CPU_INNER_MULTIPLE)
        if name.endswith(("o_proj.weight", "linear_attn.out_proj.weight")):
            return [piece.chunk(size, dim=1)[rank] for piece in pieces]
        if name.endswith(("w2_weight", "down_proj.weight")):
            return [_padded(piece, -1, multiple).chunk(size, dim=-1)[rank] for piece in pieces]
        if name.endswith(("qkv_proj.weight", "qkv_proj.bias")):
            kv_ranks = min(size, self.model.num_key_value_heads)  # Fewer KV heads than ranks: neighbours share one.
            query, *key_value = pieces
            return [query.chunk(size)[rank], *(x.chunk(kv_ranks)[rank * kv_ranks // size] for x in key_value)]
        if name.endswith("w13_weight"):
            matrices = [half for piece in pieces for expert in _matrices(piece) for half in expert]
            return [_padded(matrix, -2, multiple).chunk(size)[rank] for matrix in matrices]
        if name.endswith("gate_up_proj.weight"):
            return [_padded(piece, -2, multiple).chunk(size)[rank] for piece in pieces]
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            return [_padded(piece, -2, _VOCABULARY_MULTIPLE).chunk(size)[rank] for piece in pieces]
        if name.endswith(("in_proj_qkvz.weight", "linear_attn.conv1d.weight")):
            return [part.chunk(size)[rank] for part in (*self._key_key_value(pieces[0]), *pieces[1:])]
        if name.endswith("linear_attn.A_log"):
            return [piece.float().chunk(size)[rank] for piece in pieces]  # In FP32, whatever the server's dtype.
        if name.endswith(("in_proj_ba.weight", "linear_attn.dt_bias")):
            return [piece.chunk(size)[rank] for piece in pieces]
        return pieces

    def _key_key_value(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        """The rows of a gated delta net's queries, keys and values, each of which is cut between ranks."""
        keys = (self.model.linear_num_key_heads or 0) * (self.model.linear_key_head_dim or 0)
        return rows.split([keys, keys, rows.shape[0] - 2 * keys])


def _matrices(piece: torch.Tensor) -> Iterator[Sequence[torch.Tensor]]:
    """Of w13: a matrix that is gate or up, or gate and up of every expert of a stack [E, 2 I, H]."""
    if piece.ndim == 2:
        yield (piece,)
        return
    for expert in piece:
        yield expert.chunk(2)


def _padded(matrix: torch.Tensor, dim: int, multiple: int) -> torch.Tensor:
    """With zeros behind its last row (dim -2) or column (-1)."""
    padding = -matrix.shape[dim] % multiple
    return torch.nn.functional.pad(matrix, (0, padding) if dim == -1 else (0, 0, 0, padding))
