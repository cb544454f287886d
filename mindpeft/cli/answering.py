"""Answers written while training: some are shown, all are measured, and kept in ``samples.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspore import nn

from mindpeft.console import logger
from mindpeft.data.conversations import Conversation
from mindpeft.data.instructions import choose_template
from mindpeft.data.tokenization import Tokenizer
from mindpeft.generate import generate
from mindpeft.generate.stopping import cut
from mindpeft.generate.turns import end_of_turns, lead_of_turns
from mindpeft.recipe_sections import DataSection, GenerationSection
from mindpeft.train.callbacks import TrainerCallback
from mindpeft.train.text_metrics import TEXT_METRICS

SAMPLES_FILE = "samples.jsonl"


class Answering:
    """Questions of a data set, and what their answers should be.

    Args:
        conversations: the last words of the assistant are wanted, what is before them is given.
        section: how many, how they are written and measured.
        data: how conversations become text.
        tokenizer: the model's.
    """

    def __init__(
        self,
        conversations: list[Conversation],
        section: GenerationSection,
        data: DataSection,
        tokenizer: Tokenizer,
    ) -> None:
        self.section, self.tokenizer = section, tokenizer
        self.template = choose_template(tokenizer, data.template)
        self.questions, self.prompts, self.wanted = [], [], []
        for conversation in conversations[: section.rows]:
            messages = conversation.messages
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            prompt = tokenizer.apply_chat_template(
                messages[:last], chat_template=self.template, add_generation_prompt=True
            )
            self.questions.append(messages[last - 1]["content"] if last else "")
            self.prompts.append(prompt)
            self.wanted.append(messages[last]["content"])

    def write(self, model: nn.Cell) -> list[str]:
        """The model's answers."""
        written, size = [], self.section.batch_size
        ends = end_of_turns(model, self.tokenizer, self.template)
        settings = {**ends, **self.section.settings(), "tokenizer": self.tokenizer}
        for start in range(0, len(self.prompts), size):
            some = self.prompts[start : start + size]
            filled = [*some, *[some[-1]] * (size - len(some))]  # one number of rows: no more graphs
            texts = generate(model, filled, **settings).asnumpy()[: len(some)]
            longest = max(map(len, filled))
            written += [self.tokenizer.decode(row[longest:], skip_special_tokens=True) for row in texts]
        lead = lead_of_turns(self.tokenizer, self.template)
        return [cut(text, settings.get("stop_strings") or ()).removeprefix(lead) for text in written]

    def measure(self, model: nn.Cell) -> tuple[dict[str, float], list[dict[str, str]]]:
        """(metrics, all questions with what was wanted and what was written)."""
        written = self.write(model)
        metrics: dict[str, float] = {}
        for name in self.section.metrics:
            metrics |= TEXT_METRICS[name](written, self.wanted)
        rows = zip(self.questions, self.wanted, written, strict=True)
        return metrics, [{"prompt": q, "wanted": w, "written": text} for q, w, text in rows]


class AnsweringCallback(TrainerCallback):
    """Writes answers at every evaluation."""

    def __init__(self, answering: Answering) -> None:
        self.answering = answering

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        metrics, samples = self.answering.measure(model)
        show(state.global_step, metrics, samples[: self.answering.section.show])
        keep(Path(args.output_dir) / SAMPLES_FILE, state.global_step, samples)


def show(step: int, metrics: dict[str, float], samples: list[dict[str, str]]) -> None:
    """Say how good the answers are, and show some."""
    found = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
    logger.info("step %d, written answers: %s", step, found)
    for sample in samples:
        logger.info("  > %s\n    %s", sample["prompt"], sample["written"])


def keep(path: Path, step: int, samples: list[dict[str, Any]]) -> None:
    """Add them to the file."""
    with open(path, "a", encoding="utf-8") as file:
        for sample in samples:
            file.write(json.dumps({"step": step, **sample}, ensure_ascii=False) + "\n")
