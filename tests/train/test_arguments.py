from __future__ import annotations

import pytest

from mindpeft.errors import InputError
from mindpeft.train import TrainingArguments

BAD = [
    ({"num_train_epochs": 0}, "num_train_epochs must be greater than 0, not 0"),
    ({"num_train_epochs": "three"}, "num_train_epochs must be a number, not 'three'"),
    ({"max_steps": 0}, "max_steps must be positive, or -1 for none"),
    ({"max_steps": 2.5}, "max_steps must be a whole number"),
    ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
    ({"per_device_eval_batch_size": True}, "per_device_eval_batch_size must be a whole number, not True"),
    ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1"),
    ({"learning_rate": 0.0}, "learning_rate must be greater than 0"),
    ({"learning_rate": float("nan")}, "learning_rate must be a number, not nan"),
    ({"learning_rate": None}, "learning_rate must have a value"),
    ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
    ({"adam_beta1": 1.0}, r"adam_beta1 must be in \[0, 1\)"),
    ({"adam_beta2": 2}, r"adam_beta2 must be in \[0, 1\)"),
    ({"adam_epsilon": 0}, "adam_epsilon must be greater than 0"),
    ({"max_grad_norm": -1}, "max_grad_norm must be at least 0"),
    ({"lr_scheduler_type": "linaer"}, "linear, cosine, constant, not 'linaer'; did you mean 'linear'"),
    ({"warmup_ratio": 6}, r"warmup_ratio must be in \[0, 1\]"),
    ({"warmup_steps": -1}, "warmup_steps must be at least 0"),
    ({"logging_steps": 0}, "logging_steps must be at least 1"),
    ({"eval_strategy": "epochs"}, "did you mean 'epoch'"),
    ({"save_strategy": "step"}, "did you mean 'steps'"),
    ({"save_total_limit": 0}, "save_total_limit must be at least 1"),
    ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
    (
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "no"},
        "load_best_model_at_end needs checkpoints",
    ),
    ({"early_stopping_patience": 3}, "early_stopping_patience needs evaluations"),
    ({"seed": -1}, "seed must be from 0"),
    ({"device": "TPU"}, "device must be one of auto, Ascend, GPU, CPU"),
    ({"jit": "yes"}, "jit must be true or false"),
    ({"max_length": 0}, "max_length must be at least 1"),
    ({"output_dir": ""}, "output_dir must name a folder"),
]


@pytest.mark.parametrize(("values", "message"), BAD)
def test_each_wrong_value_is_one_clear_error(values, message):
    with pytest.raises(InputError, match=message) as caught:
        TrainingArguments(**{"output_dir": "out", **values})
    assert "\n" not in str(caught.value)


def test_defaults_that_depend_on_others():
    args = TrainingArguments("out", logging_steps=7, eval_strategy="steps")
    assert (args.eval_steps, args.metric_for_best_model, args.greater_is_better) == (7, "loss", False)
    assert TrainingArguments("out", metric_for_best_model="f1_macro").greater_is_better is True
    assert TrainingArguments("out", warmup_ratio=0.06).get_warmup_steps(101) == 7
    assert TrainingArguments("out", warmup_ratio=0.06, warmup_steps=2).get_warmup_steps(101) == 2
