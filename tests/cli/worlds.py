"""Damaged checkpoints and other bad inputs for the tests of errors."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

from tests.cli.conftest import topic_rows, write_csv, write_recipe

WEIGHTS = "model.safetensors"


class World:
    """A folder of a test's own, with copies of what it may damage."""

    def __init__(self, folder: Path, bert: Path, data: Path, run: Path):
        self.folder, self.data = folder, data
        self.bert = Path(shutil.copytree(bert, folder / "bert"))
        self.run = Path(shutil.copytree(run, folder / "run"))

    def train(self, *overrides: object, **sections: str) -> list[object]:
        """The arguments of a training that would work but for what is given."""
        recipe = write_recipe(self.folder / "r.yaml", self.bert, self.data, self.folder / "out", **sections)
        return ["train", recipe, *overrides]

    def file(self, name: str, content: str | bytes) -> Path:
        """A file of this content."""
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def csv(self, *rows: tuple[str, ...], header: tuple[str, ...] = ("text", "label")) -> Path:
        """A CSV of 4 good rows and then these: the first of them stands on line 6."""
        good = [("some text",) * (len(header) - 2) + row for row in topic_rows(4)]
        return write_csv(self.folder / "bad.csv", [*good, *rows], header)

    def edit_config(self, **changes: object) -> None:
        """Change keys of the base model's config.json."""
        path = self.bert / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def truncate_weights(self) -> None:
        """Cut the weights in half, as a broken download does."""
        path = self.bert / WEIGHTS
        os.truncate(path, path.stat().st_size // 2)

    def corrupt_header(self) -> None:
        """Make the weights' header no JSON."""
        path = self.bert / WEIGHTS
        content = bytearray(path.read_bytes())
        content[8:40] = b"\xff" * 32
        path.write_bytes(content)

    def index(self, shard: str) -> None:
        """Replace the weights by an index that names one shard."""
        (self.bert / WEIGHTS).rename(self.bert / "model-00001-of-00002.safetensors")
        weight_map = {
            "bert.embeddings.word_embeddings.weight": "model-00001-of-00002.safetensors",
            "bert.encoder.layer.0.output.dense.weight": shard,
        }
        (self.bert / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def malicious_bin(self) -> Path:
        """Replace the weights by a pytorch_model.bin whose pickle would make the file ``owned``."""
        (self.bert / WEIGHTS).unlink()
        path = self.bert / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(_Exploit(self.folder / "owned"), protocol=2))
            archive.writestr("archive/version", "3\n")
        return path


class _Exploit:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)
