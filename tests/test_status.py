"""The reports on adapters, against PEFT's."""

from __future__ import annotations

import peft
import pytest

from mindpeft import LoraConfig, get_peft_model


@pytest.fixture
def model(twins, graph_mode):
    made = get_peft_model(twins.make_model(), LoraConfig(r=4, target_modules=["query", "words"]), "one")
    made.add_adapter("two", LoraConfig(r=2, target_modules=["query", "dense"], task_type="SEQ_CLS"))
    return made


def test_the_model_s_status_equals_peft_s(twins, model, tmp_path):
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(twins.make_torch(), tmp_path / "one", "one", is_trainable=True)
    expected = theirs.get_model_status()
    model.delete_adapter("two")
    found = model.get_model_status()
    for key in ("trainable_params", "total_params", "enabled", "active_adapters", "merged_adapters"):
        assert getattr(found, key) == getattr(expected, key), key
    assert found.requires_grad == {"one": True}
    assert found.available_adapters == ["one"]
    assert found.peft_types == {"one": "LORA"}
    assert found.base_model_type == "Model"


def test_the_layers_status(model):
    layers = {(layer.name, layer.module_type): layer for layer in model.get_layer_status()}
    query = layers["encoder.layer.1.attention.self.query", "LoraLinear"]
    assert query.parameters == {"one": 4 * 32, "two": 2 * 32}
    assert query.active_adapters == ["one"]
    assert query.available_adapters == ["one", "two"]
    assert layers["words", "LoraEmbedding"].available_adapters == ["one"]
    assert layers["classifier", "saved"].parameters == {"two": 16 * 3 + 3}
    assert len(layers) == 3 + 1 + 6 + 1
    names = [layer.name for layer in model.get_layer_status()]
    assert (
        names.index("words") < names.index("encoder.layer.0.attention.self.query") < names.index("classifier")
    )


def test_the_status_follows_what_happens(model):
    assert model.get_model_status().num_adapter_layers == 3 + 1 + 6
    model.set_adapter(["one", "two"])
    assert model.get_model_status().active_adapters == ["one", "two"]
    with model.disable_adapter():
        assert not model.get_model_status().enabled
        assert not any(layer.enabled for layer in model.get_layer_status())
    model.merge_adapter(["two"])
    merged = {layer.name for layer in model.get_layer_status() if layer.merged_adapters}
    assert "classifier" in merged
    assert "words" not in merged
    assert model.get_model_status().merged_adapters == ["two"]
    model.unmerge_adapter()
    model.add_adapter("frozen", [LoraConfig(target_modules=["key"], inference_mode=True), LoraConfig(r=1)])
    status = model.get_model_status()
    assert status.requires_grad == {"one": True, "two": True, "frozen": False}
    assert status.peft_types["frozen"] == "LORA + LORA"
