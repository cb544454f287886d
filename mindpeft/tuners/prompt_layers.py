"""The layer around a model that puts virtual tokens in front of the real ones.

It computes the word embeddings of ``input_ids``, puts T learned ones in front of them, and calls the model
with ``inputs_embeds``, as PEFT does:

    attention_mask    T ones in front; nothing where there is no mask
    token_type_ids    T zeros in front
    place             with a cache, T higher: the virtual tokens stand in it already, and come no second time
    position_ids      the T from the first one on in front, the given ones T higher (PEFT drops them)
    labels            of tokens: T times -100 in front; of spans: T higher; of whole texts: as they are

BERT's pooled token is then the first virtual one, in PEFT as here. Outputs for each token come back for the
real tokens alone, so that they fit the labels (PEFT returns those of the virtual tokens too, and its token
classifier then fails on labels). Token types are used for every task; PEFT drops them for feature extraction
and question answering.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mindspore as ms
from mindspore import nn, ops

from mindpeft.errors import InputError
from mindpeft.ops.losses import IGNORED_LABEL
from mindpeft.tuners.base import Shapes, Site, TunerLayer, original
from mindpeft.tuners.prompt_learning import OUTPUT, PromptLearningConfig, argument_defaults, find_embedding


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
        self.cache_place = -1
        if "place" in self.argument_names:
            self.cache_place = self.argument_names.index("place")
        self.task = ""
        self.count = 0  # T

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
        self.count = config.num_virtual_tokens
        return changed

    @property
    def virtual_tokens(self) -> int:
        """How many tokens it puts in front as it is switched now."""
        return self.count if self.active else 0

    def prompts(self, arguments: tuple) -> ms.Tensor:
        """The virtual tokens' embeddings, (T, width), or (batch, T, width); runs inside a graph."""
        return self.prompt_embeddings

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self.arranged(args, kwargs)
        if not self.active:
            return self.base_layer(*arguments[: self.passed_on])
        if self.cache_place >= 0 and arguments[self.cache_place] is not None:
            return self.base_layer(*self.behind_cached(arguments))
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

    def behind_cached(self, arguments: tuple) -> tuple:
        """The arguments of tokens whose virtual ones are in a cache; runs inside a graph."""
        moved = ()
        for i in range(self.passed_on):
            name, value = self.argument_names[i], arguments[i]
            if value is not None and name == "attention_mask":
                value = ops.concat((ops.ones((value.shape[0], self.count), value.dtype), value), 1)
            elif value is not None and (name == "position_ids" or i == self.cache_place):
                value = value + self.count
            moved = (*moved, value)
        return moved

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
