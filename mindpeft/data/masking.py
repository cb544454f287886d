"""Random masks for masked language modelling, new in each epoch (BERT, arXiv:1810.04805, section 3.1)."""

from __future__ import annotations

import numpy as np

from mindpeft.data.batching import IGNORE_INDEX, Batch
from mindpeft.data.tokenization import Tokenizer
from mindpeft.errors import InputError


class TokenMasker:
    """Chooses tokens to predict: 80 % become the mask token, 10 % a random token, 10 % stay.

    Give it to ``BucketBatcher`` as ``transform``: the choice then depends on (seed, epoch, batch) alone.
    """

    def __init__(self, tokenizer: Tokenizer, probability: float = 0.15):
        """
        Args:
            tokenizer: the model's tokenizer; its special tokens are never chosen.
            probability: share of the tokens to predict, between 0 and 1.

        Raises:
            InputError: the tokenizer has no mask token, or ``probability`` is out of range.
        """
        if tokenizer.mask_token_id is None:
            raise InputError("masked language modelling needs a tokenizer with a mask token")
        if not 0 < probability < 1:
            raise InputError(f"the masking probability must lie between 0 and 1, not {probability}")
        self._probability = probability
        self._mask = tokenizer.mask_token_id
        self._special = np.array(tokenizer.all_special_ids)
        self._ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), self._special)

    def __call__(self, batch: Batch, generator: np.random.Generator) -> Batch:
        """The batch with masked ``input_ids`` and ``labels``: the old id where chosen, -100 elsewhere."""
        ids = batch["input_ids"]
        chosen = generator.random(ids.shape) < self._probability
        chosen &= (batch["attention_mask"] == 1) & ~np.isin(ids, self._special)
        fate = generator.random(ids.shape)
        masked = np.where(chosen & (fate < 0.8), self._mask, ids)
        at_random = generator.choice(self._ordinary, ids.shape)
        masked = np.where(chosen & (fate >= 0.9), at_random, masked)
        labels = np.where(chosen, ids, IGNORE_INDEX)
        return batch | {"input_ids": masked.astype(np.int32), "labels": labels.astype(np.int32)}
