"""From the logits of the next token to a token: penalties, filters, draws.

The order of the steps is Hugging Face's: penalties, the least length, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import numpy as np

from mindpeft.generate.config import GenerationConfig

_NEVER = -np.inf


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Of the last axis."""
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


class Chooser:
    """Chooses tokens as a config says.

    Args:
        config: how.
        prompts: (rows, length) tokens.
        real: (rows, length), whether a token of a prompt is no padding.
    """

    def __init__(self, config: GenerationConfig, prompts: np.ndarray, real: np.ndarray) -> None:
        self.config = config
        seed = np.random.randint(2**31) if config.seed is None else config.seed
        self.random = np.random.default_rng(seed)
        self.prompts, self.real = prompts, real

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is all that is asked for."""
        config = self.config
        return not (
            config.do_sample
            or config.min_new_tokens
            or config.repetition_penalty != 1
            or config.presence_penalty
        )

    def processed(self, scores: np.ndarray, written: np.ndarray) -> np.ndarray:
        """Scores after penalties and, for draws, filters.

        Args:
            scores: (rows, vocabulary) logits or log-probabilities; kept as they are.
            written: (rows, tokens) written so far.
        """
        config, scores = self.config, scores.astype(np.float32, copy=True)
        for row in range(len(scores)):
            if config.repetition_penalty != 1:
                seen = np.union1d(self.prompts[row][self.real[row]], written[row])
                values = scores[row, seen]
                penalty = config.repetition_penalty
                scores[row, seen] = np.where(values < 0, values * penalty, values / penalty)
            if config.presence_penalty:
                scores[row, np.unique(written[row])] -= config.presence_penalty
        if written.shape[1] < config.min_new_tokens:
            scores[:, list(config.ends)] = _NEVER
        return self.filtered(scores) if config.do_sample else scores

    def filtered(self, scores: np.ndarray) -> np.ndarray:
        """Scores with those of tokens that are not to be drawn at minus infinity."""
        config = self.config
        if config.temperature != 1:
            scores = scores / np.float32(config.temperature)
        if 0 < config.top_k < scores.shape[-1]:
            least = np.partition(scores, -config.top_k, -1)[:, -config.top_k][:, None]
            scores = np.where(scores < least, _NEVER, scores)
        if config.top_p < 1:
            scores = self.nucleus(scores)
        if config.min_p:
            least = scores.max(-1, keepdims=True) + np.log(config.min_p)
            scores = np.where(scores < least, _NEVER, scores)
        return scores

    def nucleus(self, scores: np.ndarray) -> np.ndarray:
        """Only the likeliest tokens that have ``top_p`` of the probability (Holtzman et al., 2020)."""
        order = np.argsort(scores, -1, kind="stable")
        ascending = np.exp(log_softmax(np.take_along_axis(scores, order, -1)))
        removed = np.cumsum(ascending, -1) <= 1 - self.config.top_p
        removed[:, -1] = False
        mask = np.empty_like(removed)
        np.put_along_axis(mask, order, removed, -1)
        return np.where(mask, _NEVER, scores)

    def next_tokens(self, scores: np.ndarray, written: np.ndarray) -> np.ndarray:
        """One token for each row; the arguments are those of `processed`."""
        return self.pick(self.processed(scores, written), 1)[:, 0]

    def pick(self, scores: np.ndarray, count: int) -> np.ndarray:
        """(rows, count) different tokens: the likeliest in falling order, or drawn."""
        if not self.config.do_sample:
            return (
                np.argsort(-scores, -1, kind="stable")[:, :count] if count > 1 else scores.argmax(-1)[:, None]
            )
        # The largest of log-probabilities with Gumbel noise are draws without replacement.
        noisy = scores + self.random.gumbel(size=scores.shape)
        if count == 1:
            return noisy.argmax(-1)[:, None]
        return np.argsort(-noisy, -1, kind="stable")[:, :count]
