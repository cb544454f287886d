"""What ``generate`` and ``chat`` share: a model that writes, its template, and how it chooses tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mindpeft.cli.run_folder import Run, open_run
from mindpeft.console import logger
from mindpeft.data.named_templates import TEMPLATES
from mindpeft.data.tokenization import Tokenizer
from mindpeft.errors import InputError, did_you_mean
from mindpeft.generate.stopping import cut
from mindpeft.generate.streaming import TextStreamer
from mindpeft.generate.turns import end_of_turns, lead_of_turns
from mindpeft.peft_model import PeftModel

Conversation = list[dict[str, str]]


@dataclass
class Speaker:
    """A decoder that is asked to write.

    Attributes:
        run: what was opened.
        tokenizer: its tokenizer.
        template: the name or the Jinja text that prompts are written with; None for prompts as they are.
        settings: arguments of ``generate``.
        lead: what the template has before the answer's words.
    """

    run: Run
    tokenizer: Tokenizer
    template: str | None
    settings: dict[str, Any]
    lead: str = ""

    def tokens(self, conversation: Conversation) -> list[int]:
        """What the model reads before it answers."""
        if self.template is None:
            words = "".join(message["content"] for message in conversation)
            return self.tokenizer(words, truncation=False)["input_ids"]
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=self.template, add_generation_prompt=True
        )

    def streamer(self) -> TextStreamer:
        """Prints the words as they come."""
        return TextStreamer(self.tokenizer, lead=self.lead)

    def write(self, prompts: Sequence[list[int]], **more: Any) -> list[str]:
        """The texts behind prompts."""
        written = self.run.model.generate(
            list(prompts), tokenizer=self.tokenizer, **self.settings, **more
        ).asnumpy()
        longest = max(map(len, prompts))
        texts = [self.tokenizer.decode(row[longest:], skip_special_tokens=True) for row in written]
        stops = self.settings.get("stop_strings") or ()
        return [cut(text, stops).removeprefix(self.lead) for text in texts]


def open_speaker(
    folder: Path,
    *,
    base: Path | None = None,
    adapters: Sequence[str] = (),
    template: str | None = None,
    raw: bool = False,
    dtype: str = "float32",
    **settings: Any,
) -> Speaker:
    """Open a run, an adapter or a checkpoint as a model that writes.

    Args:
        folder, base, dtype: see ``open_run``.
        adapters: more adapters, ``NAME=FOLDER``.
        template: the name of a template.
        raw: prompts are taken as they are.
        settings: arguments of ``generate``, None where nothing was said.

    Raises:
        InputError: there is no decoder there, or an argument is wrong.
    """
    run = open_run(folder, base, dtype)
    if not hasattr(run.model, "generate"):
        raise InputError(f"{folder} can't write text: it is no decoder for the next token")
    for entry in adapters:
        name, equals, place = entry.partition("=")
        if not equals or not isinstance(run.model, PeftModel):
            problem = (
                "write NAME=FOLDER" if not equals else f"{folder} has no adapter beside which it could be"
            )
            raise InputError(f"--adapter {entry}: {problem}")
        run.model.load_adapter(place, name)
    tokenizer = run.tokenizer()
    given = {key: value for key, value in settings.items() if value not in (None, [])}
    if given.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        given["do_sample"] = True
    chosen = _template_of(run, tokenizer, template, raw)
    lead = ""
    if chosen is not None:
        text = TEMPLATES.get(chosen, chosen)
        lead, ends = lead_of_turns(tokenizer, text), end_of_turns(run.model, tokenizer, text)
        given["stop_strings"] = [*given.get("stop_strings", []), *ends.pop("stop_strings", [])] or None
        given |= ends
    return Speaker(run, tokenizer, chosen, given, lead)


def _template_of(run: Run, tokenizer: Tokenizer, name: str | None, raw: bool) -> str | None:
    if raw:
        return None
    if name is not None:
        if name not in TEMPLATES:
            known = ", ".join(TEMPLATES)
            raise InputError(f"unknown template {name!r}; known: {known}{did_you_mean(name, TEMPLATES)}")
        return name
    trained = run.data.template if run.data is not None else None
    found = trained or tokenizer.chat_template
    if run.task == "causal_lm" and run.data is not None:
        return None  # it went on learning from plain text
    if found is None:
        logger.info("no chat template: prompts are taken as they are")
    return found
