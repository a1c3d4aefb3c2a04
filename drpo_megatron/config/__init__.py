"""Typed configuration. Imports no torch: `drpo-megatron --help` and every bad-input error are instant."""

from drpo_megatron.config.load import load_config, load_resolved, save_config, to_yaml
from drpo_megatron.config.schema import describe_fields
from drpo_megatron.config.sections import Config

__all__ = ["Config", "describe_fields", "load_config", "load_resolved", "save_config", "to_yaml"]
