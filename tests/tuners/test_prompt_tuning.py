"""Prompt tuning against torch + peft on a small BERT, and what every method of virtual tokens shares."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import peft
import pytest
from mindspore import Tensor

from mindpeft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from mindpeft.config import PeftConfig
from mindpeft.errors import InputError
from mindpeft.models.bert import BertConfig
from tests.parity.adapters import randomise
from tests.tuners import prompts
from tests.tuners.prompts import (
    base_here,
    base_there,
    batch_for,
    check_gradients,
    check_reading,
    check_resuming,
    check_switching,
    check_writing,
    gradients_here,
    gradients_there,
    labels_for,
    largest_error,
    loss_there,
    outputs_here,
    outputs_there,
)

pytestmark = pytest.mark.usefixtures("graph_mode")

METHOD = prompts.Method("PromptTuningConfig", {"num_virtual_tokens": 4})


@pytest.fixture
def tokenizer_folder(tmp_path):
    """A tokenizer for the words w5 ... w60."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{number}" for number in range(len(special), 61))]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("head", prompts.TASKS)
def test_reading_what_peft_wrote(tmp_path, head):
    check_reading(METHOD, head, tmp_path)


@pytest.mark.parametrize("head", ["sequence", "token", "masked", "answer"])
def test_loss_and_gradients(tmp_path, head):
    theirs, batch = METHOD.there(head, tmp_path), batch_for(head)
    labels = labels_for(head, batch)
    loss = loss_there(theirs, head, batch, labels, **({"shift": 4} if head == "answer" else {}))
    loss.backward()
    ours = PeftModel.from_pretrained(base_here(head), tmp_path, is_trainable=True).set_train(False)
    found, gradients = gradients_here(ours, batch, labels)
    assert found == pytest.approx(loss.item(), rel=1e-5)
    expected = gradients_there(theirs)
    expected["prompt_embeddings"] = expected.pop("prompt_encoder.embedding.weight")
    check_gradients(gradients, expected)


@pytest.mark.parametrize("head", ["sequence", "token"])
def test_pynative_gives_the_same(tmp_path, head):
    ms.set_context(mode=ms.PYNATIVE_MODE)
    check_reading(METHOD, head, tmp_path)


@pytest.mark.slow
def test_writing_for_peft(tmp_path):
    check_writing(METHOD, "sequence", tmp_path)


@pytest.mark.parametrize("text", ["w9 w50 w12", "w9 w50 w12 w30 w31"])
def test_text_starts_the_prompts_as_in_peft(tokenizer_folder, text):
    options = {
        "num_virtual_tokens": 6,
        "task_type": "SEQ_CLS",
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": text,
        "tokenizer_name_or_path": str(tokenizer_folder),
    }
    ours = get_peft_model(base_here("sequence"), PromptTuningConfig(**options))
    theirs = peft.get_peft_model(base_there("sequence"), peft.PromptTuningConfig(**options))
    expected = theirs.prompt_encoder["default"].embedding.weight.detach().numpy()
    np.testing.assert_array_equal(ours.trainable_params()[0].asnumpy(), expected)


def test_random_and_sampled_prompts():
    ms.set_seed(0)
    options = {"num_virtual_tokens": 200, "prompt_tuning_init": "SAMPLE_VOCAB"}
    model = get_peft_model(base_here("masked"), PromptTuningConfig(**options))
    table = model.get_input_embeddings().weight.asnumpy()
    drawn = [int(np.flatnonzero((table == row).all(1))[0]) for row in model.trainable_params()[0].asnumpy()]
    assert len(set(drawn)) > 40  # of 61
    model.add_adapter("random", PromptTuningConfig(num_virtual_tokens=200))
    model.set_adapter("random")
    values = model.trainable_params()[0].asnumpy()
    assert values.std() == pytest.approx(1, rel=0.05)
    assert abs(values.mean()) < 0.05


def test_switching():
    check_switching(METHOD, num_virtual_tokens=7)


def test_resuming(tmp_path):
    check_resuming(METHOD, tmp_path)


def test_mask_types_and_positions_may_be_left_out_or_given(tmp_path):
    theirs, batch = METHOD.there("token", tmp_path), batch_for("token", padded=False)
    ours = PeftModel.from_pretrained(base_here("token"), tmp_path)
    bare = {"input_ids": batch["input_ids"]}
    expected = outputs_there(theirs, bare)
    assert largest_error(outputs_here(ours, bare), expected) <= 1e-5
    rows, length = bare["input_ids"].shape
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    assert largest_error(outputs_here(ours, bare, position_ids=positions), expected) <= 1e-5
    embedded = ours.get_input_embeddings()(Tensor(bare["input_ids"])).asnumpy()
    given = outputs_here(ours, {"input_ids": None, "inputs_embeds": embedded})
    assert largest_error(given, expected) <= 1e-5
    # Rows of positions may differ: the second text's begin at 3.
    positions[1] += 3
    moved = outputs_here(ours, bare, position_ids=positions)[0]
    np.testing.assert_allclose(moved[0], expected[0][0].detach(), atol=1e-5)
    assert np.abs(moved[1] - expected[0][1].detach().numpy()).max() > 1e-3


def test_together_with_lora_on_the_word_embedding(tmp_path):
    """The prompt layer looks words up in the embedding as it is now, adapters included."""
    ms.set_seed(0)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["word_embeddings", "query"], r=2)
    batch = batch_for("sequence")
    for first, second in ((lora, METHOD.config_here()), (METHOD.config_here(), lora)):
        ms.set_seed(1)
        model = get_peft_model(base_here("sequence"), first, "one").set_train(False)
        model.add_adapter("two", second)
        for name in ("one", "two"):
            model.set_adapter(name)
            randomise(model)
        model.set_adapter(["one", "two"])
        both = outputs_here(model, batch)
        names = ["one", "two"] if first is lora else ["two", "one"]
        model.save_pretrained(tmp_path, names)
        bare = PeftModel.from_pretrained(base_here("sequence"), tmp_path / names[0]).merge_and_unload()
        head = bare.classifier.weight.asnumpy(), bare.classifier.bias.asnumpy()
        alone = PeftModel.from_pretrained(bare, tmp_path / names[1])
        if second is lora:  # of two heads the last one's is used
            alone.base_model.base_layer.classifier.weight.set_data(Tensor(head[0]))
            alone.base_model.base_layer.classifier.bias.set_data(Tensor(head[1]))
        assert largest_error(both, outputs_here(alone, batch)) <= 1e-5


def test_half_precision_base_keeps_float32_prompts(tmp_path):
    theirs = METHOD.there("sequence", tmp_path)
    base = base_here("sequence", dtype="float16")
    ours = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).set_train(False)
    assert ours.trainable_params()[0].dtype == ms.float32
    batch = batch_for("sequence")
    assert largest_error(outputs_here(ours, batch), outputs_there(theirs, batch)) <= 5e-2


class WithoutEmbeds(ms.nn.Cell):
    def __init__(self):
        super().__init__()
        self.config = BertConfig()

    def construct(self, input_ids):
        return input_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_virtual_tokens": None}, "num_virtual_tokens must be a positive integer, not None"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens must be a positive integer, not 0"),
        ({"token_dim": "48"}, "token_dim must be a positive integer, not '48'"),
        ({"token_dim": 32}, "token_dim is 32, but the base model's is 48; is it for another model"),
        ({"num_layers": 12}, "num_layers is 12, but the base model's is 2"),
        ({"num_transformer_submodules": 2}, "PROMPT_TUNING is for models of one stack"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "PROMPT_TUNING is for models of one stack"),
        (
            {"prompt_tuning_init": "TXET"},
            "one of RANDOM, SAMPLE_VOCAB, TEXT, not 'TXET'; did you mean 'TEXT'",
        ),
        ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init TEXT needs prompt_tuning_init_text"),
        (
            {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a"},
            "prompt_tuning_init TEXT needs tokenizer_name_or_path",
        ),
        ({"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs is for prompt_tuning_init TEXT alone"),
        (
            {
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "a",
                "tokenizer_name_or_path": "/nowhere",
                "tokenizer_kwargs": {"a": 1},
            },
            "tokenizer_kwargs is not supported",
        ),
        (
            {
                "prompt_tuning_init": "TEXT",
                "prompt_tuning_init_text": "a",
                "tokenizer_name_or_path": "/nowhere",
            },
            "/nowhere",
        ),
        ({"modules_to_save": "classifier"}, "modules_to_save must be a list of names"),
    ],
)
def test_mistakes_in_the_config(options, message):
    base = base_here("sequence")
    with pytest.raises(InputError, match=message):
        get_peft_model(base, PromptTuningConfig(**{"num_virtual_tokens": 4, **options}))
    assert all(parameter.requires_grad for parameter in base.get_parameters())


def test_mistakes_in_the_model_and_its_arguments():
    with pytest.raises(InputError, match="PROMPT_TUNING needs a model that takes inputs_embeds"):
        get_peft_model(WithoutEmbeds(), METHOD.config_here())
    with pytest.raises(InputError, match="set num_layers: the base model's config does not have it"):
        get_peft_model(ms.nn.Dense(2, 2), METHOD.config_here())
    model, ids = METHOD.here("sequence"), Tensor(batch_for("sequence")["input_ids"])
    with pytest.raises(
        InputError, match="arguments that it does not take; it takes input_ids, attention_mask"
    ):
        model(ids, attention_maks=ids)
    with pytest.raises(InputError, match=r"must be \(batch, length\) with virtual tokens, but it has 3 axes"):
        model(ids, Tensor(np.ones((3, 11, 11), np.int32)))
    with pytest.raises(
        InputError, match="has 21 tokens besides 4 virtual ones, but max_position_embeddings is 24"
    ):
        model(Tensor(np.ones((1, 21), np.int32)))


def test_a_file_of_another_model_is_refused(tmp_path):
    METHOD.here("sequence").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace('"num_virtual_tokens": 4', '"num_virtual_tokens": 5'))
    with pytest.raises(InputError, match=r"'prompt_embeddings' is \(4, 48\) in the file and \(5, 48\) in"):
        PeftModel.from_pretrained(base_here("sequence"), tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).num_virtual_tokens == 5
