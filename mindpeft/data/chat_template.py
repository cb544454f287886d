"""Conversations as one text, by the Jinja template of a checkpoint or a named one.

Templates come with checkpoints, so they run in Jinja's sandbox, without access to Python's objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import Any, ClassVar

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from mindpeft.data.named_templates import TEMPLATES
from mindpeft.errors import InputError, did_you_mean

Message = dict[str, Any]  # with "role" and "content"


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}``, which some templates put around what the assistant says: its body as it is."""

    tags: ClassVar[set[str]] = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _as_json(value: Any, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


@cache
def _compiled(text: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment.from_string(text)


def template_text(name: str) -> str:
    """The text of a named template.

    Raises:
        InputError: there is none of this name.
    """
    if name not in TEMPLATES:
        raise InputError(
            f"unknown template {name!r}; known: {', '.join(TEMPLATES)}{did_you_mean(name, TEMPLATES)}"
        )
    return TEMPLATES[name]


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation.

    Args:
        template: Jinja text.
        messages: in order, each with ``role`` (system, user, assistant, ...) and ``content``.
        add_generation_prompt: end with what introduces the assistant's next words.
        variables: what else the template may use: ``bos_token``, ``eos_token``, ``tools``, ...

    Raises:
        InputError: the template is malformed, or refuses the conversation.
    """
    try:
        return _compiled(template).render(
            messages=list(messages), add_generation_prompt=add_generation_prompt, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"the chat template can't write this conversation: {error}") from error


def render_with_spans(
    template: str, messages: Sequence[Message], **variables: Any
) -> tuple[str, list[tuple[int, int]]]:
    """The text of a conversation, and where the assistant's words are in it.

    Returns:
        The text, and for every message of the assistant the first character of what it says and the one after
        its last, with what ends its turn, but without white space after that.

    Raises:
        InputError: see `render`; or the template writes earlier messages in another way once more follow, so
            that there is no telling where they are.
    """
    whole = render(template, messages, **variables)
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(template, messages[:number], add_generation_prompt=True, **variables)
        through = render(template, messages[: number + 1], **variables)
        start = len(before) if whole.startswith(before) else _common(whole, before)
        if not whole.startswith(through.rstrip()) or start >= len(through):
            raise InputError(
                f"message {number + 1} of {len(messages)}: the chat template writes it otherwise when more "
                "follow, so the assistant's words can't be found; use another template"
            )
        spans.append((start, len(through.rstrip())))
    return whole, spans


def opening(template: str, **variables: Any) -> str:
    """What a template writes before the assistant's words, behind what introduces them.

    Raises:
        InputError: the template refuses a question with its answer.
    """
    return _around_answer(template, variables)[0]


def closing(template: str, **variables: Any) -> str:
    """What a template writes behind the assistant's words, without white space around it.

    Where that is nothing, a turn ends as the user's next begins.

    Raises:
        InputError: the template refuses a question with its answer.
    """
    return _around_answer(template, variables)[1] or _between_turns(template, variables)


_TURN = ({"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"})


def _around_answer(template: str, variables: dict[str, Any]) -> tuple[str, str]:
    text, spans = render_with_spans(template, _TURN, **variables)
    before, _, behind = text[slice(*spans[-1])].partition("answer")
    return before, behind.strip()


def _between_turns(template: str, variables: dict[str, Any]) -> str:
    through = render(template, _TURN, **variables)
    more = render(template, [*_TURN, _TURN[0]], **variables)
    return more[len(through) :].partition("question")[0].strip() if more.startswith(through) else ""


def _common(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
