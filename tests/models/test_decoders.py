"""The decoders against transformers: logits, losses, heads, masks, gradients, files."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import Tensor
from safetensors.torch import load_file

from mindpeft import PeftModel
from mindpeft import models as our_models
from mindpeft.errors import InputError
from mindpeft.models import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from mindpeft.train.step import EvalStep
from tests.models.decoders import (
    ARCHITECTURES,
    CASES,
    PAD,
    VOCABULARY,
    make_decoder,
    make_texts,
    train_both,
)
from tests.models.reference import absolute_error, relative_error, run_ours, run_theirs, to_numpy

HEADS = ("SequenceClassification", "TokenClassification")
# By default some are compiled; the slow run has every architecture and odd feature.
COMPILED = [
    pytest.param(name, marks=() if name in ("llama_yarn", "gpt2", "bloom", "gemma3") else pytest.mark.slow)
    for name in CASES
]


def scaled_error(found, expected: torch.Tensor, mask: np.ndarray | None = None) -> float:
    """Relative to the largest logit, if that is more than 1; of the tokens in the mask.

    What stands for padding that sees nothing but padding differs between the architectures of transformers.
    """
    found, expected = to_numpy(found), to_numpy(expected)
    if mask is not None:
        found, expected = found[mask == 1], expected[mask == 1]
    return absolute_error(found, expected) / max(1.0, float(np.abs(expected).max()))


def labels_of(batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.where(batch["attention_mask"], batch["input_ids"], -100).astype(np.int32)


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", CASES)
def test_logits_and_loss(tmp_path, name):
    theirs = make_decoder(name, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not ours.load_report.unused
    assert not ours.load_report.newly_initialised
    batch = make_texts()
    labels = labels_of(batch)
    expected = run_theirs(theirs, **batch, labels=labels)
    loss, logits = run_ours(ours, **batch, labels=labels)
    assert scaled_error(logits, expected.logits, batch["attention_mask"]) <= 1e-5
    assert absolute_error(loss, expected.loss) <= 1e-5


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize("name", COMPILED)
def test_logits_compiled(tmp_path, name):
    theirs = make_decoder(name, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    batch = make_texts()
    expected = run_theirs(theirs, **batch).logits
    assert scaled_error(run_ours(ours, **batch), expected, batch["attention_mask"]) <= 1e-5


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "opt", "gemma3", "mistral"])
def test_masks_and_embeddings(tmp_path, name):
    theirs, ours = make_decoder(name, tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    left = make_texts(left=True)
    expected = run_theirs(theirs, **left).logits
    assert scaled_error(run_ours(ours, **left), expected, left["attention_mask"]) <= 1e-5
    ids = left["input_ids"]
    assert scaled_error(run_ours(ours, input_ids=ids), run_theirs(theirs, input_ids=ids).logits) <= 1e-5
    words = ours.get_input_embeddings()(Tensor(ids)).asnumpy()
    assert (
        absolute_error(run_ours(ours, input_ids=None, inputs_embeds=words), run_ours(ours, input_ids=ids))
        < 1e-6
    )


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2", "bloom", "gemma3"])
def test_samples_in_one_row_do_not_see_each_other(tmp_path, name):
    make_decoder(name, tmp_path)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = make_texts(rows=1)["input_ids"]
    numbers = np.array([[1] * 9 + [2] * 11 + [0] * 3], np.int32)
    positions = np.array([[*range(9), *range(11), 0, 0, 0]], np.int32)
    packed = to_numpy(run_ours(ours, input_ids=ids, attention_mask=numbers, position_ids=positions))
    for start, end in ((0, 9), (9, 20)):
        alone = run_ours(ours, input_ids=ids[:, start:end])
        assert absolute_error(packed[:, start:end], alone) <= 2e-6


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ARCHITECTURES.values())
def test_heads(tmp_path, name, head):
    if name == "opt" and head == "TokenClassification":
        make_decoder(name, tmp_path)
        with pytest.raises(InputError, match="has no AutoModelForTokenClassification"):
            our_models.AutoModelForTokenClassification.from_pretrained(tmp_path)
        return
    if name == "gemma3" and head == "TokenClassification":
        pytest.skip("transformers has no token classifier on the text model of Gemma 3")
    theirs = make_decoder(name, tmp_path, head, num_labels=5)
    ours = getattr(our_models, f"AutoModelFor{head}").from_pretrained(tmp_path)
    assert not ours.load_report.unused
    assert not ours.load_report.newly_initialised
    batch = make_texts()
    shape = batch["input_ids"].shape[: 1 + (head == "TokenClassification")]
    labels = np.random.default_rng(1).integers(0, 5, shape).astype(np.int32)
    mask = batch["attention_mask"] if head == "TokenClassification" else None
    if mask is not None:
        labels[mask == 0] = -100
    expected = run_theirs(theirs, **batch, labels=labels)
    loss, logits = run_ours(ours, **batch, labels=labels)
    assert scaled_error(logits, expected.logits, mask) <= 1e-5
    assert absolute_error(loss, expected.loss) <= 1e-5


@pytest.mark.usefixtures("pynative")
def test_the_last_token_needs_a_padding_token(tmp_path):
    make_decoder("llama", tmp_path, "SequenceClassification")
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path, pad_token_id=None)
    with pytest.raises(InputError, match=r"can't be told without a pad_token_id.*tokenizer.pad_token_id"):
        run_ours(ours, **make_texts())
    assert run_ours(ours, **make_texts(rows=1)).shape == (1, 2)


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ARCHITECTURES.values())
def test_features_and_hidden_states(tmp_path, name):
    theirs = make_decoder(name, tmp_path, head="")
    ours = AutoModel.from_pretrained(tmp_path)
    batch = make_texts(rows=1)
    expected = run_theirs(theirs, **batch, output_hidden_states=True)
    hidden, states = run_ours(ours, **batch, output_hidden_states=True)
    assert relative_error(hidden, expected.last_hidden_state) <= 1e-5
    assert len(states) == len(expected.hidden_states) == 3
    assert relative_error(states[1], expected.hidden_states[1]) <= 1e-5


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", CASES)
def test_written_checkpoints_are_the_same_bits(tmp_path, name):
    theirs = make_decoder(name, tmp_path / "theirs")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    expected = load_file(tmp_path / "theirs" / "model.safetensors")
    assert written.keys() >= expected.keys()  # tied weights may stand under both names
    assert all(torch.equal(written[key], value) for key, value in expected.items())
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    batch = make_texts()
    assert torch.equal(run_theirs(again.eval(), **batch).logits, run_theirs(theirs, **batch).logits)


def lora_pair(name: str, folder, noise: float = 0.05):
    """PEFT's model with LoRA on all linear cells, random, and ours opened from its files."""
    base = make_decoder(name, folder / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    theirs = peft.get_peft_model(base, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * noise)
    theirs.save_pretrained(folder / "adapter")
    ours = AutoModelForCausalLM.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(ours, folder / "adapter", is_trainable=True), theirs


def trained_parameters(model: PeftModel) -> dict[str, ms.Parameter]:
    return {parameter.name: parameter for parameter in model.trainable_params()}


@pytest.mark.usefixtures("pynative")
@pytest.mark.parametrize("name", ARCHITECTURES.values())
def test_lora_logits_and_gradients(tmp_path, name):
    ours, theirs = lora_pair(name, tmp_path)
    batch, parameters = make_texts(), trained_parameters(ours)
    columns = {**batch, "labels": labels_of(batch)}
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    expected = run_theirs(theirs, **columns)
    expected.loss.backward()
    step = EvalStep(ours, tuple(columns))

    def forward(*values):
        return step(*values)

    weights = ms.ParameterTuple(parameters.values())
    function = ms.value_and_grad(forward, None, weights, has_aux=True)
    (loss, logits), gradients = function(*map(Tensor, columns.values()))
    assert scaled_error(logits, expected.logits, batch["attention_mask"]) <= 1e-5
    assert absolute_error(loss, expected.loss) <= 1e-5
    wanted = {
        key.replace("base_model.model.", "").replace(".default", ""): value.grad
        for key, value in theirs.named_parameters()
        if value.requires_grad
    }
    floor = 1e-2 * max(float(value.abs().max()) for value in wanted.values())
    assert set(wanted) == set(parameters)
    for key, gradient in zip(parameters, gradients, strict=True):
        worst = absolute_error(gradient, wanted[key]) / max(float(wanted[key].abs().max()), floor)
        assert worst <= 1e-4, key


@pytest.mark.usefixtures("graph_mode")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("llama", "gpt2") else pytest.mark.slow)
        for name in ARCHITECTURES.values()
    ],
)
def test_lora_curve(tmp_path, name):
    """Twenty steps of AdamW in one compiled graph give PEFT's losses."""
    ours, theirs = lora_pair(name, tmp_path, noise=0.02)
    batch = make_texts()
    runner, found, expected = train_both(ours, theirs, [{**batch, "labels": labels_of(batch)}] * 20, 5e-3)
    assert runner.graphs == 1
    assert found[-1] < found[0] - 0.1
    assert np.abs(found - expected).max() <= 1e-3


@pytest.mark.usefixtures("pynative")
def test_internlm2_is_llama_with_joined_weights(tmp_path):
    """transformers has no InternLM2: its weights are taken apart and given to Llama."""
    keys = {**CASES["llama"][1], "vocab_size": VOCABULARY, "pad_token_id": PAD, "bias": False}
    (tmp_path / "config.json").write_text(json.dumps({**keys, "model_type": "internlm2"}))
    config = our_models.AutoConfig.from_pretrained(tmp_path)
    ms.set_seed(0)
    ours = AutoModelForCausalLM.from_config(config)
    for parameter in ours.get_parameters():
        noise = np.random.normal(0, 0.1, parameter.shape).astype(np.float32)
        parameter.set_data(parameter + Tensor(noise))
    weights = {name: torch.tensor(p.asnumpy()) for name, p in ours.parameters_and_names()}
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{key: value for key, value in keys.items() if key != "bias"})
    ).eval()
    theirs.load_state_dict(internlm2_as_llama(weights, heads=4, groups=2, size=16))
    batch = make_texts()
    assert scaled_error(run_ours(ours, **batch), run_theirs(theirs, **batch).logits) <= 1e-5


def internlm2_as_llama(weights: dict[str, torch.Tensor], heads: int, groups: int, size: int) -> dict:
    renamed = {
        "model.tok_embeddings.weight": "model.embed_tokens.weight",
        "output.weight": "lm_head.weight",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    result = {}
    for name, value in weights.items():
        if name.endswith("wqkv.weight"):
            apart = value.reshape(groups, heads // groups + 2, size, -1)
            parts = {"q": apart[:, :-2], "k": apart[:, -2], "v": apart[:, -1]}
            for letter, part in parts.items():
                key = name.replace("attention.wqkv", f"self_attn.{letter}_proj")
                result[key] = part.reshape(-1, value.shape[-1])
            continue
        for old, new in renamed.items():
            name = name.replace(old, new)
        result[name] = value
    return result


@pytest.mark.usefixtures("pynative")
def test_chatglm_is_glm_with_other_names(tmp_path):
    """transformers has GLM in its own layout: ChatGLM's weights are renamed and given to it."""
    theirs = make_decoder("glm", tmp_path / "glm")
    keys = {
        "model_type": "chatglm",
        "num_layers": 2,
        "padded_vocab_size": VOCABULARY,
        "hidden_size": 64,
        "ffn_hidden_size": 96,
        "kv_channels": 16,
        "num_attention_heads": 4,
        "multi_query_group_num": 2,
        "layernorm_epsilon": 1.5625e-7,
        "seq_length": 128,
        "pad_token_id": PAD,
    }
    (tmp_path / "config.json").write_text(json.dumps(keys))
    ours = AutoModelForCausalLM.from_config(our_models.AutoConfig.from_pretrained(tmp_path))
    weights = glm_as_chatglm(theirs.state_dict())
    parameters = dict(ours.parameters_and_names())
    assert parameters.keys() == weights.keys()
    for name, value in weights.items():
        parameters[name].set_data(Tensor(value.numpy()))
    batch = make_texts()
    assert scaled_error(run_ours(ours, **batch), run_theirs(theirs, **batch).logits) <= 1e-5
    ours.save_pretrained(tmp_path / "written")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    assert not again.load_report.unused
    assert not again.load_report.newly_initialised


def glm_as_chatglm(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {
        "model.embed_tokens": "transformer.embedding.word_embeddings",
        "model.layers": "transformer.encoder.layers",
        "model.norm": "transformer.encoder.final_layernorm",
        "lm_head": "transformer.output_layer",
        "self_attn.o_proj": "self_attention.dense",
        "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }
    result = {}
    for name, value in weights.items():
        if ".q_proj." in name:
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            name, value = name.replace("self_attn.q_proj", "self_attention.query_key_value"), torch.cat(parts)
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        for old, new in renamed.items():
            name = name.replace(old, new)
        result[name] = value
    return result


def real_configs(shared_dir) -> dict[str, dict]:
    folders = sorted(path for path in (shared_dir / "configs").iterdir() if (path / "config.json").is_file())
    return {path.name: json.loads((path / "config.json").read_text()) for path in folders}


UNSUPPORTED = {"flan-t5-small", "mengzi-t5-base", "t5-base", "t5-small"}
UNSUPPORTED |= {"vit-base-eurosat-finetuned", "vit-base-patch16-224"}
WITHOUT_MODEL_TYPE = {"roberta-base-old"}


def test_every_real_config_builds_or_says_why(shared_dir):
    """With two layers: the names and shapes are transformers' own, where it has the model."""
    from mindpeft.models.auto import architecture

    found = real_configs(shared_dir)
    assert len(found) == 26
    for folder, values in found.items():
        if folder in UNSUPPORTED | WITHOUT_MODEL_TYPE:
            with pytest.raises(InputError, match="model_type"):
                architecture(values.get("model_type"), folder)
            continue
        layers = next(
            key for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if key in values
        )
        heads = architecture(values["model_type"], folder).HEADS
        config_class = heads["AutoModel"].config_class
        config = config_class.from_dict(values, **{layers: 2})
        written = config.to_dict()
        assert all(written.get(key) == value for key, value in values.items() if key != layers), folder
        names = {name: tuple(p.shape) for name, p in heads["AutoModel"](config).parameters_and_names()}
        if values["model_type"] in ("internlm2", "chatglm"):
            continue
        kept = {key: value for key, value in values.items() if key not in ("auto_map", layers)}
        with torch.device("meta"):
            theirs = transformers.AutoModel.from_config(
                transformers.AutoConfig.for_model(**{**kept, layers: 2})
            )
        assert names == {name: tuple(p.shape) for name, p in theirs.named_parameters()}, folder


def test_weight_indices_of_real_checkpoints_are_wholly_used(shared_dir):
    from mindpeft.convert.loader import hf_renamer
    from mindpeft.models.auto import architecture

    for folder in ("internlm2-1.8b", "qwen2.5-3b", "mistral-24b-dolphin3", "qwen2-14b-cogito"):
        values = json.loads((shared_dir / "configs" / folder / "config.json").read_text())
        index = json.loads((shared_dir / "configs" / folder / "model.safetensors.index.json").read_text())
        heads = architecture(values["model_type"], folder).HEADS
        model_class = heads["AutoModelForCausalLM"]
        config = model_class.config_class.from_dict(values, num_hidden_layers=2)
        names = {name for name, _ in model_class(config).parameters_and_names()}
        rename = hf_renamer(names, model_class.base_model_prefix)
        listed = {rename(name) for name in index["weight_map"] if ".layers." not in name or _layer(name) < 2}
        assert listed == names, folder


def _layer(name: str) -> int:
    return int(name.partition(".layers.")[2].partition(".")[0])


def test_stories260k(shared_dir, mode):
    folder = shared_dir / "checkpoints" / "stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ours = AutoModelForCausalLM.from_pretrained(folder)
    ids = np.random.default_rng(0).integers(3, 512, (2, 100)).astype(np.int32)
    assert absolute_error(run_ours(ours, input_ids=ids), run_theirs(theirs, input_ids=ids).logits) <= 2e-5
    # Logits go up to 22: over 200 tokens torch itself is 1.4e-5 off its own run in float64.
    story = theirs.generate(torch.tensor([[1]]), max_new_tokens=199, do_sample=False).numpy().astype(np.int32)
    expected = run_theirs(theirs, input_ids=story).logits
    assert absolute_error(run_ours(ours, input_ids=story), expected) <= 1e-6 * float(expected.abs().max())


def test_someone_elses_adapter_of_gpt2(shared_dir, tmp_path):
    """LoRA on c_attn with a trained classifier; the base here is random, of GPT-2's shape."""
    folder = shared_dir / "checkpoints" / "adapter_lora_gpt2_seqcls"
    saved = load_file(folder / "adapter_model.safetensors")
    labels = next(value.shape[0] for key, value in saved.items() if key.endswith("score.weight"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(num_labels=labels, pad_token_id=50256)
    base = transformers.GPT2ForSequenceClassification(config)
    base.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(base, folder).eval()
    ours = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(tmp_path), folder)
    ids = np.random.default_rng(0).integers(0, 50000, (2, 19)).astype(np.int32)
    expected = run_theirs(theirs, input_ids=ids).logits
    assert scaled_error(run_ours(ours, input_ids=ids), expected) <= 1e-5
    assert (expected - run_theirs(base.base_model, input_ids=ids)[0][:, -1, :1]).abs().max() > 1e-3
    ours.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)


BAD = {
    "heads": ({"num_attention_heads": 3}, "hidden_size 64 is no multiple of num_attention_heads 3"),
    "key heads": ({"num_key_value_heads": 3}, "no multiple of num_key_value_heads 3"),
    "scaling": ({"rope_scaling": {"type": "lineal", "factor": 2}}, "did you mean 'linear'"),
    "factor": ({"rope_scaling": {"type": "linear"}}, "needs a positive factor, not None"),
    "list": ({"rope_scaling": {"type": "longrope", "factor": 2}}, "needs short_factor with 8 numbers"),
    "activation": ({"hidden_act": "slu"}, "unknown activation 'slu'"),
    "layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
    "type": ({"rope_theta": "big"}, "rope_theta must be a finite number or null"),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_malformed_configs(tmp_path, changes, message):
    keys = {**CASES["llama"][1], "vocab_size": VOCABULARY, "model_type": "llama", **changes}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(InputError, match=message):
        AutoModelForCausalLM.from_config(our_models.AutoConfig.from_pretrained(tmp_path))
