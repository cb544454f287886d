"""Gradient checkpointing: the same losses and gradients, with every backbone and method, in less memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

import mindpeft
from mindpeft import get_peft_model
from mindpeft.device import setup_device
from mindpeft.errors import InputError
from mindpeft.models.bert import BertConfig, BertForSequenceClassification
from mindpeft.models.bloom import BloomConfig, BloomForCausalLM
from mindpeft.models.chatglm import ChatGLMConfig, ChatGLMForConditionalGeneration
from mindpeft.models.distilbert import DistilBertConfig, DistilBertForSequenceClassification
from mindpeft.models.gemma2 import Gemma2Config, Gemma2ForCausalLM
from mindpeft.models.gpt2 import GPT2Config, GPT2ForCausalLM
from mindpeft.models.llama import LlamaConfig, LlamaForCausalLM
from mindpeft.models.opt import OPTConfig, OPTForCausalLM
from mindpeft.models.roberta import RobertaConfig, RobertaForSequenceClassification
from mindpeft.nn.checkpointing import set_checkpointing
from mindpeft.ops.cpu.library import SWITCH
from mindpeft.ops.dropout import seed_dropout
from mindpeft.train.arguments import TrainingArguments
from mindpeft.train.trainer import Trainer
from tests.selection import default
from tests.train.small import SmallClassifier

ROOT = Path(__file__).parents[2]
VOCABULARY = 50
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "attention_dropout": 0.2}
_BERT = {**_SIZES, "intermediate_size": 48}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.2}
_OPT = {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.2}
_GLM = {"padded_vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
_GLM |= {"ffn_hidden_size": 48, "kv_channels": 8, "multi_query_group_num": 2, "attention_dropout": 0.2}

# Dropout is on in all of them.
BACKBONES = {
    "bert": (BertForSequenceClassification, BertConfig, _BERT),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, _BERT),
    "distilbert": (DistilBertForSequenceClassification, DistilBertConfig, _DISTILBERT),
    "gpt2": (GPT2ForCausalLM, GPT2Config, _GPT2),
    "llama": (LlamaForCausalLM, LlamaConfig, _LLAMA),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {**_LLAMA, "head_dim": 8, "sliding_window": 4}),
    "bloom": (BloomForCausalLM, BloomConfig, _BLOOM),
    "opt": (OPTForCausalLM, OPTConfig, _OPT),
    "chatglm": (ChatGLMForConditionalGeneration, ChatGLMConfig, _GLM),
}
# Of each way that a method reaches into a model: cells replaced, layers wrapped, tokens and keys in front,
# parameters shared by layers, random numbers of its own.
METHODS = {
    "lora": {"r": 4, "target_modules": "all-linear", "lora_dropout": 0.3},
    "ia3": {"target_modules": ["q_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True},
    "prompt_tuning": {"num_virtual_tokens": 3},
    "adaption_prompt": {"adapter_len": 3, "adapter_layers": 1},
    "vera": {"r": 4, "target_modules": ["q_proj"]},
    "vblora": {"r": 2, "num_vectors": 8, "vector_length": 8, "target_modules": ["q_proj", "v_proj"]},
    "loha": {"r": 2, "target_modules": ["q_proj"], "rank_dropout": 0.3},
    "seq_bn": {},
    "bitfit": {},
    "full": {},
}
_CONFIGS = {
    "lora": "LoraConfig",
    "ia3": "IA3Config",
    "prefix_tuning": "PrefixTuningConfig",
    "prompt_tuning": "PromptTuningConfig",
    "adaption_prompt": "AdaptionPromptConfig",
    "vera": "VeraConfig",
    "vblora": "VBLoRAConfig",
    "loha": "LoHaConfig",
    "seq_bn": "SeqBnConfig",
    "bitfit": "BitFitConfig",
    "full": "FullConfig",
}

pytestmark = pytest.mark.usefixtures("graph_mode")


def model_of(backbone: str, method: str = "lora") -> nn.Cell:
    """A small model with an adapter of random numbers, in training."""
    ms.set_seed(0)
    kind, config, keys = BACKBONES[backbone]
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = kind.from_config(config.from_dict({"model_type": config.model_type, **special, **keys}))
    task = "CAUSAL_LM" if "Causal" in kind.__name__ or "Generation" in kind.__name__ else "SEQ_CLS"
    options = getattr(mindpeft, _CONFIGS[method])(task_type=task, **METHODS[method])
    model = get_peft_model(model, options)
    random = np.random.default_rng(0)
    for parameter in model.trainable_params():
        if parameter.dtype == ms.float32:
            parameter.set_data(Tensor(random.normal(0, 0.1, parameter.shape).astype(np.float32)))
    model.set_train()
    return model


def loss_and_gradients(model: nn.Cell, causal: bool) -> list[np.ndarray]:
    ids = np.random.default_rng(1).integers(4, VOCABULARY, (2, 7)).astype(np.int32)
    mask = np.array([[1] * 7, [1] * 5 + [0] * 2], np.int32)
    labels = ids if causal else np.array([0, 1], np.int32)
    trained = ms.ParameterTuple(model.trainable_params())
    seed_dropout(model, 3)

    def loss(input_ids, attention_mask, labels):
        return model(input_ids, attention_mask=attention_mask, labels=labels)[0]

    step = Gradients(loss, trained)
    found, gradients = step(Tensor(ids), Tensor(mask), Tensor(labels))
    return [found.asnumpy(), *(gradient.asnumpy() for gradient in gradients)]


class Gradients(nn.Cell):
    """The loss and its gradients in one graph."""

    def __init__(self, loss, trained: ms.ParameterTuple):
        super().__init__(auto_prefix=False)
        self.both = ms.value_and_grad(loss, None, weights=trained)

    def construct(self, *batch):
        return self.both(*batch)


def assert_same(model: nn.Cell, causal: bool) -> None:
    expected = loss_and_gradients(model, causal)
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    found = loss_and_gradients(model, causal)
    assert any(np.abs(gradient).max() > 0 for gradient in found[1:])
    for mine, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize("backbone", default(BACKBONES, "bert", "llama", "gemma2"))
def test_backbones(backbone):
    """LoRA on frozen embeddings; the second pass drops what the first one dropped."""
    assert_same(model_of(backbone), causal=backbone not in ("bert", "roberta", "distilbert"))


@pytest.mark.parametrize(
    "method", default([name for name in METHODS if name != "lora"], "prefix_tuning", "vblora", "seq_bn")
)
def test_methods(method):
    encoder = method in ("seq_bn", "bitfit")
    assert_same(model_of("bert" if encoder else "llama", method), causal=not encoder)


def test_operator_by_operator_it_has_no_effect(pynative, caplog):
    model = model_of("llama")
    model.gradient_checkpointing_enable()
    assert "no effect in PyNative" in caplog.text
    assert np.isfinite(loss_and_gradients(model, causal=True)[0])
    with pytest.raises(InputError, match="gradient_checkpointing needs jit"):
        TrainingArguments("out", gradient_checkpointing=True, jit=False)


@pytest.mark.slow
def test_without_kernels():
    """MindSpore's own operators give the same, dropout too."""
    steps = "setup_device('CPU'); assert_same(model_of('llama'), True)"
    code = f"from tests.train.test_checkpointing import *; {steps}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {SWITCH: "0"}, check=True)


def test_less_memory():
    """Of eight layers, in a process of its own each."""
    usual, less = (peak(on) for on in (False, True))
    assert less < 0.75 * usual


def peak(checkpointing: bool) -> float:
    """What one step takes beside the model, in GB."""
    code = "from tests.train.test_checkpointing import *; step_of_eight_layers(%s)"
    done = subprocess.run(
        [sys.executable, "-c", code % checkpointing], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[-1])


def step_of_eight_layers(checkpointing: bool) -> None:
    """Print how much higher the process's peak is behind a step than its memory before."""
    setup_device("CPU")
    config = LlamaConfig.from_dict(
        {
            **_LLAMA,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "attention_dropout": 0,
        }
    )
    model = get_peft_model(LlamaForCausalLM.from_config(config), mindpeft.LoraConfig(**METHODS["lora"]))
    model.set_train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    ids = Tensor(np.ones((1, 2048), np.int32))

    def loss(ids):
        return model(ids, labels=ids)[0]

    step = Gradients(loss, ms.ParameterTuple(model.trainable_params()))
    before = status("VmRSS")
    step(ids)[0].asnumpy()
    print(status("VmHWM") - before)


def status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e6 for line in lines if line.startswith(f"{name}:"))


def test_the_trainer_takes_it(tmp_path):
    arguments = TrainingArguments(str(tmp_path), gradient_checkpointing=True, max_steps=1, progress=False)
    ids = np.arange(8).tolist()
    model = model_of("llama")
    Trainer(model, arguments, [{"input_ids": ids, "labels": ids}] * 2).train()
    assert model.is_gradient_checkpointing
    with pytest.raises(InputError, match="no layers for gradient checkpointing"):
        set_checkpointing(SmallClassifier(), True)
