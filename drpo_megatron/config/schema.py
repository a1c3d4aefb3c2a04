"""What the sections look like from outside: every key with its type, default and docstring.

The loader uses it to suggest the nearest known key; `drpo-megatron train --help-config` prints it.
"""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from drpo_megatron.config.sections import Config

_PATHS_NOTE = (
    "Relative paths (model.hf_path, data files, run.output_dir) are relative to the directory the command runs in, "
    "not to the YAML file."
)


def section_types(annotation: Any) -> list[type[BaseModel]]:
    """The section classes a field may hold: one, several for a tagged union, none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return section_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [section for member in get_args(annotation) for section in section_types(member)]
    return []


def tags(section: type[BaseModel]) -> tuple[str, ...]:
    """The values of a section's `name: Literal[...]`, by which it is chosen; () for a section without one."""
    field = section.model_fields.get("name")
    return get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()


def sections_at(path: tuple[str, ...]) -> list[type[BaseModel]]:
    """The section classes that may stand at a key path; [] for a plain value or an unknown key."""
    found: list[type[BaseModel]] = [Config]
    for key in path:
        fields = [section.model_fields[key] for section in found if key in section.model_fields]
        found = list(dict.fromkeys(inner for field in fields for inner in section_types(field.annotation)))
    return found


def known_keys() -> list[str]:
    """Every dotted key path, sections included."""
    return list(dict.fromkeys(_walk_keys("", Config)))


def describe_fields() -> str:
    """Help text: every key with its type, its default or `required`, and its docstring."""
    return "\n".join([*textwrap.wrap(_PATHS_NOTE, 100), "", *_describe_section("", Config, set())])


def type_text(field: FieldInfo) -> str:
    """A field's type for people: `int > 0`, `none | selective | full`, `float | null`."""
    return _annotation_text(field.annotation) + _bounds_text(field.metadata)


def _walk_keys(prefix: str, section: type[BaseModel]) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in section_types(field.annotation):
            yield from _walk_keys(f"{prefix}{name}.", inner)


def _describe_section(prefix: str, section: type[BaseModel], shown: set[tuple[str, str]]) -> Iterator[str]:
    """Lines of one section. What several members of a union share (`shown`) is described with the first."""
    for name, field in section.model_fields.items():
        key, sections = prefix + name, section_types(field.annotation)
        if (key, str(field)) in shown:
            continue
        shown.add((key, str(field)))
        if not sections:
            yield f"{key}: {type_text(field)} {_default_text(field)}"
            yield from _indented(field.description)
            continue
        for inner in sections:
            chosen = f" with {key}.name = {' | '.join(tags(inner))}" if tags(inner) else ""
            optional = " (optional)" if not field.is_required() and field.default is None else ""
            yield ""
            yield f"[{key}]{optional}{chosen}"
            yield from _indented(inner.__dict__.get("__doc__"))
            yield from _describe_section(f"{key}.", inner, shown)


def _indented(text: str | None) -> list[str]:
    return textwrap.wrap(" ".join((text or "").split()), 100, initial_indent="    ", subsequent_indent="    ")


def _default_text(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    return f"= {'null' if field.default is None else field.default}"


def _annotation_text(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is types.NoneType:
        return "null"
    if annotation is Ellipsis:
        return "..."
    if origin is Annotated:
        return _annotation_text(arguments[0]) + _bounds_text(arguments[1:])
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin in (Union, types.UnionType):
        return " | ".join(_annotation_text(member) for member in arguments)
    if origin is tuple:
        return "[" + ", ".join(_annotation_text(member) for member in arguments) + "]"
    return getattr(annotation, "__name__", str(annotation))


def _bounds_text(metadata: Any) -> str:
    text = ""
    for bound in metadata:
        if isinstance(bound, FieldInfo):
            text += _bounds_text(bound.metadata)
        for kind, attribute, sign in _BOUNDS:
            if isinstance(bound, kind) and (limit := getattr(bound, attribute)) < _NO_LIMIT:
                text += f"{',' if text else ''} {sign} {limit:g}"
    return text


_NO_LIMIT = 2**31 - 1
"""Upper bounds that nobody meets are not worth the reader's time."""
_BOUNDS: tuple[tuple[type, str, str], ...] = (
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Ge, "ge", ">="),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.Le, "le", "<="),
)
