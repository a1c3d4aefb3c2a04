"""The constants behind every estimate, in one place: an NVIDIA H100 SXM node, and what a run reaches of its peak.

Memory counts are exact or measured; times are estimates from these numbers and good for comparing layouts, not for
promising a finish.
"""

from __future__ import annotations

GPUS_PER_NODE = 8
"""Groups within a node talk over NVLink, others over the network. Megatron numbers ranks with TP innermost."""
PEAK_FLOPS = 989e12
"""Dense BF16 FLOP/s of a GPU, from the data sheet."""
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
