"""What the methods that add virtual positions share: their config's keys, and the layer around the model.

Such a method has one slot around the whole model. Its layer computes the word embeddings of ``input_ids``,
puts T learned ones in front of them, and calls the model with ``inputs_embeds``, as PEFT does:

    attention_mask    T ones in front; nothing where there is no mask
    token_type_ids    T zeros in front
    position_ids      the T from the first one on in front, the given ones T higher (PEFT drops them)
    labels            of tokens: T times -100 in front; of spans: T higher; of whole texts: as they are

BERT's pooled token is then the first virtual one, in PEFT as here. Outputs for each token come back for the
real tokens alone, so that they fit the labels (PEFT returns those of the virtual tokens too, and its token
classifier then fails on labels). Token types are used for every task; PEFT drops them for feature extraction
and question answering.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import mindspore as ms
import numpy as np
from mindspore import nn, ops

from mindpeft.config import PeftConfig, TaskType, add_task_heads
from mindpeft.errors import InputError
from mindpeft.ops.losses import IGNORED_LABEL
from mindpeft.tuners.base import Shapes, Site, Tensors, TunerLayer, is_embedding, original, weight_attribute
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


class ModelLayer(TunerLayer):
    """A layer around the whole model, which it calls with other arguments.

    Switching it on or off changes shapes inside the graph, so graphs are compiled anew then. (Both ways in
    one graph would take twice as long to compile, even if it is never switched off.)
    """

    # Arguments after the model's own.
    MORE_ARGUMENTS: ClassVar[tuple[str, ...]] = ()

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        model = original(base_layer)
        inner = getattr(base_layer, "argument_defaults", None) or argument_defaults(model)
        self.passed_on = len(inner)
        self.argument_defaults = {**inner, **dict.fromkeys(self.MORE_ARGUMENTS)}
        self.argument_names = tuple(self.argument_defaults)
        self.defaults = tuple(self.argument_defaults.values())
        self.most = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.active = False

    @classmethod
    def holds(cls, room: Shapes, shapes: Shapes) -> bool:
        return room == shapes

    def set_scaling(self, value: float) -> bool:
        super().set_scaling(value)
        changed = self.active != (value != 0)
        self.active = value != 0
        return changed

    def arranged(self, args: tuple, kwargs: dict) -> tuple:
        """All arguments in order; runs inside a graph."""
        found = len(args)
        arranged = ()
        for i in range(len(self.argument_names)):
            if i < len(args):
                arranged = (*arranged, args[i])
            elif self.argument_names[i] in kwargs:
                found += 1
                arranged = (*arranged, kwargs[self.argument_names[i]])
            else:
                arranged = (*arranged, self.defaults[i])
        check_all_taken(found, len(args) + len(kwargs), self.argument_names)
        return arranged


class PromptLayer(ModelLayer):
    """Puts virtual tokens in front of the real ones; a method says in `prompts` what they are."""

    def __init__(self, base_layer: nn.Cell, *slot: Any) -> None:
        super().__init__(base_layer, *slot)
        # No child: the embedding belongs to the model, and another layer may come around it any time.
        holder, self.embedding_name = find_embedding(original(base_layer))
        object.__setattr__(self, "embedding_holder", holder)
        self.ids_place = self.argument_names.index("input_ids")
        self.embeds_place = self.argument_names.index("inputs_embeds")
        self.task = ""

    @classmethod
    def width_of(cls, site: Site) -> tuple[int, int]:
        """(virtual tokens, width of an embedding)."""
        return site.config.num_virtual_tokens, site.config.token_dim

    @classmethod
    def file_shapes(cls, site: Site) -> Shapes:
        return {OUTPUT: cls.width_of(site)}

    def configure(self, config: PromptLearningConfig, trainable: bool) -> bool:
        task = config.task_type.value if config.task_type else ""
        changed, self.task = task != self.task, task
        return changed

    def prompts(self, arguments: tuple) -> ms.Tensor:
        """The virtual tokens' embeddings, (T, width), or (batch, T, width); runs inside a graph."""
        return self.prompt_embeddings

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arranged(args, kwargs)
        if not self.active:
            return self.base_layer(*arguments[: self.passed_on])
        words = arguments[self.embeds_place]
        if words is None:
            words = getattr(self.embedding_holder, self.embedding_name)(arguments[self.ids_place])
        batch, length, width = words.shape
        prompts = self.prompts(arguments)
        count = check_room(length, prompts.shape[-2], self.most)
        if prompts.ndim == 2:
            prompts = ops.tile(ops.reshape(prompts, (1, count, width)), (batch, 1, 1))
        embedded = ops.concat((ops.cast(prompts, words.dtype), words), 1)
        lengthened = ()
        for i in range(self.passed_on):
            if i == self.embeds_place:
                lengthened = (*lengthened, embedded)
            elif i == self.ids_place or arguments[i] is None:
                lengthened = (*lengthened, None)
            else:
                longer = self.lengthened(self.argument_names[i], arguments[i], (batch, length), count)
                lengthened = (*lengthened, longer)
        return self.of_real_tokens(self.base_layer(*lengthened), length, count)

    def lengthened(self, name: str, value: Any, shape: tuple[int, int], count: int) -> Any:
        """An argument with what belongs to the virtual tokens; runs inside a graph."""
        if name == "attention_mask":
            check_mask_axes(value.ndim)
            return ops.concat((ops.ones((shape[0], count), value.dtype), value), 1)
        if name == "token_type_ids":
            return ops.concat((ops.zeros((shape[0], count), value.dtype), value), 1)
        if name == "position_ids":
            steps = ops.tile(ops.reshape(ops.arange(count), (1, count)), (shape[0], 1))
            first = ops.tile(value[:, :1], (1, count)) + ops.cast(steps, value.dtype)
            return ops.concat((first, value + count), 1)
        if name == "labels":
            return self.lengthened_labels(value, shape, count)
        return value

    def lengthened_labels(self, labels: ms.Tensor, shape: tuple[int, int], count: int) -> ms.Tensor:
        """Labels with the virtual tokens' share; without a task type the ids' shape tells those of tokens."""
        if self.task == "QUESTION_ANS":
            return ops.select(labels < 0, labels, labels + count)
        untold = self.task == "" or self.task == "FEATURE_EXTRACTION"
        whole = labels.dtype in (ms.int32, ms.int64) and labels.shape == shape
        if self.task in ("TOKEN_CLS", "CAUSAL_LM") or (untold and whole):
            return ops.concat((ops.full((shape[0], count), IGNORED_LABEL, dtype=labels.dtype), labels), 1)
        return labels

    def of_real_tokens(self, result: Any, length: int, count: int) -> Any:
        """A model's results without the rows of virtual tokens; runs inside a graph."""
        if isinstance(result, tuple):
            kept = ()
            for part in result:
                kept = (*kept, self.of_real_tokens(part, length, count))
            return kept
        if result is None or result.ndim != 3 or result.shape[1] != length + count:
            return result
        return result[:, count:]


@ops.constexpr
def check_all_taken(taken: int, given: int, names: tuple[str, ...]) -> None:
    """Raise ``InputError`` if a call has arguments that the model does not take."""
    if taken != given:
        raise InputError(
            f"the model is called with arguments that it does not take; it takes {', '.join(names)}"
        )


@ops.constexpr
def check_room(length: int, virtual: int, most: int | None) -> int:
    """Return the number of virtual tokens if there are positions for them and the real ones.

    Raises:
        InputError: together they are more than the model's.
    """
    if most is not None and length + virtual > most:
        raise InputError(
            f"the text has {length} tokens besides {virtual} virtual ones, but max_position_embeddings is "
            f"{most}; truncate it to {most - virtual} (max_length)"
        )
    return virtual


@ops.constexpr
def check_mask_axes(axes: int) -> None:
    """Raise ``InputError`` unless an attention mask says which tokens are there."""
    if axes != 2:
        raise InputError(
            f"attention_mask must be (batch, length) with virtual tokens, but it has {axes} axes"
        )
