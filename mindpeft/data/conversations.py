"""Rows of a table to conversations, whatever shape people keep them in.

    messages         {"messages": [{"role": "user", "content": "..."}, ...]}
    ShareGPT         {"conversations": [{"from": "human", "value": "..."}, ...], "system": "..."}
    Alpaca           {"instruction": "...", "input": "...", "output": "...", "history": [["...", "..."], ...]}
    prompt           {"prompt": "...", "completion": "..."}, also "response" or "answer" for the second

The columns tell which it is. ``input`` and ``history`` may be missing; ``system`` may stand beside the first
three of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mindpeft.data.chat_template import Message
from mindpeft.data.readers import Row, Table
from mindpeft.errors import InputError

# What datasets call the speakers -> what templates call them.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
_COMPLETIONS = ("completion", "response", "answer")


@dataclass(frozen=True)
class Conversation:
    """What was said, and the line of the source on which the row began."""

    messages: list[Message]
    line: int | None = None


def read_conversations(table: Table) -> list[Conversation]:
    """The conversations of a table.

    Raises:
        InputError: the columns are none of the shapes, or a row is malformed; the message names the line.
    """
    shape = shape_of(table)
    conversations = []
    for row in table.rows:
        messages = _SHAPES[shape](table, row)
        if not any(message["role"] == "assistant" for message in messages):
            raise table.error(row, "nothing in it is said by the assistant, so there is nothing to learn")
        conversations.append(Conversation(messages, row.line))
    return conversations


def shape_of(table: Table) -> str:
    """Which of the shapes a table has: the key of the first that its columns fit.

    Raises:
        InputError: none.
    """
    columns = set(table.columns)
    if "messages" in columns:
        return "messages"
    if "conversations" in columns:
        return "sharegpt"
    if {"instruction", "output"} <= columns:
        return "alpaca"
    if "prompt" in columns and columns & set(_COMPLETIONS):
        return "prompt"
    raise InputError(
        f"{table.source} holds no instructions: its columns are {', '.join(table.columns)}; expected are "
        "messages, or conversations, or instruction with output, or prompt with completion"
    )


def _messages(table: Table, row: Row, column: str = "messages") -> list[Message]:
    turns = row.values.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise table.error(row, f"column {column!r} must hold a list of messages, not {str(turns)[:40]!r}")
    system = _optional(table, row, "system")
    messages = [{"role": "system", "content": system}] if system else []
    return messages + [_message(table, row, turn) for turn in turns]


def _message(table: Table, row: Row, turn: dict[str, Any]) -> Message:
    speaker, words = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if speaker not in ROLES:
        raise table.error(row, f"a message of {speaker!r}; known are {', '.join(ROLES)}")
    if not isinstance(words, str):
        raise table.error(row, f"a message of {speaker!r} holds {str(words)[:40]!r}, not text")
    return {"role": ROLES[speaker], "content": words}


def _sharegpt(table: Table, row: Row) -> list[Message]:
    return _messages(table, row, "conversations")


def _alpaca(table: Table, row: Row) -> list[Message]:
    messages = []
    system = _optional(table, row, "system")
    if system:
        messages.append({"role": "system", "content": system})
    for earlier in row.values.get("history") or []:
        if not isinstance(earlier, list) or len(earlier) != 2 or not all(isinstance(t, str) for t in earlier):
            raise table.error(row, "history must hold pairs of a question and its answer")
        messages += _pair(*earlier)
    instruction, given = _text(table, row, "instruction"), _optional(table, row, "input")
    prompt = f"{instruction}\n{given}" if given else instruction
    return messages + _pair(prompt, _text(table, row, "output"))


def _prompt(table: Table, row: Row) -> list[Message]:
    column = next(name for name in _COMPLETIONS if name in table.columns)
    return _pair(_text(table, row, "prompt"), _text(table, row, column))


def _pair(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(table: Table, row: Row, column: str) -> str:
    value = row.values.get(column)
    if not isinstance(value, str) or not value.strip():
        raise table.error(row, f"no text in column {column!r}")
    return value


def _optional(table: Table, row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise table.error(row, f"column {column!r} must hold text, not {str(value)[:40]!r}")
    return value or ""


_SHAPES: dict[str, Callable[[Table, Row], list[Message]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt": _prompt,
}


@dataclass(frozen=True)
class ConversationDataset:
    """Conversations as the examples of a data set.

    Attributes:
        examples: in the order of the source.
        source: where they come from, for messages.
        task: what training does with them.
        label_map: none.
    """

    examples: list[Conversation]
    source: str
    task: str = "instruction"
    label_map: None = None

    def __len__(self) -> int:
        return len(self.examples)
