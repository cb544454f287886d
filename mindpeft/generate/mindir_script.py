"""Writes text with an exported model, by MindSpore alone.

    python generate.py "Once upon a time"
    python generate.py "Once upon a time" --new-tokens 50 --temperature 0.8 --seed 1

Needs mindspore, numpy and tokenizers. The folder holds prefill.mindir, decode.mindir, settings.json and
tokenizer.json; as a module, `Writer` writes token ids.
"""

import argparse
import json
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn


class Writer:
    """The two graphs of a folder."""

    def __init__(self, folder):
        folder = Path(folder)
        self.settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        self.prefill = nn.GraphCell(ms.load(str(folder / "prefill.mindir")))
        self.decode = nn.GraphCell(ms.load(str(folder / "decode.mindir")))
        held = {parameter.name: parameter for parameter in self.decode.get_parameters()}
        self.caches = [held[name] for name in self.settings["caches"]]

    def write(self, prompts, new_tokens, temperature=0.0, seed=None):
        """Lists of token ids to lists of new token ids; the likeliest tokens at temperature 0."""
        rows, prompt, room = (self.settings[key] for key in ("rows", "prompt", "room"))
        longest, most = max(map(len, prompts)), room - prompt
        if len(prompts) != rows or not 0 < longest <= prompt or not 0 < new_tokens <= most:
            raise SystemExit(
                f"these graphs take {rows} prompts of at most {prompt} tokens and write at most {most}"
            )
        tokens = np.full((rows, prompt), self.settings["pad"], np.int32)
        real = np.zeros((rows, prompt), np.int32)
        for row, ids in enumerate(prompts):
            tokens[row, prompt - len(ids) :], real[row, prompt - len(ids) :] = ids, 1
        positions = np.maximum(np.cumsum(real, 1) - 1, 0).astype(np.int32)
        mask = Tensor(np.concatenate((real, np.ones((rows, most), np.int32)), 1))
        logits, *written = self.prefill(Tensor(tokens), Tensor(real), Tensor(positions))
        for cache, value in zip(self.caches, written, strict=True):
            cache.copy_(value)
        random, ended = np.random.default_rng(seed), np.zeros(rows, bool)
        result = [[] for _ in range(rows)]
        for step in range(new_tokens):
            scores = logits.asnumpy().astype(np.float64)
            if temperature > 0:
                scores = scores / temperature + random.gumbel(size=scores.shape)
            chosen = scores.argmax(-1)
            for row in np.flatnonzero(~ended):
                result[row].append(int(chosen[row]))
            ended |= np.isin(chosen, self.settings["ends"])
            if ended.all() or step + 1 == new_tokens:
                break
            here = (real.sum(1) + step).astype(np.int32).reshape((-1, 1))
            place = Tensor(np.array([prompt + step], np.int32))
            logits = self.decode(Tensor(chosen.astype(np.int32).reshape((-1, 1))), mask, Tensor(here), place)
        return result


def main():
    from tokenizers import Tokenizer

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    folder = Path(__file__).resolve().parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    writer = Writer(folder)
    room = writer.settings["room"] - writer.settings["prompt"]
    prompts = [tokenizer.encode(text).ids for text in options.prompts]
    for ids in writer.write(prompts, options.new_tokens or room, options.temperature, options.seed):
        print(tokenizer.decode(ids))


if __name__ == "__main__":
    main()
