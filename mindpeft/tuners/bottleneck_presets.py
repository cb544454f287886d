"""The bottleneck adapters of the literature, by the names that AdapterHub's library gives them."""

from __future__ import annotations

from dataclasses import dataclass

from mindpeft.tuners.bottleneck import BottleneckConfig


@dataclass
class SeqBnConfig(BottleneckConfig):
    """Pfeiffer et al. 2020: one adapter in each layer, behind the feed-forward half."""


@dataclass
class SeqBnInvConfig(SeqBnConfig):
    """Pfeiffer et al. 2020 (MAD-X), for languages: with an invertible adapter behind the embeddings."""

    inv_adapter: str | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclass
class DoubleSeqBnConfig(BottleneckConfig):
    """Houlsby et al. 2019: two adapters in each layer."""

    mh_adapter: bool = True
    original_ln_before: bool = False
    non_linearity: str = "swish"


@dataclass
class DoubleSeqBnInvConfig(DoubleSeqBnConfig):
    """Houlsby et al. 2019, with an invertible adapter behind the embeddings."""

    inv_adapter: str | None = "nice"
    inv_adapter_reduction_factor: float | None = 2


@dataclass
class ParBnConfig(BottleneckConfig):
    """He et al. 2021: an adapter beside the feed-forward half."""

    reduction_factor: float | dict[str | int, float] = 2
    original_ln_before: bool = False
    init_weights: str = "mam_adapter"
    is_parallel: bool = True
    scaling: float | str = 4.0


@dataclass
class ScaledParBnConfig(ParBnConfig):
    """He et al. 2021, with a learned scaling."""

    scaling: float | str = "learned"


@dataclass
class CompacterPlusPlusConfig(SeqBnConfig):
    """Mahabadi et al. 2021: Kronecker products behind the feed-forward half."""

    phm_layer: bool = True
    reduction_factor: float | dict[str | int, float] = 32
    non_linearity: str = "gelu"


@dataclass
class CompacterConfig(DoubleSeqBnConfig):
    """Mahabadi et al. 2021: Kronecker products behind both halves."""

    phm_layer: bool = True
    reduction_factor: float | dict[str | int, float] = 32
    non_linearity: str = "gelu"


@dataclass
class AdapterPlusConfig(BottleneckConfig):
    """Steitz and Roth 2024: an adapter behind the original norm, scaled feature by feature."""

    reduction_factor: float | dict[str | int, float] = 96
    non_linearity: str = "gelu"
    original_ln_after: bool = False
    residual_before_ln: bool | str = False
    init_weights: str = "houlsby"
    scaling: float | str = "channel"
    stochastic_depth: float = 0.1


# The library's names, former ones first.
BottleneckConfig.PRESETS = {
    "pfeiffer": SeqBnConfig,
    "houlsby": DoubleSeqBnConfig,
    "parallel": ParBnConfig,
    "scaled_parallel": ScaledParBnConfig,
    "pfeiffer+inv": SeqBnInvConfig,
    "houlsby+inv": DoubleSeqBnInvConfig,
    "seq_bn": SeqBnConfig,
    "double_seq_bn": DoubleSeqBnConfig,
    "seq_bn_inv": SeqBnInvConfig,
    "double_seq_bn_inv": DoubleSeqBnInvConfig,
    "par_bn": ParBnConfig,
    "scaled_par_bn": ScaledParBnConfig,
    "compacter": CompacterConfig,
    "compacter++": CompacterPlusPlusConfig,
    "adapter_plus": AdapterPlusConfig,
}
