"""What the methods that add virtual positions share: their config's keys, and where a model's words are.

Such a method has one slot around the whole model: see ``prompt_layers``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn

from mindpeft.config import PeftConfig, TaskType, add_task_heads
from mindpeft.errors import InputError
from mindpeft.tuners.base import Shapes, Tensors, is_embedding, original, weight_attribute
from mindpeft.tuners.targeted import check_count, name_set

if TYPE_CHECKING:
    from mindpeft.tuners.plan import BaseModel

OUTPUT = "prompt_embeddings"  # the tensor in the file
EMBEDDING = "prompt_encoder.embedding.weight"  # what an encoder makes it from

# A key of the config -> what configs of models call it, in PEFT's order.
_SIZES = {
    "num_layers": ("num_hidden_layers", "num_layers", "n_layer"),
    "token_dim": ("hidden_size", "n_embd", "d_model"),
    "num_attention_heads": ("num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"),
}


@dataclass
class PromptLearningConfig(PeftConfig):
    """The keys of every method that adds virtual positions.

    Attributes:
        num_virtual_tokens: T, how many.
        token_dim: the width of an embedding; like the next three it is taken from the model if ``None``.
        num_transformer_submodules: 1; 2 is for encoder-decoders, which are not supported.
        num_attention_heads: of the model.
        num_layers: of the model.
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed.
    """

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: list[str] | None = None

    EXAMPLE: ClassVar[Mapping[str, Any]] = {"num_virtual_tokens": 20}
    CELL_PREFIX: ClassVar[str] = "base_model."
    SHARED_PREFIX: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("num_virtual_tokens", self.num_virtual_tokens)
        if self.task_type == TaskType.SEQ_2_SEQ_LM or self.num_transformer_submodules not in (None, 1):
            raise InputError(
                f"{self.peft_type.value} is for models of one stack: num_transformer_submodules must be 1, "
                "and task_type not SEQ_2_SEQ_LM"
            )
        for key in _SIZES:
            if getattr(self, key) is not None:
                check_count(key, getattr(self, key))
        name_set(self.modules_to_save, "modules_to_save", allow_text=False)
        saved = None if self.modules_to_save is None else list(self.modules_to_save)
        self.modules_to_save = add_task_heads(self.task_type, saved)

    def resolve(self, base: BaseModel) -> None:
        self.num_transformer_submodules = 1
        for key, found in self.model_sizes(base).items():
            own = getattr(self, key)
            if own is None and found is None:
                raise InputError(f"set {key}: the base model's config does not have it")
            if None not in (own, found) and own != found:
                raise InputError(f"{key} is {own}, but the base model's is {found}; is it for another model?")
            setattr(self, key, found if own is None else own)

    def model_sizes(self, base: BaseModel) -> dict[str, int | None]:
        """What the model's config says of the sizes; ``None`` where it is silent."""
        config = getattr(base.model, "config", None)
        values = {key: [getattr(config, name, None) for name in names] for key, names in _SIZES.items()}
        return {key: next((size for size in found if size), None) for key, found in values.items()}


def check_arguments(model: nn.Cell, method: str, *needed: str) -> None:
    """Raise ``InputError`` unless the model's ``construct`` takes these arguments."""
    missing = [name for name in needed if name not in argument_defaults(model)]
    if missing:
        raise InputError(
            f"{method} needs a model that takes {', '.join(missing)}, which {type(model).__name__} does not"
        )


def argument_defaults(model: nn.Cell) -> dict[str, Any]:
    """The arguments of a model's ``construct`` in order, with their defaults (``None`` without one)."""
    return {
        name: None if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(model.construct).parameters.items()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def find_embedding(model: nn.Cell) -> tuple[nn.Cell, str]:
    """Where a model's word embedding is: the cell that holds it, and under which name.

    It is what ``model.get_input_embeddings()`` returns or, without that, the first embedding with
    ``config.vocab_size`` rows.

    Raises:
        InputError: there is none.
    """
    getter = getattr(model, "get_input_embeddings", None)
    wanted = None if getter is None else original(getter())
    rows = getattr(getattr(model, "config", None), "vocab_size", None)
    for _, parent in model.cells_and_names():
        for name, child in parent.name_cells().items():
            cell = original(child)
            if cell is wanted or (wanted is None and is_embedding(cell) and len(embedding_of(cell)) == rows):
                return parent, name
    raise InputError(
        f"the word embedding of {type(model).__name__} is not found: it needs get_input_embeddings(), or an "
        "embedding with config.vocab_size rows"
    )


def embedding_of(cell: nn.Cell) -> ms.Parameter:
    """An embedding's table."""
    return getattr(cell, weight_attribute(cell))


def word_table(model: nn.Cell) -> np.ndarray:
    """The word embeddings of a model, (vocabulary, width), in float32."""
    parent, name = find_embedding(model)
    return embedding_of(original(getattr(parent, name))).asnumpy().astype(np.float32)


def encoder_tensors(shapes: Shapes) -> Tensors:
    """Fresh tensors as torch has them: embeddings normal with std 1, others U(-1/sqrt(in), 1/sqrt(in))."""
    tensors, bound = {}, 0.0
    for name, shape in shapes.items():
        if len(shape) == 2:
            bound = 1 / np.sqrt(shape[1])  # also of the bias after it
        if name in (OUTPUT, EMBEDDING):
            value = np.random.standard_normal(shape)
        else:
            value = np.random.uniform(-bound, bound, shape)
        tensors[name] = value.astype(np.float32)
    return tensors
