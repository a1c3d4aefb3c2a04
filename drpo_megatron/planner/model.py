"""The sizes of a model that memory and time depend on, and its parameters layer by layer, from its family's rules."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from transformers import AutoConfig

from drpo_megatron.models import get_family
from drpo_megatron.models.rules import Rule, Vocabulary
from drpo_megatron.reading import one_line

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class LayerParameters:
    """Numbers of parameters of a layer over all ranks, by how ranks share them."""

    replicated: int
    """Norms: whole on every rank."""
    router: int
    """Whole on every rank, too, and perhaps frozen."""
    split: int
    """Over tensor-parallel ranks."""
    expert: int
    """Over expert-parallel ranks, and inside an expert over expert-tensor-parallel ones."""

    @property
    def total(self) -> int:
        return self.replicated + self.router + self.split + self.expert


@dataclass(frozen=True, slots=True)
class Model:
    hidden: int
    query: int
    """Heads times head size."""
    key: int
    """Query groups times head size: the keys of a token, or its values."""
    num_heads: int
    num_groups: int
    vocab_size: int
    tied_head: bool
    num_experts: int
    """0: a dense model."""
    experts_per_token: int
    expert_inner: int
    shared_inner: int
    """Of experts that every token visits. 0: there are none."""
    dense_inner: int
    max_positions: int
    has_experts: tuple[bool, ...]
    """Of every layer."""
    caches_keys: tuple[bool, ...]
    """Of every layer, whether its attention keeps keys and values of all earlier tokens (linear attention does not)."""
    linear_attention: int
    """Elements that the input projections of a linear attention give a token. 0: there is none."""
    recurrent_state: int
    """Elements that a linear attention keeps of a whole sequence, in place of keys and values. 0: there is none."""
    layers: tuple[LayerParameters, ...]
    final_norm: int
    vocabularies: int
    """Matrices of vocabulary size: embedding and head, or one that is both."""

    @property
    def num_parameters(self) -> int:
        """As published: without the padding of the vocabulary."""
        return self._outside + sum(layer.total for layer in self.layers)

    @property
    def num_active_parameters(self) -> int:
        """Those that one token meets."""
        share = self.experts_per_token / self.num_experts if self.num_experts else 0.0
        return self._outside + sum(round(layer.total - layer.expert * (1 - share)) for layer in self.layers)

    @property
    def _outside(self) -> int:
        return self.vocabularies * self.vocab_size * self.hidden + self.final_norm


def read_model(directory: str) -> Model:
    """The model that `directory/config.json` describes; weights need not be there. ValueError if it is not known."""
    file = f"{directory}/config.json"
    try:
        hf_config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises errors of its own kinds over values of odd types.
        raise ValueError(f"{file} can't be read: {type(error).__name__}: {one_line(error)}") from error
    family = get_family(hf_config, file)
    rules, kwargs = family.rules(hf_config), family.transformer_config_kwargs(hf_config)
    num_layers, head_size = kwargs["num_layers"], kwargs["kv_channels"]
    outside = [rule for rule in rules if not _LAYER.fullmatch(rule.key.name)]
    vocabularies = [rule.layout.vocab_size for rule in outside if isinstance(rule.layout, Vocabulary)]
    with_experts = kwargs.get("moe_layer_freq") or [int(bool(kwargs.get("num_moe_experts")))] * num_layers
    text_config = hf_config.get_text_config()
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"] * num_layers
    return Model(
        hidden=kwargs["hidden_size"],
        query=kwargs["num_attention_heads"] * head_size,
        key=kwargs["num_query_groups"] * head_size,
        num_heads=kwargs["num_attention_heads"],
        num_groups=kwargs["num_query_groups"],
        vocab_size=vocabularies[0],
        tied_head=len(vocabularies) == 1,
        num_experts=kwargs.get("num_moe_experts") or 0,
        experts_per_token=kwargs.get("moe_router_topk") or 0,
        expert_inner=kwargs.get("moe_ffn_hidden_size") or 0,
        shared_inner=kwargs.get("moe_shared_expert_intermediate_size") or 0,
        dense_inner=kwargs.get("ffn_hidden_size") or 0,
        max_positions=text_config.max_position_embeddings,
        has_experts=tuple(bool(flag) for flag in with_experts),
        caches_keys=tuple(kind != "linear_attention" for kind in kinds),
        linear_attention=_linear_attention(text_config) if "linear_attention" in kinds else 0,
        recurrent_state=_recurrent_state(text_config) if "linear_attention" in kinds else 0,
        layers=_by_layer(rules, num_layers),
        final_norm=sum(_size(rule) for rule in outside if not isinstance(rule.layout, Vocabulary)),
        vocabularies=len(vocabularies),
    )


def _linear_attention(hf_config: Any) -> int:
    """q and k, then v and the output's gate, of a gated delta net."""
    keys = hf_config.linear_num_key_heads * hf_config.linear_key_head_dim
    values = hf_config.linear_num_value_heads * hf_config.linear_value_head_dim
    return 2 * keys + 2 * values


def _recurrent_state(hf_config: Any) -> int:
    """A key x value matrix a head. The convolution's last few tokens are small beside it."""
    return hf_config.linear_num_value_heads * hf_config.linear_key_head_dim * hf_config.linear_value_head_dim


def _by_layer(rules: list[Rule], num_layers: int) -> tuple[LayerParameters, ...]:
    counts = [Counter[str]() for _ in range(num_layers)]
    for rule in rules:
        if found := _LAYER.fullmatch(rule.key.name):
            counts[int(found[1])][_kind(rule)] += _size(rule)
    return tuple(LayerParameters(c["replicated"], c["router"], c["split"], c["expert"]) for c in counts)


def _kind(rule: Rule) -> str:
    if rule.key.expert is not None:
        return "expert"
    if ".router." in rule.key.name:
        return "router"
    return "replicated" if rule.layout.axis is None else "split"


def _size(rule: Rule) -> int:
    return sum(math.prod(tensor.shape) for tensor in rule.hf)
