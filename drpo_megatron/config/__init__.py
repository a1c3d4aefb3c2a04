"""Typed configuration. Imports no torch: `drpo-megatron --help` and every bad-input error are instant."""
