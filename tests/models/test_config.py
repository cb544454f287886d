"""Configurations: what config.json may hold, what is refused and how, and what is written back."""

from __future__ import annotations

import json

import pytest

from mindpeft.errors import InputError
from mindpeft.models import AutoConfig, AutoModel, AutoModelForSequenceClassification
from mindpeft.models.bert import BertConfig

TINY = {
    "model_type": "bert",
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def write(folder, **values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_defaults_are_bert_base():
    config = BertConfig()
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (30522, 768, 12)
    assert config.num_labels == 2
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1}


def test_unknown_keys_are_kept_and_written_back(tmp_path):
    own = {"my_key": {"a": [1, None]}, "transformers_version": "4.0"}
    config = AutoConfig.from_pretrained(write(tmp_path, **TINY, **own))
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: written[key] for key in own} == own
    assert {key: written[key] for key in TINY} == TINY
    assert "name_or_path" not in written
    assert AutoConfig.from_pretrained(tmp_path / "again").to_dict() == config.to_dict()


def test_labels_from_the_file_and_from_the_call(tmp_path):
    labels = {"0": "yes", "1": "no", "2": "maybe"}
    folder = write(tmp_path, **TINY, id2label=labels, label2id={name: int(n) for n, name in labels.items()})
    config = AutoConfig.from_pretrained(folder)
    assert config.num_labels == 3
    assert config.label2id == {"yes": 0, "no": 1, "maybe": 2}
    assert AutoConfig.from_pretrained(folder, num_labels=3).id2label[2] == "maybe"
    assert AutoConfig.from_pretrained(folder, num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}
    assert AutoConfig.from_pretrained(folder, id2label={0: "a"}).num_labels == 1
    assert AutoConfig.from_pretrained(folder, label2id={"a": 0, "b": 1}).id2label == {0: "a", 1: "b"}
    assert AutoConfig.from_pretrained(write(tmp_path, **TINY, num_labels=5)).num_labels == 5


BAD_FILES = {
    "no model_type": ({"model_type": None}, ["config.json has no model_type", "bert"]),
    "unknown model_type": ({"model_type": "bart"}, ["'bart'", "not supported", "did you mean 'bert'"]),
    "model_type of another kind": ({"model_type": ["bert"]}, ["model_type ['bert'] is not supported"]),
    "text for a number": ({"hidden_size": "768"}, ["config.json: hidden_size must be an integer, not '768'"]),
    "fraction for an integer": ({"hidden_size": 8.5}, ["hidden_size must be an integer, not 8.5"]),
    "true for a number": ({"num_hidden_layers": True}, ["num_hidden_layers must be an integer, not True"]),
    "null for a number": ({"vocab_size": None}, ["vocab_size must be an integer, not None"]),
    "number for a name": ({"hidden_act": 3}, ["hidden_act must be a text, not 3"]),
    "not a number": ({"layer_norm_eps": float("nan")}, ["layer_norm_eps must be a finite number, not nan"]),
    "text for true": (
        {"tie_word_embeddings": "yes"},
        ["tie_word_embeddings must be true or false, not 'yes'"],
    ),
    "no heads": ({"num_attention_heads": 0}, ["num_attention_heads must be at least 1, not 0"]),
    "negative size": ({"intermediate_size": -4}, ["intermediate_size must be at least 1, not -4"]),
    "odd heads": ({"num_attention_heads": 3}, ["hidden_size 8 is no multiple of num_attention_heads 3"]),
    "rate": (
        {"hidden_dropout_prob": 1.5},
        ["hidden_dropout_prob must be at least 0 and less than 1, not 1.5"],
    ),
    "padding": ({"pad_token_id": 20}, ["pad_token_id must be at least 0 and less than 20, not 20"]),
    "positions": ({"position_embedding_type": "relative_key"}, ["position_embedding_type 'relative_key'"]),
    "decoder": ({"is_decoder": True}, ["is_decoder is true"]),
    "labels in a list": ({"id2label": ["a"]}, ["id2label must be an object, not ['a']"]),
    "unnumbered labels": ({"id2label": {"a": "b"}}, ["id2label must map numbers to names, not 'a'"]),
    "no labels": ({"id2label": {}}, ["id2label must name at least one label"]),
    "number of labels": ({"num_labels": 0}, ["num_labels must be an integer of at least 1, not 0"]),
    "problem_type": ({"problem_type": "regresion"}, ["problem_type", "did you mean 'regression'"]),
    "activation": ({"hidden_act": "geluu"}, ["unknown activation 'geluu'", "did you mean 'gelu'"]),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_refused_in_one_sentence(tmp_path, case):
    change, expected = BAD_FILES[case]
    folder = write(tmp_path, **{**TINY, **change})
    with pytest.raises(InputError) as error:
        AutoModel.from_config(AutoConfig.from_pretrained(folder))
    message = str(error.value)
    assert all(part in message for part in expected), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"num_labels": 0}, "num_labels must be an integer of at least 1, not 0"),
        ({"num_labels": "3"}, "num_labels must be an integer of at least 1, not '3'"),
        ({"num_lables": 3}, "has no key 'num_lables'; did you mean 'num_labels'"),
        ({"hidden_dropout_prob": 2}, "hidden_dropout_prob must be at least 0 and less than 1, not 2"),
    ],
)
def test_bad_overrides_are_refused(tmp_path, overrides, expected):
    with pytest.raises(InputError, match=expected):
        AutoConfig.from_pretrained(write(tmp_path, **TINY), **overrides)


def test_bad_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        AutoConfig.from_pretrained(tmp_path / "absent")
    with pytest.raises(InputError, match=r"has no config\.json"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(InputError, match="is a file"):
        AutoConfig.from_pretrained(file)
    with pytest.raises(InputError, match=r"config\.json"):
        AutoConfig.from_pretrained(tmp_path)
    file.write_text("[1]")
    with pytest.raises(InputError, match="holds a list"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["bert-base-uncased", "bert-base-uncased-4.56", "bert-base-chinese", "chinese-roberta-wwm-ext"]
)
def test_real_configurations_are_read(shared_dir, name):
    folder = shared_dir / "configs" / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder} is absent")
    config = AutoConfig.from_pretrained(folder)
    written, original = config.to_dict(), json.loads((folder / "config.json").read_text())
    assert {key: written.get(key) for key in original} == original
