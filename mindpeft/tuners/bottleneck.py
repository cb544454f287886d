"""Bottleneck adapters: configuration, key by key as in AdapterHub's `adapters` library, and presets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

from mindpeft.config import PeftConfig, PeftType, add_task_heads, register_method
from mindpeft.errors import InputError
from mindpeft.tuners.bottleneck_layers import NON_LINEARITIES, BottleneckLayer, Layout
from mindpeft.tuners.compacter import CompacterLayer, SharedPhm
from mindpeft.tuners.half_layers import follows_attention, halves, in_layout, layer_of
from mindpeft.tuners.invertible import InvertibleLayer, is_embeddings
from mindpeft.tuners.targeted import check_choice, check_count, check_number, check_rate, name_set

if TYPE_CHECKING:
    from mindpeft.tuners.base import Slot
    from mindpeft.tuners.plan import BaseModel


@register_method
@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters, keys as in AdapterHub's `adapters`; the defaults are Pfeiffer's (``seq_bn``).

    Attributes:
        mh_adapter: an adapter behind the attention of each layer.
        output_adapter: an adapter behind the feed-forward half of each layer.
        reduction_factor: hidden size / width of the bottleneck (rounded down, at least 1), or a map from
            layer indices to it, such as {"1": 8, "default": 16}.
        non_linearity: the activation in the bottleneck.
        original_ln_before: the layer's residual and norm before the adapter too; only if it is sequential.
        original_ln_after: the layer's residual and norm after the adapter.
        ln_before: a norm of its own before the bottleneck.
        ln_after: a norm of its own after the bottleneck.
        init_weights: "bert" (normal, deviation 0.02), "mam_adapter" (up-projection zero) or "houlsby"
            (truncated normal, deviation 0.01).
        init_weights_seed: gives every adapter of equal shape equal initial values.
        is_parallel: the adapter reads what the half layer reads, and is added to what that gives.
        scaling: the factor of the update: a number, "learned" or "channel" (one learned for each feature).
        use_gating: multiply by a learned gate, one for each row of the batch.
        residual_before_ln: where the adapter's own residual starts if original_ln_before: before the layer's
            residual (true), after it ("post_add"), or after the norm (false).
        adapter_residual_before_ln: the adapter's own residual ends before its ln_after; only if sequential.
        inv_adapter: an invertible adapter behind the embeddings: "nice", or none. ("glow" does not run in the
            library either.)
        inv_adapter_reduction_factor: what its networks read / their width.
        cross_adapter: adapters behind cross-attention; not supported.
        leave_out: the layers without adapters.
        dropout: the rate of dropout on the scaled update.
        phm_layer: Compacter: projections that are sums of ``phm_dim`` Kronecker products.
        phm_dim: how many; it must divide the hidden size and the bottleneck's width.
        factorized_phm_W: the larger factors are products of two matrices of rank ``phm_rank``.
        shared_W_phm: the larger factors are shared by all layers.
        shared_phm_rule: the smaller factors are shared by all layers.
        factorized_phm_rule: the smaller factors have rank 1.
        phm_c_init: how the smaller factors begin: "normal" or "uniform".
        phm_init_range: the deviation of shared smaller factors.
        learn_phm: train the smaller factors.
        hypercomplex_nonlinearity: how the larger factors are said to begin; in the library as here, they are
            drawn from Glorot's normal distribution whatever it is.
        phm_rank: see factorized_phm_W.
        phm_bias: Compacter's projections have a bias.
        stochastic_depth: the rate at which rows of the batch skip an adapter; only if sequential.
        modules_to_save: cells trained and saved whole (a fresh head).

    Raises:
        InputError: a value is not allowed, or keys contradict each other.
    """

    mh_adapter: bool = False
    output_adapter: bool = True
    reduction_factor: float | dict[str | int, float] = 16
    non_linearity: str = "relu"
    original_ln_before: bool = True
    original_ln_after: bool = True
    ln_before: bool = False
    ln_after: bool = False
    init_weights: str = "bert"
    init_weights_seed: int | None = None
    is_parallel: bool = False
    scaling: float | str = 1.0
    use_gating: bool = False
    residual_before_ln: bool | str = True
    adapter_residual_before_ln: bool = False
    inv_adapter: str | None = None
    inv_adapter_reduction_factor: float | None = None
    cross_adapter: bool = False
    leave_out: list[int] = field(default_factory=list)
    dropout: float = 0.0
    phm_layer: bool = False
    phm_dim: int = 4
    factorized_phm_W: bool = True
    shared_W_phm: bool = False
    shared_phm_rule: bool = True
    factorized_phm_rule: bool = False
    phm_c_init: str = "normal"
    phm_init_range: float = 0.0001
    learn_phm: bool = True
    hypercomplex_nonlinearity: str = "glorot-uniform"
    phm_rank: int = 1
    phm_bias: bool = True
    stochastic_depth: float = 0.0
    modules_to_save: list[str] | None = None

    METHOD: ClassVar[PeftType] = PeftType.BOTTLENECK
    IN_PEFT: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        name_set(self.modules_to_save, "modules_to_save", allow_text=False)
        self.modules_to_save = add_task_heads(self.task_type, self.modules_to_save)
        for entry in fields(self):
            if entry.type == "bool":
                check_choice(entry.name, getattr(self, entry.name), (True, False))
        self._check_places()
        self._check_bottleneck()
        self._check_norms()
        if self.phm_layer:
            self._check_phm()

    def _check_places(self) -> None:
        if self.inv_adapter is not None:
            check_choice("inv_adapter", self.inv_adapter, ("nice",))
            _check_positive("inv_adapter_reduction_factor", self.inv_adapter_reduction_factor)
        elif self.inv_adapter_reduction_factor is not None:
            raise InputError("inv_adapter_reduction_factor needs inv_adapter")
        if self.cross_adapter:
            raise InputError("cross_adapter is not supported, since no model here has cross-attention")
        if not (self.mh_adapter or self.output_adapter):
            raise InputError("mh_adapter or output_adapter must be true: there would be no adapter")
        if not isinstance(self.leave_out or [], list | tuple):
            raise InputError(f"leave_out must be a list of layer indices, not {self.leave_out!r}")
        self.leave_out = list(self.leave_out or [])
        for layer in self.leave_out:
            check_count("leave_out's entries", layer, 0)

    def _check_bottleneck(self) -> None:
        if isinstance(self.reduction_factor, Mapping):
            self.reduction_factor = {str(layer): value for layer, value in self.reduction_factor.items()}
            for layer, value in self.reduction_factor.items():
                if not (layer.isascii() and layer.isdigit()) and layer != "default":
                    raise InputError(f'reduction_factor maps layer indices or "default", not {layer!r}')
                _check_positive(f"reduction_factor[{layer!r}]", value)
        else:
            _check_positive("reduction_factor", self.reduction_factor)
        self.non_linearity = str(self.non_linearity).lower()
        check_choice("non_linearity", self.non_linearity, NON_LINEARITIES)
        check_choice("init_weights", self.init_weights, ("bert", "mam_adapter", "houlsby"))
        if self.init_weights_seed is not None:
            check_count("init_weights_seed", self.init_weights_seed, 0)
        if isinstance(self.scaling, str):
            check_choice("scaling", self.scaling, ("learned", "channel", "a number"))
        else:
            check_number("scaling", self.scaling)
            self.scaling = float(self.scaling)
        if self.scaling in (0.0, "a number"):
            raise InputError('scaling must be "learned", "channel" or a number that is not 0')
        check_rate("dropout", self.dropout)
        check_rate("stochastic_depth", self.stochastic_depth)

    def _check_norms(self) -> None:
        check_choice("residual_before_ln", self.residual_before_ln, (True, False, "post_add"))
        if self.residual_before_ln == "post_add" and not (self.original_ln_before or self.is_parallel):
            raise InputError('residual_before_ln="post_add" needs original_ln_before')
        if self.is_parallel and self.stochastic_depth:
            raise InputError("stochastic_depth is for sequential adapters; leave it at 0 with is_parallel")

    def _check_phm(self) -> None:
        check_count("phm_dim", self.phm_dim)
        check_count("phm_rank", self.phm_rank)
        _check_positive("phm_init_range", self.phm_init_range)
        check_choice("phm_c_init", self.phm_c_init, ("normal", "uniform"))
        kinds = ("phm", "glorot-normal", "glorot-uniform", "normal")
        check_choice("hypercomplex_nonlinearity", self.hypercomplex_nonlinearity, kinds)
        if self.init_weights != "bert":
            raise InputError(f'init_weights must be "bert" with phm_layer, not {self.init_weights!r}')
        if self.shared_W_phm and not self.factorized_phm_W:
            raise InputError("shared_W_phm needs factorized_phm_W, in the library too")
        if self.shared_W_phm and isinstance(self.reduction_factor, Mapping):
            raise InputError("shared_W_phm needs one reduction_factor for all layers")

    def reduction_at(self, layer: int) -> float:
        """The reduction factor of a layer.

        Raises:
            InputError: ``reduction_factor`` is a map without that layer and without "default".
        """
        if not isinstance(self.reduction_factor, Mapping):
            return self.reduction_factor
        for key in (str(layer), "default"):
            if key in self.reduction_factor:
                return self.reduction_factor[key]
        raise InputError(f'reduction_factor has no entry for layer {layer}; add it, or one for "default"')

    def slot_classes(self, base: BaseModel) -> dict[str, type[Slot]]:
        places = halves(base.cells)
        self._check_layers({layer_of(path) for path in places})
        chosen = [
            path
            for path in places
            if layer_of(path) not in self.leave_out
            and (self.mh_adapter if follows_attention(path) else self.output_adapter)
        ]
        if not chosen:
            raise InputError("leave_out leaves no layer with an adapter")
        layout = Layout.of(self)
        kind = in_layout(CompacterLayer if self.phm_layer else BottleneckLayer, layout)
        shares = self.phm_layer and (self.shared_phm_rule or self.shared_W_phm)
        classes = ({"": SharedPhm} if shares else {}) | dict.fromkeys(chosen, kind)
        if self.inv_adapter:
            classes[self._embeddings(base)] = in_layout(InvertibleLayer, layout)
        return classes

    def _embeddings(self, base: BaseModel) -> str:
        """The path of the embeddings."""
        found = [path for path, cell in base.cells.items() if is_embeddings(cell)]
        if len(found) != 1:
            raise InputError("inv_adapter needs a model with one cell of embeddings, as BERT has")
        return found[0]

    def _check_layers(self, layers: set[int]) -> None:
        """Refuse layers that the model hasn't."""
        named = {"leave_out": self.leave_out}
        if isinstance(self.reduction_factor, Mapping):
            named["reduction_factor"] = [int(key) for key in self.reduction_factor if key != "default"]
        for key, wanted in named.items():
            unknown = sorted(set(wanted) - layers)
            if unknown:
                raise InputError(
                    f"{key} names layer {unknown[0]}; the model has layers {min(layers)} to {max(layers)}"
                )


def _check_positive(key: str, value: float) -> None:
    check_number(key, value)
    if value <= 0:
        raise InputError(f"{key} must be greater than 0, not {value!r}")
