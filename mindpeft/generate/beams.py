"""Beam search as Hugging Face's ``generate`` does it, so that the same texts come out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mindpeft.generate.choose import Chooser, log_softmax
from mindpeft.generate.config import GenerationConfig
from mindpeft.generate.session import Session

_WORST = np.float32(-1e9)


class BeamSearch:
    """Follows several texts for each prompt, and keeps the best that ended.

    Args:
        config: how.
        prompts: how many.
        most: new tokens at most.
        filler: the token behind the end.
        ended: tells of texts, (rows, tokens written), which end with their last token.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompts: int,
        most: int,
        filler: int,
        ended: Callable[[np.ndarray], np.ndarray],
    ) -> None:
        self.config, self.most, self.ended = config, most, ended
        self.beams = config.num_beams
        self.candidates = max(2, 1 + len(config.ends)) * self.beams
        shape = (prompts, self.beams)
        self.running = np.full((*shape, most), filler, np.int64)
        self.scores = np.full(shape, _WORST, np.float32)
        self.scores[:, 0] = 0  # the beams of a prompt are the same at first: only one of them counts
        self.finished = self.running.copy()
        self.lengths = np.zeros(shape, np.int64)
        self.finished_scores = np.full(shape, _WORST, np.float32)
        self.is_finished = np.zeros(shape, bool)
        self.can_improve = np.ones((prompts, 1), bool)
        self.written = 0

    def advance(self, chooser: Chooser, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Take one step.

        Args:
            chooser: processes log-probabilities.
            logits: (prompts * beams, vocabulary).

        Returns:
            The tokens that the beams go on with, and of which row of before each is the continuation; both
            (prompts * beams,).
        """
        prompts, beams = self.scores.shape
        flat = self.running[:, :, : self.written].reshape((prompts * beams, -1))
        found = chooser.processed(log_softmax(logits.astype(np.float32)), flat)
        total = (found.reshape((prompts, beams, -1)) + self.scores[:, :, None]).reshape((prompts, -1))
        vocabulary = logits.shape[-1]
        best = chooser.pick(total, self.candidates)
        scores = np.take_along_axis(total, best, 1)
        parents, tokens = best // vocabulary, best % vocabulary
        texts = np.take_along_axis(self.running, parents[:, :, None], 1)
        texts[:, :, self.written] = tokens
        self.written += 1
        ends = self.ended(texts[:, :, : self.written].reshape((prompts * self.candidates, -1)))
        ends = ends.reshape((prompts, self.candidates)) | (self.written == self.most)
        going_on = scores + ends * _WORST
        kept = np.argsort(-going_on, 1, kind="stable")[:, :beams]
        self.finish(texts, scores, ends)
        self.running = np.take_along_axis(texts, kept[:, :, None], 1)
        self.scores = np.take_along_axis(going_on, kept, 1)
        self.note_hope()
        self.all_ended = bool(ends.all())
        parents = np.take_along_axis(parents, kept, 1) + np.arange(prompts)[:, None] * beams
        return np.take_along_axis(tokens, kept, 1).reshape(-1), parents.reshape(-1)

    def finish(self, texts: np.ndarray, scores: np.ndarray, ends: np.ndarray) -> None:
        """Keep texts that ended just now if they are better than those kept."""
        ends = ends & (np.arange(self.candidates) < self.beams)
        scores = scores / np.float32(self.written**self.config.length_penalty)
        full = self.is_finished.all(1, keepdims=True) & (self.config.early_stopping is True)
        scores = scores + (full.astype(np.float32) + ~self.can_improve + ~ends) * _WORST
        lengths = np.full(scores.shape, self.written)
        merged = np.concatenate((self.finished_scores, scores), 1)
        best = np.argsort(-merged, 1, kind="stable")[:, : self.beams]
        self.finished = np.take_along_axis(np.concatenate((self.finished, texts), 1), best[:, :, None], 1)
        self.lengths = np.take_along_axis(np.concatenate((self.lengths, lengths), 1), best, 1)
        self.finished_scores = np.take_along_axis(merged, best, 1)
        self.is_finished = np.take_along_axis(np.concatenate((self.is_finished, ends), 1), best, 1)

    def note_hope(self) -> None:
        """Work out which prompts' running texts can still beat those that ended."""
        penalty = self.config.length_penalty
        longest = self.config.early_stopping == "never" and penalty > 0
        possible = self.scores[:, :1] / np.float32((self.most if longest else self.written) ** penalty)
        worst = np.where(self.is_finished, self.finished_scores.min(1, keepdims=True), _WORST)
        self.can_improve = self.can_improve & (possible > worst).any(1, keepdims=True)

    @property
    def is_done(self) -> bool:
        """Whether nothing better can come."""
        enough = self.is_finished.all() and self.config.early_stopping is True
        return not self.can_improve.any() or bool(enough) or self.all_ended

    def results(self) -> np.ndarray:
        """The best texts of every prompt, (prompts * num_return_sequences, tokens)."""
        count = self.config.num_return_sequences
        texts = self.finished[:, :count].reshape((-1, self.most))
        return texts[:, : self.lengths[:, :count].max()]


def search(
    session: Session, search_state: BeamSearch, chooser: Chooser, tokens: np.ndarray, real: np.ndarray
) -> np.ndarray:
    """Run a beam search; prompts are repeated for each beam."""
    logits = session.read_prompts(tokens, real)[0].asnumpy()
    while True:
        following, parents = search_state.advance(chooser, logits)
        if search_state.is_done:
            return search_state.results()
        if (parents != np.arange(len(parents))).any():
            session.reorder(parents)
        logits = session.read_tokens(following)[0].asnumpy()
