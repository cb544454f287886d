"""A model that writes, as files that MindSpore alone runs: two MindIR graphs and a script."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mindpeft.errors import InputError
from mindpeft.generate import mindir_script
from mindpeft.generate.session import PromptStep, Session, TokenStep, virtual_tokens
from mindpeft.generate.text import check_room, default_config, filler_of
from mindpeft.ops.cpu.library import without_kernels

SETTINGS_NAME, SCRIPT_NAME = "settings.json", "generate.py"


class _Prefill(PromptStep):
    """Returns what it wrote into the caches too: each MindIR graph has parameters of its own."""

    def construct(self, input_ids, attention_mask, position_ids):
        logits, _ = super().construct(input_ids, attention_mask, position_ids)
        written = ()
        for cache in self.caches:
            written = (*written, cache.keys.value(), cache.values.value())
        return (logits, *written)


class _Decode(TokenStep):
    """Goes on in caches that it holds itself."""

    def construct(self, input_ids, attention_mask, position_ids, place):
        return super().construct(input_ids, attention_mask, position_ids, place)[0]


def export_mindir(
    model: nn.Cell, folder: Path, *, rows: int = 1, prompt: int = 128, new_tokens: int = 128
) -> None:
    """Write ``prefill.mindir``, ``decode.mindir``, their settings, and a script that runs them.

    The script needs mindspore, numpy and tokenizers, not mindpeft. Weights stand in both graphs' files.

    Args:
        model: a decoder for the next token; adapters in it are exported as they are.
        folder: an existing one.
        rows: of a batch; a graph has one shape.
        prompt: most tokens of a prompt; shorter ones are padded on the left.
        new_tokens: most tokens written behind it.

    Raises:
        InputError: the model is no decoder, or has no room for the text.
    """
    if min(rows, prompt, new_tokens) < 1:
        raise InputError("rows, prompt and new_tokens must be at least 1")
    room = prompt + new_tokens
    session = Session(model.set_train(False), rows, prompt, room + virtual_tokens(model))
    check_room(model, room)
    one = np.ones((rows, prompt), np.int32)
    prompts = [Tensor(one), Tensor(one), Tensor(np.cumsum(one, 1, dtype=np.int32) - 1)]
    token = [Tensor(np.ones((rows, size), np.int32)) for size in (1, room, 1)]
    with without_kernels(model), session.attached():
        ms.export(
            _Prefill(model, session.caches).set_train(False),
            *prompts,
            file_name=str(folder / "prefill"),
            file_format="MINDIR",
        )
        ms.export(
            _Decode(model, session.caches).set_train(False),
            *token,
            Tensor([prompt], ms.int32),
            file_name=str(folder / "decode"),
            file_format="MINDIR",
        )
    config = default_config(model)
    settings = {
        "rows": rows,
        "prompt": prompt,
        "room": room,
        "caches": [parameter.name for cache in session.caches for parameter in (cache.keys, cache.values)],
        "ends": list(config.ends),
        "pad": filler_of(config),
    }
    (folder / SETTINGS_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(mindir_script.__file__, folder / SCRIPT_NAME)
