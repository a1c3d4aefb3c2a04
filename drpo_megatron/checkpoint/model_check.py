"""Whether the tensors of a checkpoint are those of the model in its config.json, found from the headers of its files.

    family, rules = require_fit(StoredTensors(HFCheckpoint(directory)))       conversion
    notes = require_trainable(directory)                                      a run, before any process starts

No weight is read, except for a tied head, which is compared by conversions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from transformers import GenerationConfig

from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.checkpoint.stored import CONFIG_KEY, StoredTensors, dtype_name, is_packed
from drpo_megatron.models import FAMILIES, Family, get_family
from drpo_megatron.models.rules import Rule
from drpo_megatron.reading import one_line, read_json_object

GENERATION_FILE = "generation_config.json"
ADAPTER_FILE = "adapter_config.json"
NUM_NAMED = 3
"""Problems of a kind that a message names; it counts the others."""


def require_fit(stored: StoredTensors, problems: Iterable[str] | None = None) -> tuple[Family, list[Rule]]:
    """The family of a checkpoint, and the rules in the names that it uses.

    Args:
        problems: what was found otherwise. None: all that headers tell.

    Raises: ValueError for an unknown family, a setting that it can't do, and tensors that are missing, extra, misshapen,
        packed or without their scales: one line, with the number and a few names of each kind.
    """
    family = get_family(stored.config, f"{stored.checkpoint.directory}/config.json")
    rules = family.rules(stored.config, stored.names)
    found = set(problems if problems is not None else tensor_problems(stored, family, rules))
    if found:
        raise ValueError(differences(f"{stored.checkpoint.directory} and its config.json", found))
    return family, rules


def require_trainable(hf_path: str | Path, *, engine: str = "transformers") -> list[str]:
    """A checkpoint that a run can start from: trainer, engine and export read the same weights from it.

    Args:
        engine: `rollout.engine.name`.

    Returns: notes for the user: which of its files the run's export will not hold.
    Raises: ValueError as `require_fit`, and for a quantised checkpoint.
    """
    stored = StoredTensors(HFCheckpoint(hf_path))
    if stored.quantisation is not None:
        raise ValueError(
            f"{hf_path} is quantised ({CONFIG_KEY}); training needs the checkpoint that it was made of, or what "
            "`drpo-megatron convert` makes of it: hf-to-megatron, then megatron-to-hf"
        )
    _require_no_adapter(stored.checkpoint)
    _require_generation_config(stored.checkpoint)
    family, rules = require_fit(stored)
    stacked = next((hf for rule in rules for hf in rule.hf if hf.slice is not None), None)
    if engine == "sglang" and stacked is not None and family.model_type in ("qwen3_moe", "mixtral"):
        raise ValueError(
            f"{hf_path} stacks its experts in {stacked.name}, which SGLang can't load for {family.model_type}; "
            "`drpo-megatron convert` hf-to-megatron, then megatron-to-hf --experts apart, or engine=transformers"
        )
    return stored.checkpoint.other_files().without_copies(stored.checkpoint.names()).notes()


def require_servable(hf_path: str | Path) -> None:
    """A checkpoint to generate from: whole, and of a known family also complete, since transformers fills gaps with
    random numbers. ValueError otherwise."""
    stored = StoredTensors(HFCheckpoint(hf_path))
    _require_no_adapter(stored.checkpoint)
    _require_generation_config(stored.checkpoint)
    if stored.config.get("model_type") in FAMILIES:
        require_fit(stored)


def _require_generation_config(checkpoint: HFCheckpoint) -> None:
    """What engines read beside config.json is readable. ValueError names the file."""
    file = checkpoint.directory / GENERATION_FILE
    if not file.exists():
        return
    fields = read_json_object(file)
    try:
        GenerationConfig.from_dict(fields)
    except Exception as error:  # transformers raises errors of any kind over values of odd types.
        raise ValueError(f"{file} can't be used: {type(error).__name__}: {one_line(error)}") from error


def _require_no_adapter(checkpoint: HFCheckpoint) -> None:
    if (checkpoint.directory / ADAPTER_FILE).exists():
        raise ValueError(
            f"{checkpoint.directory} has an {ADAPTER_FILE}: where peft is installed transformers loads that adapter and "
            "the model that it names, and nothing else does; merge it, or move it away"
        )


def tensor_problems(stored: StoredTensors, family: Family, rules: Iterable[Rule]) -> Iterator[str]:
    """`kind: what`, one for each tensor."""
    yield from stored.problems()
    names, known = set(stored.names), set[str]()
    for rule in rules:
        known.update(rule.hf_copies)
        for hf in rule.hf:
            if hf.name in known:
                continue
            known.add(hf.name)
            if hf.name not in names:
                yield f"missing: {hf.name} {list(hf.stored_shape)}"
                continue
            info = stored.info(hf.name)
            dtype, shape = info
            if shape != hf.stored_shape:
                yield f"misshapen: {hf.name} is {list(shape)}, the config says {list(hf.stored_shape)}"
            if not dtype.is_floating_point and not is_packed(info):
                yield f"dtype: {hf.name} is {dtype_name(dtype)}, weights must be floating point"
    for name in names - known - stored.stray_scales():
        if not family.ignores(name):
            yield f"extra: {name} belongs to no parameter of the model"


def tie_problems(stored: StoredTensors, rules: Iterable[Rule]) -> Iterator[str]:
    """Copies of a tensor that aren't equal to it. Reads both."""
    names = set(stored.names)
    for rule in rules:
        for copy in (name for name in rule.hf_copies if name in names):
            name = rule.hf[0].name
            if stored.info(copy) != stored.info(name) or not torch.equal(stored.get(copy), stored.get(name)):
                yield f"untied: {copy} differs from {name}, but config.json says tie_word_embeddings=true; set it to false"


def differences(what: str, problems: Iterable[str]) -> str:
    """One line for all of them: of each kind how many, and the first few."""
    kinds: dict[str, list[str]] = {}
    for problem in sorted(problems):
        kind, _, text = problem.partition(": ")
        kinds.setdefault(kind, []).append(text)
    parts = [f"{len(found):,} {kind}: {_first(found)}" for kind, found in kinds.items()]
    return f"{what} don't fit: {'; '.join(parts)}"


def _first(texts: list[str]) -> str:
    return "; ".join(texts[:NUM_NAMED]) + (" ..." if len(texts) > NUM_NAMED else "")
