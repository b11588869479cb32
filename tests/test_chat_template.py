"""Chat templates cannot reach out of their sandbox, nor take more than their time and size."""

from __future__ import annotations

from typing import Any

import pytest

from pagedcore import chat_template
from pagedcore.chat_template import ChatTemplate
from pagedcore.errors import RequestError

MESSAGES = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list[Any] | None = None) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(MESSAGES if messages is None else messages)


def test_a_template_sees_messages_and_special_tokens() -> None:
    source = "{% macro m(x) %}[{{ x.role }}]{% endmacro %}{{ bos_token }}{% for x in messages %}{{ m(x) ~ x.content }}{% endfor %}"
    assert render(source) == "<s>[user]Hi"
    assert render("{{ '-' * 3 }}{{ 2 ** 10 }}{{ 'a' if add_generation_prompt }}") == "---1024a"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "access to attribute '__class__'"),
        ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__'"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 // 0 }}", "division"),
        ("{% include 'other' %}", "no loader"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
        ("{{ 'x' * 10000000 }}", "more than 1048576"),
        ("{{ 10000000 * ['x'] }}", "more than 1048576"),
        ("{{ 9 ** (9 ** 9) }}", "more than 4096 bits"),
        ("{% for i in range(99999) %}0123456789ab{% endfor %}", "more than 1048576 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    ],
)
def test_what_a_template_must_not_do_fails_its_request(source: str, reason: str) -> None:
    with pytest.raises(RequestError, match=f"messages do not fit the model's chat template: .*({reason})"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.2)
    with pytest.raises(RequestError, match=r"it takes longer than 0.2 s"):
        render(source)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages must hold at least 1 message"),
        (["Hi"], r"messages\[0\] must be an object with a text as role, got 'Hi'"),
        ([*MESSAGES, {"content": "Hi"}], r"messages\[1\] must be an object with a text as role"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be a text or a list of parts, got 3"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            r'messages\[0\].content must have parts of type "text" only, got .*image_url',
        ),
    ],
)
def test_messages_are_checked(messages: list[Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        render("{{ messages }}", messages)


def test_there_are_not_too_many_messages() -> None:
    with pytest.raises(RequestError, match="messages must hold at most 4096 messages, got 4097"):
        render("{{ messages }}", MESSAGES * 4097)


def test_what_a_template_says_of_the_messages_is_escaped_and_cut() -> None:
    with pytest.raises(RequestError) as raised:
        render("{{ raise_exception(messages[0].content) }}", [{"role": "user", "content": "\x1b[2J\u00e9\n" * 10_000}])
    assert str(raised.value).isascii() and str(raised.value).isprintable()
    assert len(str(raised.value)) < 500


def test_a_broken_template_says_so() -> None:
    with pytest.raises(RequestError, match="the model's chat template is broken"):
        ChatTemplate("{% for %}", {})
