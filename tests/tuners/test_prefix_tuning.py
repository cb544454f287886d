"""Prefix tuning against torch + peft on a small BERT."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from safetensors.numpy import load_file

from mindpeft import PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from mindpeft.errors import InputError
from mindpeft.ops.attention import Attention
from mindpeft.tuners.prefix_tuning import PrefixAttention, PrefixEncoder
from tests.tuners import prompts
from tests.tuners.prompts import (
    base_here,
    batch_for,
    check_reading,
    check_resuming,
    check_switching,
    check_writing,
    largest_error,
    outputs_here,
    outputs_there,
)

pytestmark = pytest.mark.usefixtures("graph_mode")

METHOD = prompts.Method("PrefixTuningConfig", {"num_virtual_tokens": 4})
PROJECTED = {"prefix_projection": True, "encoder_hidden_size": 20}


def from_peft(tensors):
    """PEFT's tensors of the encoder by their names here: its last layer is cut into one for each layer."""
    named = {}
    for name, value in tensors.items():
        if name.startswith("prompt_encoder.transform.2"):
            leaf = name.rpartition(".")[2]
            for layer, part in enumerate(value.chunk(2)):
                named[f"prompt_encoder.layers.{layer}.{leaf}"] = part
        elif "prompt_encoder.transform.0.weight" in tensors:
            named[name.replace("transform.0", "first")] = value
        else:
            named[name.replace("prompt_encoder.embedding.weight", "prompt_embeddings")] = value
    return named


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "options"),
    [
        ("sequence", {}),
        ("token", PROJECTED),
        ("masked", {}),
        ("features", {"init_weights": "zero"}),
    ],
)
def test_reading_what_peft_wrote(tmp_path, head, options):
    check_reading(METHOD, head, tmp_path, **options)


@pytest.mark.parametrize(
    ("head", "options"), [("sequence", {}), ("token", PROJECTED), ("sequence", PROJECTED), ("answer", {})]
)
def test_loss_and_gradients(tmp_path, head, options):
    prompts.check_loss_and_gradients(METHOD, head, tmp_path, from_peft, **options)


def test_pynative_gives_the_same(tmp_path):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    check_reading(METHOD, "token", tmp_path)
    check_writing(METHOD, "token", tmp_path / "more", **PROJECTED)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, PROJECTED])
def test_writing_for_peft(tmp_path, options):
    check_writing(METHOD, "sequence", tmp_path, **options)


def test_switching():
    check_switching(METHOD, num_virtual_tokens=7)


@pytest.mark.slow
def test_resuming(tmp_path):
    check_resuming(METHOD, tmp_path, **PROJECTED)


@pytest.mark.parametrize("options", [{"num_virtual_tokens": 30}, {"num_virtual_tokens": 30, **PROJECTED}])
def test_initial_values_are_distributed_as_pefts(options):
    ms.set_seed(0)
    ours = get_peft_model(base_here("sequence"), METHOD.config_here(**options))
    theirs = METHOD.there("sequence", noise=0.0, **options)
    expected = from_peft(prompts.trained_there(theirs))
    for parameter in ours.trainable_params():
        if "classifier" not in parameter.name:
            mine, other = parameter.asnumpy(), expected[parameter.name].detach().numpy()
            assert mine.std() == pytest.approx(other.std(), rel=0.3), parameter.name
            assert np.abs(mine).max() == pytest.approx(np.abs(other).max(), rel=0.4), parameter.name


@pytest.mark.parametrize("options", [{}, PROJECTED])
def test_zero_starts_from_keys_and_values_of_zeros(tmp_path, options):
    config = METHOD.config_here(init_weights="zero", **options)
    get_peft_model(base_here("sequence"), config).save_pretrained(tmp_path)
    assert not load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"].any()


def test_mask_types_and_positions_may_be_left_out_or_given(tmp_path):
    theirs, batch = METHOD.there("token", tmp_path), batch_for("token", padded=False)
    ours = PeftModel.from_pretrained(base_here("token"), tmp_path)
    bare = {"input_ids": batch["input_ids"]}
    expected = outputs_there(theirs, bare)
    assert largest_error(outputs_here(ours, bare), expected) <= 1e-5
    positions = np.stack([np.arange(11) + shift for shift in (0, 3, 5)]).astype(np.int32)
    moved = outputs_there(theirs, bare, position_ids=positions)
    assert largest_error(outputs_here(ours, bare, position_ids=positions), moved) <= 1e-5
    assert largest_error(moved, expected) > 1e-2
    embedded = ours.get_input_embeddings()(Tensor(bare["input_ids"])).asnumpy()
    given = outputs_here(ours, {"input_ids": None, "inputs_embeds": embedded})
    assert largest_error(given, expected) <= 1e-5


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("repeated", [1, 3])
def test_grouped_heads(mode, masked, repeated):
    """A prefix of 2 key/value heads where the model has repeated them to 2 or 6, against torch."""
    ms.set_context(mode=mode)
    random = np.random.default_rng(0)
    heads, size, count, layers = 2, 5, 3, 2
    encoder = PrefixEncoder(
        base_here("token"), "", {"prompt_embeddings": (count, layers * 2 * heads * size)}, ms.float32
    )
    table = random.normal(size=(count, layers * 2 * heads * size)).astype(np.float32)
    encoder.fill({"prompt_embeddings": table}, frozenset())
    encoder.set_scaling(1.0)
    attentions = [Attention(heads * repeated, size) for _ in range(layers)]
    cells = [
        PrefixAttention(attention, f"a{i}", {}, ms.float32, 0, encoder)
        for i, attention in enumerate(attentions)
    ]
    query, key, value = (
        random.normal(size=(2, heads * repeated, 4, size)).astype(np.float32) for _ in range(3)
    )
    mask = np.triu(np.full((2, 1, 4, 4), -1e9, np.float32), 1) if masked else None
    past = torch.tensor(table).view(count, layers, 2, heads, size).permute(1, 2, 3, 0, 4)
    for cell, states in zip(cells, past, strict=True):
        found = cell(*map(Tensor, (query, key, value)), None if mask is None else Tensor(mask))
        whole = [
            torch.cat((own.repeat_interleave(repeated, 0).expand(2, -1, -1, -1), torch.tensor(given)), 2)
            for own, given in zip(states, (key, value), strict=True)
        ]
        added = None if mask is None else torch.cat((torch.zeros(2, 1, 4, count), torch.tensor(mask)), -1)
        expected = torch.nn.functional.scaled_dot_product_attention(torch.tensor(query), *whole, added)
        np.testing.assert_allclose(found.asnumpy(), expected.transpose(1, 2).flatten(2).numpy(), atol=5e-6)


def test_sizes_of_grouped_heads():
    base = base_here("sequence")
    base.config.num_key_value_heads = 2
    model = get_peft_model(base, METHOD.config_here())
    config = model.peft_config["default"]
    assert (config.token_dim, config.num_attention_heads, config.encoder_hidden_size) == (24, 2, 24)
    assert model.trainable_params()[0].shape == (4, 2 * 2 * 24)


def test_together_with_virtual_tokens():
    """Whichever came first: the prefix stands before the virtual tokens, those before the real ones."""
    batch, answers, values = batch_for("token"), [], {}
    options = {"task_type": "FEATURE_EXTRACTION"}
    configs = {
        "prefix": METHOD.config_here(**options),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, **options),
    }
    for names in (["prefix", "prompt"], ["prompt", "prefix"]):
        model = get_peft_model(base_here("token"), configs[names[0]], names[0]).set_train(False)
        model.add_adapter(names[1], configs[names[1]])
        for name in names:
            model.set_adapter(name)
            (parameter,) = model.trainable_params()
            parameter.set_data(Tensor(values.setdefault(name, parameter.asnumpy())))
        model.set_adapter(names)
        answers.append(outputs_here(model, batch))
        for name in names:
            model.set_adapter(name)
            assert largest_error(outputs_here(model, batch), answers[-1]) > 1e-3
    assert answers[0][0].shape == (3, 11, 5)
    assert largest_error(*answers) <= 1e-5


class NoAttention(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.config = base_here("sequence").config

    def construct(self, input_ids, position_ids=None):
        return input_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": -1}, "num_virtual_tokens must be a positive integer, not -1"),
        ({"init_weights": "zeros"}, "init_weights must be one of None, zero, not 'zeros'"),
        ({"prefix_projection": "yes"}, "prefix_projection must be true or false, not 'yes'"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size must be a positive integer, not 0"),
        ({"num_layers": 3}, "num_layers is 3, but the base model's is 2"),
        ({"num_attention_heads": 8}, "num_attention_heads is 8, but the base model's is 4"),
        ({"token_dim": 24}, "token_dim is 24, but the base model's is 48"),
        ({"num_transformer_submodules": 2}, "PREFIX_TUNING is for models of one stack"),
        ({"task_type": "SEQ_CSL"}, "unknown task_type 'SEQ_CSL'; did you mean 'SEQ_CLS'"),
    ],
)
def test_mistakes_in_the_config(options, message):
    base = base_here("sequence")
    with pytest.raises(InputError, match=message):
        get_peft_model(base, PrefixTuningConfig(**{"num_virtual_tokens": 4, **options}))
    assert all(parameter.requires_grad for parameter in base.get_parameters())


def test_mistakes_in_the_model_and_its_arguments():
    with pytest.raises(InputError, match="in each of its 2 layers; NoAttention has 0"):
        get_peft_model(NoAttention(), METHOD.config_here())
    with pytest.raises(InputError, match="set num_layers: the base model's config does not have it"):
        get_peft_model(ms.nn.Dense(2, 2), METHOD.config_here())
    model = METHOD.here("sequence")
    with pytest.raises(InputError, match="has 21 tokens besides 4 virtual ones, but max_position_embeddings"):
        model(Tensor(np.ones((1, 21), np.int32)))
