"""Checkpoints of every spelling into a model, and what is written opened by transformers again."""

from __future__ import annotations

import json

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mindpeft.errors import InputError
from mindpeft.models import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification
from mindpeft.models.bert import BertConfig, BertForMaskedLM, BertForSequenceClassification
from tests.models import reference
from tests.models.reference import make_batch, make_reference, open_ours, run_ours, run_theirs


def rewrite(folder, change):
    """Replace the checkpoint's tensors by ``change(tensors)``."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def logits_error(head, folder, theirs):
    batch = make_batch()
    found, expected = run_ours(open_ours(head, folder), **batch), run_theirs(theirs, **batch)
    return reference.absolute_error(found, expected.logits)


def test_a_bare_backbone_with_or_without_its_prefix(tmp_path):
    theirs = make_reference("features", tmp_path)
    expected = run_theirs(theirs, **make_batch()).last_hidden_state
    for prefix in ("", "bert."):
        rewrite(tmp_path, lambda tensors, p=prefix: {p + name: value for name, value in tensors.items()})
        ours = open_ours("features", tmp_path)
        assert reference.absolute_error(run_ours(ours, **make_batch())[0], expected) <= 1e-5
        assert not ours.load_report.newly_initialised
        assert not ours.load_report.unused


def test_old_names_of_norms(tmp_path):
    theirs = make_reference("sequence", tmp_path)

    def age(tensors):
        old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        return {
            next((name.replace(new, was) for new, was in old.items() if name.endswith(new)), name): value
            for name, value in tensors.items()
        }

    rewrite(tmp_path, age)
    assert any(name.endswith(".gamma") for name in load_file(tmp_path / "model.safetensors"))
    assert logits_error("sequence", tmp_path, theirs) <= 1e-5


def test_a_headless_checkpoint_gets_a_fresh_head(tmp_path):
    theirs = make_reference("features", tmp_path)
    ms.set_seed(0)
    ours = open_ours("sequence", tmp_path, num_labels=300)
    assert ours.load_report.newly_initialised == ["classifier.weight", "classifier.bias"]
    assert ours.load_report.unused == []
    assert len(ours.load_report.loaded) == len(theirs.state_dict())
    assert ours.classifier.weight.asnumpy().std() == pytest.approx(0.02, rel=0.05)
    assert not ours.classifier.bias.asnumpy().any()
    pooled = run_theirs(theirs, **make_batch()).pooler_output
    expected = pooled @ torch.tensor(ours.classifier.weight.asnumpy()).T
    assert reference.absolute_error(run_ours(ours, **make_batch()), expected) <= 1e-5


def test_a_head_that_is_not_asked_for_is_reported_unused(tmp_path):
    make_reference("token", tmp_path)
    ours = open_ours("features", tmp_path)
    assert sorted(ours.load_report.unused) == ["classifier.bias", "classifier.weight"]
    assert ours.load_report.newly_initialised == ["pooler.dense.weight", "pooler.dense.bias"]


def test_a_head_of_another_size_is_refused_or_made_anew(tmp_path):
    make_reference("sequence", tmp_path, num_labels=4)
    with pytest.raises(InputError, match=r"classifier\.weight is \(4, 48\) in the file and \(7, 48\)"):
        open_ours("sequence", tmp_path, num_labels=7)
    ours = open_ours("sequence", tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert ours.load_report.misshapen == ["classifier.bias", "classifier.weight"]
    assert ours.classifier.weight.asnumpy().std() > 0.01


@pytest.mark.parametrize(
    "names",
    [
        ["cls.predictions.bias"],
        ["cls.predictions.bias", "cls.predictions.decoder.bias"],
        ["cls.predictions.bias", "cls.predictions.decoder.weight"],
        ["cls.predictions.decoder.bias"],
    ],
)
def test_tied_weights_under_any_of_their_names(tmp_path, names):
    theirs = make_reference("masked", tmp_path)
    state = theirs.state_dict()

    def keep(tensors):
        shared = ("cls.predictions.bias", "cls.predictions.decoder.bias", "cls.predictions.decoder.weight")
        kept = {name: value for name, value in tensors.items() if name not in shared}
        return {**kept, **{name: state[name].clone() for name in names}}

    rewrite(tmp_path, keep)
    ours = open_ours("masked", tmp_path)
    assert ours.load_report.newly_initialised == []
    assert ours.load_report.unused == []
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    assert logits_error("masked", tmp_path, theirs) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_of_another_precision_into_float32(tmp_path, dtype):
    theirs = make_reference("sequence", tmp_path).to(dtype)
    theirs.save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert {str(p.dtype) for p in open_ours("sequence", tmp_path).get_parameters()} == {"Float32"}
    assert logits_error("sequence", tmp_path, theirs.float()) <= 1e-5


def test_a_float16_model(tmp_path, mode):
    theirs = make_reference("sequence", tmp_path)
    ours = open_ours("sequence", tmp_path, dtype="float16")
    assert {p.dtype for p in ours.get_parameters()} == {ms.float16}
    found = run_ours(ours, **make_batch())
    assert found.dtype == ms.float16
    # float16 has 11 bits: after two layers a few thousandths of the largest logit
    assert reference.relative_error(found, run_theirs(theirs, **make_batch()).logits) <= 1e-2


def test_dtype_auto_follows_the_config(tmp_path):
    make_reference("sequence", tmp_path).half().save_pretrained(tmp_path)
    assert {p.dtype for p in open_ours("sequence", tmp_path, dtype="auto").get_parameters()} == {ms.float16}
    with pytest.raises(InputError, match=r"unknown dtype 'flot16'.*did you mean 'float16'"):
        open_ours("sequence", tmp_path, dtype="flot16")


@pytest.mark.parametrize("head", reference.HEADS)
@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_what_is_written_opens_in_transformers_bit_by_bit(tmp_path, head, max_shard_size):
    theirs = make_reference(head, tmp_path / "theirs")
    open_ours(head, tmp_path / "theirs").save_pretrained(tmp_path / "ours", max_shard_size=max_shard_size)
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")
    auto = getattr(transformers, reference.HEADS[head])
    again, info = auto.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(theirs)
    expected = theirs.state_dict()
    assert again.state_dict().keys() == expected.keys()
    for name, value in again.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_untied_head_is_written_whole(tmp_path):
    theirs = make_reference("masked", tmp_path, tie_word_embeddings=False)
    open_ours("masked", tmp_path).save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "ours")
    for name, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_written_in_another_precision(tmp_path, dtype):
    theirs = make_reference("sequence", tmp_path)
    open_ours("sequence", tmp_path).save_pretrained(tmp_path / "ours", dtype=dtype)
    rounded = load_file(tmp_path / "ours" / "model.safetensors")
    for name, value in theirs.state_dict().items():
        assert torch.equal(rounded[name], value.to(getattr(torch, dtype))), name
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").dtype == getattr(torch, dtype)


def test_a_half_precision_model_is_written_as_it_is(tmp_path):
    make_reference("sequence", tmp_path)
    open_ours("sequence", tmp_path, dtype="float16").save_pretrained(tmp_path / "ours")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "ours").dtype == torch.float16
    assert {value.dtype for value in load_file(tmp_path / "ours" / "model.safetensors").values()} == {
        torch.float16
    }


def test_labels_survive_the_round_trip(tmp_path):
    make_reference("features", tmp_path)
    names = {0: "no", 1: "yes", 2: "perhaps"}
    open_ours("sequence", tmp_path, id2label=names).save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert again.config.id2label == names
    assert again.config.label2id == {name: number for number, name in names.items()}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [
        "BertForSequenceClassification"
    ]


def test_fresh_weights_are_distributed_as_transformers(tmp_path):
    ms.set_seed(1)
    torch.manual_seed(1)
    sizes = {key: value for key, value in reference.SIZES.items() if key != "attn_implementation"}
    ours = BertForMaskedLM.from_config(BertConfig(**sizes))
    theirs = transformers.AutoModelForMaskedLM.from_config(transformers.BertConfig(**sizes))
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.parameters_and_names():
        found, expected = parameter.asnumpy(), theirs[name].detach().numpy()
        assert found.mean() == pytest.approx(expected.mean(), abs=4e-3), name
        assert found.std() == pytest.approx(expected.std(), rel=0.2, abs=1e-6), name
    assert not ours.bert.embeddings.word_embeddings.weight.asnumpy()[0].any()  # the padding token


def test_the_seed_decides_fresh_weights(tmp_path):
    make_reference("features", tmp_path)
    heads = []
    for seed in (3, 3, 4):
        ms.set_seed(seed)
        heads.append(open_ours("sequence", tmp_path).classifier.weight.asnumpy())
    np.testing.assert_array_equal(heads[0], heads[1])
    assert (heads[0] != heads[2]).any()


def test_an_old_buffer_of_positions_is_no_news(tmp_path):
    theirs = make_reference("sequence", tmp_path)
    rewrite(tmp_path, lambda t: {**t, "bert.embeddings.position_ids": torch.arange(24)[None]})
    assert open_ours("sequence", tmp_path).load_report.unused == []
    assert logits_error("sequence", tmp_path, theirs) <= 1e-5


def test_a_head_that_the_architecture_lacks_and_a_foreign_class(tmp_path):
    make_reference("features", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "electra"}))
    for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
        with pytest.raises(InputError, match=r"model_type 'electra' is not supported; known: .*bert"):
            auto.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="model_type is 'electra', but BertConfig reads 'bert'"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_a_folder_without_weights(tmp_path):
    make_reference("features", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=str(tmp_path)):
        AutoModel.from_pretrained(tmp_path)
