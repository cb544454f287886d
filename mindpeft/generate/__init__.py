"""Writing text with a decoder: greedy, sampled or by beams, over a cache of fixed size."""

from mindpeft.generate.config import GenerationConfig
from mindpeft.generate.streaming import TextStreamer
from mindpeft.generate.text import generate, rows_per_prompt

__all__ = ["GenerationConfig", "TextStreamer", "generate", "rows_per_prompt"]
