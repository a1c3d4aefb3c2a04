"""Chat templates that refuse a message, are broken, or lose what they are given: one line each, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drpo_megatron.data.prompts import read_prompts
from drpo_megatron.data.tokenize import check_template, encode_prompt, load_tokenizer
from tests.tiny import save_checkpoint, tiny_config, tiny_dense_config

NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ messages[0]['content'] }}"
)
"""As Gemma's."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"), tiny_dense_config(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("template", "system_prompt", "message"),
    [
        (
            NO_SYSTEM,
            "Be brief.",
            r"TemplateError: System role not supported\); mend it, or leave data.system_prompt out",
        ),
        ("{% for m in messages %}{{ m['content'] }}", None, "can't be applied .TemplateSyntaxError: Unexpected end"),
        ("{{ messages[7]['content'] }}", None, "can't be applied .UndefinedError"),
        ("{{ 1 / 0 }}", None, "can't be applied .ZeroDivisionError"),
        ("{{ messages | no_such_filter }}", None, "can't be applied .TemplateAssertionError"),
        ("{{ messages.__class__.__mro__ }}", None, "can't be applied .SecurityError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", None, "can't be applied .RecursionError"),
        ("{{ raise_exception('two\nlines') }}", None, r"can't be applied .TemplateError: two\)"),
        ("{# nothing #}", None, "makes '' of any question: it leaves the question out"),
        ("always the same", None, "makes 'always the same' of any question"),
        ("{{ messages[-1]['content'] }}", "Be brief.", "leaves out data.system_prompt"),
    ],
)
def test_a_template_that_can_not_be_used_is_one_line(
    checkpoint: Path, template: str, system_prompt: str | None, message: str
) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=message) as caught:
        check_template(tokenizer, system_prompt)
    assert str(checkpoint) in str(caught.value) and "\n" not in str(caught.value)


def test_a_template_that_never_ends_is_stopped(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drpo_megatron.data.tokenize._TEMPLATE_S", 0.5)
    tokenizer = load_tokenizer(checkpoint)
    many = "".join(f"{{% for {name} in range(90000) %}}" for name in "abc")
    tokenizer.chat_template = many + "{% endfor %}" * 3 + "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="does not end within 0.5 s"):
        check_template(tokenizer, None)


def test_a_template_that_works_is_left_alone(checkpoint: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    check_template(tokenizer, None)
    check_template(tokenizer, "t3 ")
    assert encode_prompt(tokenizer, "t1 t2", "t3 ") == (3, 1, 2)


def test_a_question_that_the_template_refuses_is_named_by_file_and_line(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(checkpoint)
    refuses = "{% if 't9' in messages[0]['content'] %}{{ raise_exception('no t9') }}{% endif %}"
    tokenizer.chat_template = refuses + "{{ messages[0]['content'] }}"
    check_template(tokenizer, None)
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": prompt, "answer": "1"}) for prompt in ("t1", "t9")))
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: the chat template .* can't be applied .*no t9"):
        read_prompts(file, tokenizer, tiny_config(checkpoint))
