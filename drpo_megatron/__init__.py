"""DRPO for mixture-of-experts language models: Megatron-Core trains, engines roll out, one loop joins them."""

__version__ = "0.1.0"
