"""Hugging Face model families that train here. A new one is one file beside `qwen3.py` and one line below."""

from __future__ import annotations

from collections.abc import Mapping

from drpo_megatron.models import mixtral, qwen2, qwen3, qwen3_5_moe, qwen3_moe
from drpo_megatron.models.family import Family, HFConfig, bad_sizes, contradictions, typed_config

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        qwen2.FAMILY,
        qwen3.FAMILY,
        qwen3_moe.FAMILY,
        qwen3_5_moe.FAMILY,
        qwen3_5_moe.TEXT_FAMILY,
        mixtral.FAMILY,
    )
}


def get_family(hf_config: HFConfig, place: str | None = None) -> Family:
    """The family of a transformers config, or of the dict in config.json.

    Args:
        place: the file that it was read from, for errors.

    Raises: ValueError for a `model_type` that is not known (with those that are), and for settings of a known one that
        the family can't do (all of them).
    """
    named = f"{place}: " if place else ""
    is_dict = isinstance(hf_config, Mapping)
    model_type = hf_config.get("model_type") if is_dict else getattr(hf_config, "model_type", None)
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{named}model_type={model_type!r} is not known; the known ones are {known}")
    family = FAMILIES[model_type]
    typed = typed_config(hf_config, place or "config.json")
    if impossible := bad_sizes(typed):
        raise ValueError(f"{named}{model_type} of impossible sizes: {'; '.join(impossible)}")
    problems = contradictions(hf_config) if is_dict else []
    if problems := problems + family.unsupported(typed):
        raise ValueError(f"{named}{model_type} with settings that are not supported: {'; '.join(problems)}")
    return family


__all__ = ["FAMILIES", "Family", "HFConfig", "get_family"]
