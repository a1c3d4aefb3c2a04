"""The constants behind every estimate, in one place: an NVIDIA H100 SXM node, and what a run reaches of its peak.

Memory counts are exact or measured; times are estimates from these numbers and good for comparing layouts, not for
promising a finish.
"""

from __future__ import annotations

GPUS_PER_NODE = 8
"""Groups within a node talk over NVLink, others over the network. Megatron numbers ranks with TP innermost."""
PEAK_FLOPS = 989e12
"""Dense BF16 FLOP/s of a GPU, from the data sheet."""
_PEAK_FLOPS_OF = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
)
"""By a part of the device's name, the first that fits. From NVIDIA's data sheets, without sparsity."""
COMPUTE_EFFICIENCY = 0.45
"""Share of the peak that matmuls of training reach, the small ones of experts included."""
NVLINK_BYTES_PER_S = 450e9 * 0.7
"""One direction of NVLink 4, times what collectives reach of it."""
NETWORK_BYTES_PER_S = 50e9 * 0.7
"""One 400 Gbit/s port a GPU, times what collectives reach of it."""
HBM_BYTES_PER_S = 3.35e12 * 0.6
"""Memory bandwidth, times what decoding reaches of it."""

RESERVED_BYTES = 5 * 2**30
"""Of every GPU: CUDA context, NCCL's buffers, cuBLAS workspaces, and what the allocator loses to fragments."""
ENGINE_MEMORY_SHARE = 0.88
"""Share of a GPU that an engine fills with weights and KV cache; the rest is its activations and CUDA graphs."""

MEAN_RESPONSE_SHARE = 0.5
"""Mean response length as a share of rollout.max_response_tokens, for times and communication (memory takes the
longest)."""
PROMPT_TOKENS = 256
"""Mean prompt, likewise, where data.max_prompt_tokens does not say less."""


def peak_flops(device_name: str | None) -> float | None:
    """Dense BF16 FLOP/s of a GPU by its name, such as `NVIDIA H100 80GB HBM3`. None: no GPU, or one not known here."""
    return next((flops for part, flops in _PEAK_FLOPS_OF if device_name and part in device_name), None)
