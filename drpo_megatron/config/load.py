"""Read a run's YAML file, apply overrides, and say everything that is wrong with it at once.

    config = load_config("examples/quickstart.yaml", ["trainer.optimizer.lr=1e-6", "objective=grpo"])

`${a.b}` in the file refers to another key. A section that is chosen by name may be given as the name alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from drpo_megatron.config.problems import KeyPath, Source, listed, problem_text
from drpo_megatron.config.schema import sections_at, tags
from drpo_megatron.config.sections import Config
from drpo_megatron.files import write_text
from drpo_megatron.reading import check_yaml, one_line, read_text, short

_YAML_ERRORS = (yaml.YAMLError, ValueError, TypeError, AttributeError, RecursionError)
"""What PyYAML's and OmegaConf's constructors raise: ValueError for the date 2026-99-99, TypeError for odd keys."""


_MAX_KEYS = 10


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a run.

    Args:
        path: a YAML file. Paths inside it stay relative to the current directory.
        overrides: `dotted.key=value`, the value in YAML. `objective=grpo` replaces the whole section by
            `{name: grpo}`; `objective={name: drpo, delta: 0.15}` by what is given.
    Raises: ValueError that lists every problem with its place, key, value and what was expected.
    """
    file = Path(path)
    tree, lines = _read_yaml(file)
    applied = [_parse_override(text) for text in overrides]
    for keys, value, text in applied:
        _set(tree, keys, value, text)
    tree = _resolve(_expand_names(tree), file)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        source = Source(file, lines, {keys: text for keys, _, text in applied})
        problems = [problem_text(detail, source) for detail in error.errors(include_url=False)]
    raise ValueError(listed(f"{file} is not a valid configuration", problems))


def load_resolved(path: str | os.PathLike[str]) -> Config:
    """The configuration that `save_config` wrote."""
    return load_config(path)


def to_yaml(config: Config) -> str:
    """The resolved configuration, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    write_text(path, to_yaml(config))


def _read_yaml(file: Path) -> tuple[dict[str, Any], dict[KeyPath, int]]:
    text = read_text(file)
    tree, root = parse_yaml(text, str(file)), yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(tree, dict) or not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file} must hold sections (run, model, ...), not {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}, dict(_line_numbers(root, ()))


def parse_yaml(text: str, place: str) -> Any:
    """YAML as OmegaConf reads it (1e-6 is a number, a key that stands twice an error), references left as they are."""
    root = check_yaml(text, place)
    try:
        if isinstance(root, yaml.ScalarNode):
            return root.value  # OmegaConf knows none, or takes it for the name of a section.
        return OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (*_YAML_ERRORS, OmegaConfBaseException) as error:
        raise ValueError(f"{place} is not valid YAML: {one_line(error)}") from None


def _line_numbers(node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[KeyPath, int]]:
    for key, value in node.value:
        here = (*path, str(key.value))
        yield here, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _line_numbers(value, here)


def _parse_override(text: str) -> tuple[KeyPath, Any, str]:
    key, separator, value = text.partition("=")
    keys = tuple(key.strip().split("."))
    if not separator or not all(keys):
        raise ValueError(f"override {short(text)!r} is not KEY=VALUE, such as trainer.optimizer.lr=1e-6")
    if len(keys) > _MAX_KEYS:
        raise ValueError(f"override {short(text)!r}: no key has more than {_MAX_KEYS} parts")
    place = f"override {short(text)!r}: the value"
    check_yaml(value, place)
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]))
    except (*_YAML_ERRORS, OmegaConfBaseException) as error:
        raise ValueError(f"{place} is not valid YAML: {one_line(error)}") from None
    assert isinstance(parsed, dict)
    return keys, parsed["value"], text


def _set(tree: dict[str, Any], keys: KeyPath, value: Any, text: str) -> None:
    section = tree
    for depth, key in enumerate(keys[:-1]):
        inner = section.get(key)
        if isinstance(inner, str) and any(tags(option) for option in sections_at(keys[: depth + 1])):
            inner = {"name": inner}
        elif inner is None:
            inner = {}
        if not isinstance(inner, dict):
            outer = ".".join(keys[: depth + 1])
            raise ValueError(
                f"override {short(text)!r}: {outer} = {short(repr(inner))} is a value, not a section with keys"
            )
        section[key] = inner
        section = inner
    section[keys[-1]] = value


def _expand_names(tree: dict[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    """`objective: grpo` becomes `objective: {name: grpo}`, wherever the schema has a section chosen by name."""
    expanded: dict[str, Any] = {}
    for key, value in tree.items():
        here = (*path, str(key))
        if isinstance(value, dict):
            value = _expand_names(value, here)
        elif isinstance(value, str) and "${" not in value and any(tags(option) for option in sections_at(here)):
            value = {"name": value}
        expanded[str(key)] = value
    return expanded


def _resolve(tree: dict[str, Any], file: Path) -> dict[str, Any]:
    """Replace `${a.b}` by what it refers to. Resolvers such as `${oc.env:HOME}` are refused: one file, one run."""
    for path, text in _strings(tree, ()):
        if call := re.search(r"\$\{\s*[\w.]+\s*:", text):
            raise ValueError(
                f"{file}: {'.'.join(path)} = {short(text)!r} calls a resolver ({call[0]}...); "
                "only references to other keys are allowed, such as ${run.name}"
            )
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True, throw_on_missing=True)
    except (*_YAML_ERRORS, OmegaConfBaseException) as error:
        key = getattr(error, "full_key", None) or "a reference to another key"
        raise ValueError(f"{file}: {key}: {str(error).partition(chr(10))[0]}") from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _strings(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings(inner, (*path, str(key)))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _strings(inner, (*path, str(index)))
