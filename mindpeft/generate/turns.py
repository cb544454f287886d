"""Where an answer begins and ends: at what the chat template writes around the assistant's words."""

from __future__ import annotations

from typing import Any

from mindspore import nn

from mindpeft.data.chat_template import closing, opening
from mindpeft.data.tokenization import Tokenizer
from mindpeft.generate.text import default_config


def end_of_turns(model: nn.Cell, tokenizer: Tokenizer, template: str) -> dict[str, Any]:
    """The arguments of ``generate`` with which an answer ends where its turn does.

    A base model's end is that of a document, but fine-tuned on conversations it learns that of a turn.

    Args:
        model: its own ends stay.
        tokenizer: the model's.
        template: Jinja text.

    Returns:
        ``eos_token_id`` with the token that ends a turn, or ``stop_strings`` where no single token does.
    """
    text = closing(template, **tokenizer.template_variables)
    ends = list(default_config(model).ends)
    first = next((token for token in tokenizer.added_tokens if token and text.startswith(token)), None)
    if first is not None:
        return {"eos_token_id": list(dict.fromkeys([*ends, tokenizer.convert_tokens_to_ids(first)]))}
    return {"stop_strings": [text]} if text else {}


def lead_of_turns(tokenizer: Tokenizer, template: str) -> str:
    """What a model writes before its words because the template has it there, such as a line's end.

    Args:
        tokenizer: the model's.
        template: Jinja text.
    """
    return opening(template, **tokenizer.template_variables)
