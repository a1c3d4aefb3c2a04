"""Checkpoints between Hugging Face and Megatron, streamed: neither side is ever whole in memory."""
