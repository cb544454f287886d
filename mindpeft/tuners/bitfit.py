"""BitFit: the biases that a model has are trained, and nothing else.

Ben Zaken, Goldberg and Ravfogel 2022, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based
Masked Language-models". Hugging Face PEFT has no such method; the adapter's folder has PEFT's shape all the
same. Its tensors are the trained biases' values (not differences), named as PEFT names base parameters:

base_model.model.<path>.bias               (features,)
base_model.model.<saved cell>.<parameter>  with ``modules_to_save``

Without the prefix "base_model.model." the file is a patch for the full model's checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mindpeft.config import PeftType, register_method
from mindpeft.tuners.selection import SelectionConfig


@register_method
@dataclass
class BitFitConfig(SelectionConfig):
    """BitFit's configuration.

    Attributes:
        target_modules: only the biases of these cells (and of all inside them), or these biases: names or
            dotted suffixes, or a regular expression for the full path; ``None`` for every bias.
        exclude_modules: cells and biases left frozen, given the same way.
        modules_to_save: cells trained and saved whole besides (a fresh head).

    Raises:
        InputError: a value is not allowed; for a model, that nothing is left to train.
    """

    METHOD: ClassVar[PeftType] = PeftType.BITFIT
    IN_PEFT: ClassVar[bool] = False
    SUBJECT: ClassVar[str] = "biases"

    def suits(self, name: str) -> bool:
        leaf = name.rpartition(".")[2]
        return leaf == "bias" or leaf.endswith("_bias")
