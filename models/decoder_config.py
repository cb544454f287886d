"""What the configs of Llama-shaped models share: their keys, and what they mean for the decoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from mindpeft.errors import InputError
from mindpeft.models.config import PretrainedConfig
from mindpeft.nn.decoder import DecoderSpec
from mindpeft.nn.rotary import RotarySpec

FULL, SLIDING = "full_attention", "sliding_attention"


class AnyDecoderConfig(PretrainedConfig):
    """What a decoder's config is asked for, whatever its keys are called."""

    vocab_size: int
    hidden_size: int
    pad_token_id: int | None
    tie_word_embeddings: bool

    @property
    def feature_size(self) -> int:
        """The width of what the backbone gives."""
        return self.hidden_size

    @property
    def word_size(self) -> int:
        """The width of a word's embedding."""
        return self.hidden_size

    @property
    def embedding_scale(self) -> float:
        """What the word embeddings are multiplied by."""
        return 1.0

    @property
    def logit_softcap(self) -> float | None:
        """The bound of the logits of the next token."""
        return None

    @property
    def head_dropout(self) -> float:
        """The dropout before a token classifier."""
        rate = getattr(self, "classifier_dropout", None)
        return 0.1 if rate is None else rate

    def spec(self) -> DecoderSpec:
        """The decoder's flags."""
        raise NotImplementedError

    def kinds_of_layers(self) -> list[str]:
        """For each layer, "full_attention" or "sliding_attention"."""
        return [FULL] * self.num_hidden_layers

    def windows(self, window: int | None) -> dict[str, tuple]:
        """The flags that say what the layers see; ``window`` is that of those that slide."""
        kinds = self.kinds_of_layers()
        used = list(dict.fromkeys(kinds))
        return {
            "windows": tuple(window if kind == SLIDING else None for kind in used),
            "window_of": tuple(used.index(kind) for kind in kinds),
        }


@dataclass
class DecoderConfig(AnyDecoderConfig):
    """Keys of Llama's ``config.json``, with Hugging Face's defaults; the other models' add to them.

    ``rope_parameters`` is the newer form of ``rope_theta`` and ``rope_scaling``, and wins over them.
    """

    THETA: ClassVar[float] = 10000.0
    INTERLEAVED: ClassVar[bool] = False  # pairs of the rotary embedding are neighbours

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    classifier_dropout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        heads, keys = self.num_attention_heads, self.key_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise InputError(f"hidden_size {self.hidden_size} is no multiple of num_attention_heads {heads}")
        if heads % keys:
            raise InputError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {keys}")
        if self.rope_theta is None:
            self.rope_theta = (self.rope_parameters or {}).get("rope_theta", self.THETA)

    @property
    def key_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def rope_of(self, kind: str) -> dict[str, Any]:
        """The settings of the rotary embedding in one kind of layer, in the newer form."""
        values = self.rope_parameters or {**(self.rope_scaling or {}), "rope_theta": self.rope_theta}
        return values.get(kind, values) if isinstance(values.get(kind), dict) else values

    def rotary(self, kind: str) -> RotarySpec:
        """The rotary embedding in one kind of layer."""
        values = dict(self.rope_of(kind))
        share = values.get("partial_rotary_factor", self.partial_rotary_factor)
        trained = self.extra.get("original_max_position_embeddings")
        if trained is not None:
            values.setdefault("original_max_position_embeddings", trained)
        return RotarySpec(
            size=int(self.head_size * (1.0 if share is None else share)),
            theta=values.get("rope_theta") or self.rope_theta,
            max_positions=self.max_position_embeddings,
            kind=values.get("rope_type", values.get("type", "default")),
            settings=values,
            interleaved=self.INTERLEAVED,
        )

    def spec(self, **flags: Any) -> DecoderSpec:
        """The decoder's flags; ``flags`` are a model's own."""
        kinds = self.kinds_of_layers()
        used = list(dict.fromkeys(kinds))
        layout = {
            "layers": self.num_hidden_layers,
            "width": self.hidden_size,
            "heads": self.num_attention_heads,
            "key_heads": self.key_heads,
            "head_size": self.head_size,
            "inner_width": self.intermediate_size,
            "activation": self.hidden_act,
            "rotary": tuple(self.rotary(kind) for kind in used),
            "rotary_of": tuple(used.index(kind) for kind in kinds),
            "norm_eps": self.rms_norm_eps,
            "qkv_bias": self.attention_bias,
            "output_bias": self.attention_bias,
            "attention_dropout": self.attention_dropout,
        }
        windows = self.windows(getattr(self, "sliding_window", None))
        return DecoderSpec(**{**layout, **windows, **flags})


def kinds_from(config: DecoderConfig, given: list[str] | None, sliding: list[bool]) -> list[str]:
    """The kinds of all layers: those that the file names, or by a rule that says which slide.

    Raises:
        InputError: the file names others, or not one for each layer.
    """
    if given is None:
        return [SLIDING if slides else FULL for slides in sliding]
    unknown = set(given) - {FULL, SLIDING}
    if unknown or len(given) != config.num_hidden_layers:
        raise InputError(
            f"layer_types must be {config.num_hidden_layers} times {FULL!r} or {SLIDING!r}, not {given!r}"
        )
    return given
