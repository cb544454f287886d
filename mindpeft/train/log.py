"""``train_log.jsonl``: one JSON object per logged step and per evaluation."""

from __future__ import annotations

import json
from pathlib import Path

from mindpeft.files import atomic_write
from mindpeft.train.callbacks import TrainerCallback

LOG_FILE = "train_log.jsonl"


class LogFileCallback(TrainerCallback):
    """Writes each line as it comes. A resumed run starts from the lines that its checkpoint knows."""

    def __init__(self) -> None:
        self.path: Path | None = None  # known when a run begins; evaluation alone writes no file

    def on_train_begin(self, args, state, control, **kwargs):
        self.path = Path(args.output_dir) / LOG_FILE
        with atomic_write(self.path, "w") as file:
            file.writelines(_line(logs) for logs in state.log_history)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(_line(logs))


def _line(logs: dict) -> str:
    return json.dumps(logs, ensure_ascii=False) + "\n"
