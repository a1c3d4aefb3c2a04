"""Every number of the configuration has bounds, and every text is checked: asked of the schema, and tried."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
import pytest
from pydantic import AfterValidator, BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from drpo_megatron.config import load_config
from drpo_megatron.config.schema import section_types
from drpo_megatron.config.sections import Config
from drpo_megatron.study.file import StudyFile

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "quickstart.yaml")
FREE = {"objective.options", "rollout.engine.flags", "overrides", "prepare", "axes", "exclude", "claims", "seeds"}
"""Handed on as they are, or checked by what they are handed to: a user's own objective, the overrides of a study."""


def fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every value below a section, all members of unions included."""
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = section_types(field.annotation)
        for part in inner:
            yield from fields(part, f"{key}.")
        if not inner and key.split(".")[0] not in FREE and key not in FREE:
            yield key, field


def scalars(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """(plain type, what annotates it) of every scalar in a type."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        yield from scalars(arguments[0], (*arguments[1:], *metadata))
    elif origin in (Union, UnionType):
        for member in arguments:
            yield from scalars(member, metadata)
    elif origin in (tuple, list, dict):
        for member in arguments:
            if member is not Ellipsis:
                yield from scalars(member)
    elif origin is not Literal and annotation is not NoneType:
        yield annotation, metadata


def bounds(metadata: tuple[Any, ...]) -> tuple[float, float]:
    """(largest lower, smallest upper) bound; infinite where there is none."""
    low, high = -math.inf, math.inf
    for part in metadata:
        for bound in part.metadata if isinstance(part, FieldInfo) else [part]:
            if isinstance(bound, annotated_types.Ge | annotated_types.Gt):
                low = max(low, getattr(bound, "ge", None) or getattr(bound, "gt", 0) or 0)
            if isinstance(bound, annotated_types.Le | annotated_types.Lt):
                high = min(high, getattr(bound, "le", None) or getattr(bound, "lt", 0) or 0)
    return low, high


FIELDS = [*fields(Config), *fields(StudyFile)]
SCALARS = [
    (key, kind, metadata)
    for key, field in FIELDS
    for kind, metadata in scalars(field.annotation, tuple(field.metadata))
]
NUMBERS = [(key, kind, metadata) for key, kind, metadata in SCALARS if kind in (int, float)]
TEXTS = [(key, metadata) for key, kind, metadata in SCALARS if kind is str]


def test_the_walk_finds_what_it_should() -> None:
    found = {key for key, _, _ in NUMBERS} | {key for key, _ in TEXTS}
    assert {"run.seed", "trainer.optimizer.betas", "parallel.virtual_pipeline"} <= found
    assert {"objective.delta", "objective.correction.max_ratio", "precision.train.size", "reward.path"} <= found
    assert {kind for _, kind, _ in SCALARS} == {int, float, str, bool}
    assert len(NUMBERS) > 60


@pytest.mark.parametrize(
    ("key", "kind", "metadata"), NUMBERS, ids=[f"{key}-{kind.__name__}" for key, kind, _ in NUMBERS]
)
def test_every_number_has_finite_bounds_and_is_no_truth_value(key: str, kind: type, metadata: tuple[Any, ...]) -> None:
    low, high = bounds(metadata)
    assert math.isfinite(low) and math.isfinite(high), f"{key} needs a bounded type of config/base.py"
    adapter = TypeAdapter(Annotated[kind, *metadata])
    for value in (math.nan, math.inf, -math.inf, "1e999", 2**70, -(2**70), 10.0**40, True, False, "many", None, [], {}):
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


@pytest.mark.parametrize(("key", "metadata"), TEXTS, ids=[key for key, _ in TEXTS])
def test_every_text_can_be_shown_and_saved(key: str, metadata: tuple[Any, ...]) -> None:
    assert any(isinstance(part, AfterValidator) for part in metadata), f"{key} needs a text type of config/base.py"
    adapter = TypeAdapter(Annotated[str, *metadata])
    for value in ("a\0b", "a\x1b[2Jb", "a\ud800b", "a\u202eb"):
        with pytest.raises(ValidationError):
            adapter.validate_python(value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.optimizer.lr=.inf", "trainer.optimizer.lr = inf; expected less than or equal to 1"),
        ("trainer.optimizer.lr=1e999", "trainer.optimizer.lr = inf"),
        ("trainer.optimizer.lr=true", "trainer.optimizer.lr: true is no number"),
        ("trainer.optimizer.betas=[0.9,1.0]", "trainer.optimizer.betas.1 = 1.0; expected less than 1"),
        ("trainer.optimizer.betas=[-0.1,0.9]", "trainer.optimizer.betas.0 = -0.1"),
        ("trainer.optimizer.weight_decay=.inf", "trainer.optimizer.weight_decay = inf"),
        ("trainer.optimizer.min_lr=0.1", "min_lr=0.1 is above lr="),
        ("trainer.optimizer.weight_decay=1e5", "a step would take the whole weight away"),
        (f"run.seed={2**70}", "run.seed = 1180591620717411303424; expected less than or equal to 2147483647"),
        ("cluster.step_timeout_s=1e30", "cluster.step_timeout_s = 1e+30; expected less than or equal to 2592000"),
        ("reward={name: import, path: rewards.mine}", "'rewards.mine' is not of the form package.module:function"),
        ("run.name=''", "run.name: '' is empty"),
        ("run.name=..", "run.name: the name is '..'"),
        ("run.name=../up", "run.name: the name is '../up', which holds a /"),
        ('run.name="a\\nb"', "run.name: 'a\\nb' has more than one line"),
        ("data.train=' '", "data.train: ' ' is empty"),
        ("cluster.ray_address=somewhere", "'somewhere' is neither auto nor HOST:PORT"),
        ("cluster.ray_address=host:99999", "'host:99999' is neither auto nor HOST:PORT"),
        ("rollout.engine={name: sglang, hang_timeout_s: 5}", "hang_timeout_s=5 is not above health_interval_s=10"),
        ("rollout.engine={name: sglang, flags: {'a b': 1}}", "'a b' is no name of a flag"),
        ("rollout.engine={name: sglang, flags: {x: .nan}}", "rollout.engine.flags.x: 'nan' is no value of a flag"),
        ("rollout.engine={name: sglang, flags: {x: [1]}}", "'[1]' is no value of a flag"),
        ('rollout.engine={name: sglang, flags: {x: "a\\nb"}}', "has more than one line"),
        (f"run.name={'x' * 300}", "is longer than 255 bytes"),
        ("a.b.c.d.e.f.g.h.i.j.k=1", "no key has more than 10 parts"),
        ("run.seed=" + "9" * 5000, "is not valid YAML"),
        ("run.seed=" + "[" * 5000, "nested too deeply"),
    ],
)
def test_values_that_used_to_pass_are_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(ValueError) as raised:
        load_config(EXAMPLE, [override])
    assert said in str(raised.value)
    assert len(str(raised.value)) < 500
