"""What a directory holds: a Hugging Face checkpoint, a Megatron checkpoint, or a training run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drpo_megatron.checkpoint.checksums import missing_or_cut, read_checksums
from drpo_megatron.checkpoint.hf import HFCheckpoint
from drpo_megatron.checkpoint.hf_files import FOLDER, TENSORS_FILE, CarriedFiles, FileLayout
from drpo_megatron.checkpoint.safetensors_file import TensorInfo
from drpo_megatron.checkpoint.torch_dist import FORMAT_FILES, TorchDistCheckpoint
from drpo_megatron.models import FAMILIES
from drpo_megatron.reading import read_json_as

Facts = dict[str, str]


@dataclass(frozen=True, slots=True)
class _Record:
    """trainer.json, as far as it is shown."""

    layout: dict[str, int]
    counters: dict[str, Any]
    versions: dict[str, str]


def inspect(directory: Path) -> Facts:
    """Facts by name, in the order to show them. ValueError when it is none of the three, or damaged."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory")
    if (directory / ".metadata").is_file() or (directory / "metadata.json").is_file():
        return _megatron(directory)
    if (directory / "config.yaml").is_file() and (directory / "checkpoints").is_dir():
        return _run(directory)
    if (directory / TENSORS_FILE).is_file():
        return {"kind": f"the Hugging Face files of {directory.parent}"} | _model(CarriedFiles(directory).config)
    if (directory / "config.json").is_file():
        return _hf(HFCheckpoint(directory))
    raise ValueError(
        f"{directory} is neither a Hugging Face checkpoint (config.json), nor a Megatron checkpoint "
        f"({', '.join(FORMAT_FILES)}), nor a training run (config.yaml, checkpoints/)"
    )


def _hf(checkpoint: HFCheckpoint) -> Facts:
    layout = FileLayout.of(checkpoint)
    section = checkpoint.config.get("quantization_config")
    quantised = section.get("quant_method", "no quant_method") if isinstance(section, dict) else None
    return (
        {"kind": "Hugging Face checkpoint" + (f", quantised ({quantised})" if quantised else "")}
        | _model(checkpoint.config)
        | _tensors(layout.tensors.values())
        | {"files": f"{len(layout.headers)}, complete"}
    )


def _megatron(directory: Path) -> Facts:
    checkpoint, sums = TorchDistCheckpoint(directory), read_checksums(directory)
    if sums is not None and (problems := missing_or_cut(directory, sums)):
        raise ValueError(f"checkpoint {directory} is damaged: {'; '.join(problems[:3])}")
    weights = {key: t for key, t in checkpoint.tensors.items() if not key.startswith("optimizer.")}
    infos = [TensorInfo(t.properties.dtype, tuple(t.size)) for t in weights.values()]
    carried = CarriedFiles(directory / FOLDER) if (directory / FOLDER).is_dir() else None
    facts = {"kind": "Megatron checkpoint (torch_dist)"}
    facts |= _model(carried.config) if carried else {"family": f"unknown: it has no {FOLDER}/"}
    facts |= _tensors(infos)
    has_optimizer = len(weights) < len(checkpoint.tensors)
    facts["optimizer state"] = "yes" if has_optimizer else "no"
    record_file = directory / "trainer.json"
    if record_file.is_file():
        record = read_json_as(record_file, _Record)
        facts["saved by"] = _pairs(record.layout)
        facts["counters"] = _pairs(record.counters)
        facts["versions"] = _pairs(record.versions)
    else:
        facts["saved by"] = "an unfinished save: trainer.json is missing" if has_optimizer else "conversion"
    num_files = len(list(directory.glob("*.distcp")))
    facts["files"] = f"{num_files}, complete"
    facts["checksums"] = "none" if sums is None else f"of {len(sums)} files, which verify and megatron-to-hf compare"
    return facts


def _run(directory: Path) -> Facts:
    steps = sorted(path for path in (directory / "checkpoints").glob("step_*") if (path / "driver.json").is_file())
    facts = {
        "kind": "training run",
        "checkpoints": ", ".join(path.name for path in steps) or "none",
        "exported model": "hf/" if (directory / "hf" / "config.json").is_file() else "not yet",
    }
    if steps:
        facts |= {f"newest: {name}": fact for name, fact in _megatron(steps[-1] / "trainer").items()}
    return facts


def _model(config: dict[str, Any]) -> Facts:
    model_type = config.get("model_type")
    known = (
        ""
        if isinstance(model_type, str) and model_type in FAMILIES
        else f" (not supported; known are {', '.join(sorted(FAMILIES))})"
    )
    found = config.get("text_config")
    text = found if isinstance(found, dict) else config
    facts = {"family": f"{model_type}{known}", "layers": str(text.get("num_hidden_layers"))}
    experts = text.get("num_experts", text.get("num_local_experts"))
    return facts | ({"experts": f"{experts}, {text.get('num_experts_per_tok')} a token"} if experts else {})


def _tensors(infos: Iterable[TensorInfo]) -> Facts:
    numbers: Counter[torch.dtype] = Counter()
    num_bytes = 0
    for info in infos:
        numbers[info.dtype] += info.num_bytes // info.dtype.itemsize
        num_bytes += info.num_bytes
    dtypes = ", ".join(f"{str(dtype).removeprefix('torch.')} {count:,}" for dtype, count in numbers.most_common())
    return {"parameters": f"{sum(numbers.values()):,}", "dtypes": dtypes, "bytes": f"{num_bytes:,}"}


def _pairs(record: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in record.items())
