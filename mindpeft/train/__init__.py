"""Training: the Trainer, its arguments, the compiled step, metrics and callbacks."""

from mindpeft.train.arguments import TrainingArguments
from mindpeft.train.callbacks import TrainerCallback, TrainerControl, TrainerState
from mindpeft.train.evaluation import PredictionOutput
from mindpeft.train.interrupt import TrainingInterrupted
from mindpeft.train.metrics import EvalPrediction
from mindpeft.train.trainer import NonFiniteLossError, Trainer, TrainOutput

__all__ = [
    "EvalPrediction",
    "NonFiniteLossError",
    "PredictionOutput",
    "TrainOutput",
    "Trainer",
    "TrainerCallback",
    "TrainerControl",
    "TrainerState",
    "TrainingArguments",
    "TrainingInterrupted",
]
