"""Prompt tuning: T trained embeddings in front of the text's, every other weight frozen.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning". ``prompt_learning`` says how
virtual tokens meet masks, positions, token types, labels and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mindpeft.config import PeftType, register_method
from mindpeft.data.tokenization import AutoTokenizer
from mindpeft.errors import InputError
from mindpeft.tuners.base import Shapes, Site, Slot, Tensors
from mindpeft.tuners.prompt_layers import PromptLayer
from mindpeft.tuners.prompt_learning import (
    OUTPUT,
    PromptLearningConfig,
    check_arguments,
    find_embedding,
    word_table,
)
from mindpeft.tuners.targeted import check_choice

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel


@register_method
@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Hugging Face PEFT's configuration of prompt tuning, key by key; see also ``PromptLearningConfig``.

    Attributes:
        prompt_tuning_init: what the prompts start from: "RANDOM" (normal, std 1), "SAMPLE_VOCAB" (embeddings
            of random tokens), "TEXT" (those of a text, repeated or cut to T tokens).
        prompt_tuning_init_text: that text.
        tokenizer_name_or_path: the folder of the tokenizer for it.
        tokenizer_kwargs: options of transformers' tokenizers; not supported for a fresh adapter.

    Raises:
        InputError: a value is not allowed, or a key that "TEXT" needs is missing.
    """

    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    METHOD: ClassVar[PeftType] = PeftType.PROMPT_TUNING
    INITS: ClassVar[tuple[str, ...]] = ("RANDOM", "SAMPLE_VOCAB", "TEXT")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("prompt_tuning_init", self.prompt_tuning_init, self.INITS)
        for key in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
            if self.prompt_tuning_init == "TEXT" and not getattr(self, key):
                raise InputError(f"prompt_tuning_init TEXT needs {key}")
        if self.tokenizer_kwargs and self.prompt_tuning_init != "TEXT":
            raise InputError("tokenizer_kwargs is for prompt_tuning_init TEXT alone; leave it out")

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        check_arguments(base.model, self.peft_type.value, "input_ids", "inputs_embeds")
        find_embedding(base.model)
        return {"": PromptEmbedding}


class PromptEmbedding(PromptLayer):
    """The virtual tokens' embeddings themselves."""

    @classmethod
    def tensor_shapes(cls, site: Site) -> Shapes:
        return {OUTPUT: cls.width_of(site)}

    @classmethod
    def initial_tensors(cls, site: Site) -> Tensors:
        count, width = cls.width_of(site)
        kind = site.config.prompt_tuning_init
        if kind == "SAMPLE_VOCAB":
            table = word_table(site.cell)
            value = table[np.random.randint(0, len(table), count)]
        elif kind == "TEXT":
            value = word_table(site.cell)[text_ids(site.config, count)]
        else:
            value = np.random.standard_normal((count, width)).astype(np.float32)
        return {OUTPUT: value}


def text_ids(config: PromptTuningConfig, count: int) -> np.ndarray:
    """The ids of the initial text, special tokens included, repeated or cut to ``count``.

    Raises:
        InputError: there is no tokenizer in the folder, or tokenizer_kwargs is given.
    """
    if config.tokenizer_kwargs:
        raise InputError("tokenizer_kwargs is not supported; leave it out")
    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path)
    return np.resize(tokenizer(config.prompt_tuning_init_text, truncation=False)["input_ids"], count)
