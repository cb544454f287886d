"""Written texts against transformers' ``generate``: token for token."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
import transformers
from mindspore import Tensor

from mindpeft import LoraConfig, PeftModel, get_peft_model
from mindpeft.errors import InputError
from mindpeft.generate import GenerationConfig
from mindpeft.generate.session import bucket
from mindpeft.generate.text import sessions_of
from mindpeft.models import AutoModel, AutoModelForCausalLM
from tests.models.decoders import ARCHITECTURES, PAD, make_decoder, make_texts

pytestmark = pytest.mark.usefixtures("graph_mode")

PROMPTS = make_texts(length=9, left=True)
SETTINGS = {
    "greedy": {"max_new_tokens": 12},
    "beams": {"max_new_tokens": 12, "num_beams": 3},
    "penalties": {"max_new_tokens": 12, "repetition_penalty": 1.4, "min_new_tokens": 6},
    "best of several": {
        "max_new_tokens": 12,
        "num_beams": 4,
        "num_return_sequences": 2,
        "length_penalty": 2.0,
        "early_stopping": True,
    },
    "many ends": {
        "max_new_tokens": 20,
        "num_beams": 3,
        "early_stopping": "never",
        "length_penalty": 0.5,
        "eos_token_id": list(range(2, 60)),
    },
}


def theirs_written(model, settings: dict, prompts=PROMPTS) -> np.ndarray:
    with torch.no_grad():
        return model.generate(
            input_ids=torch.tensor(prompts["input_ids"]).long(),
            attention_mask=torch.tensor(prompts["attention_mask"]),
            **{"do_sample": False, "pad_token_id": PAD, **settings},
        ).numpy()


def ours_written(model, settings: dict, prompts=PROMPTS) -> np.ndarray:
    tokens, mask = prompts["input_ids"], prompts["attention_mask"]
    return model.generate(tokens, mask, **{"pad_token_id": PAD, **settings}).asnumpy()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return make_decoder("llama", folder), AutoModelForCausalLM.from_pretrained(folder), folder


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_written_as_by_transformers(llama, settings):
    theirs, ours, _ = llama
    np.testing.assert_array_equal(ours_written(ours, settings), theirs_written(theirs, settings))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "bloom" else pytest.mark.slow)
        for name in ARCHITECTURES.values()
    ],
)
def test_architectures(tmp_path, name):
    """Greedy and by beams, prompts padded on the left; the cached step sees what the whole text would."""
    theirs, ours = make_decoder(name, tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    for settings in (SETTINGS["greedy"], SETTINGS["beams"]):
        np.testing.assert_array_equal(ours_written(ours, settings), theirs_written(theirs, settings))
    tokens = ours_written(ours, SETTINGS["greedy"])[:1]  # without padding
    uncached = ours(Tensor(tokens[:, :-1])).asnumpy()[0].argmax(-1)
    np.testing.assert_array_equal(uncached[8:], tokens[0, 9:])


def test_stories260k(shared_dir):
    folder = shared_dir / "checkpoints" / "stories260K"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    ours = AutoModelForCausalLM.from_pretrained(folder)
    begin = {"input_ids": np.array([[1]]), "attention_mask": np.array([[1]])}
    settings = {"max_new_tokens": 200}
    written = ours_written(ours, settings, begin)
    np.testing.assert_array_equal(written, theirs_written(theirs, settings, begin))
    whole = ours(Tensor(written[:, :-1].astype(np.int32))).asnumpy()[0].argmax(-1)
    np.testing.assert_array_equal(whole, written[0, 1:])  # without the cache


ADAPTERS = {
    "LoRA": peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False),
    "(IA)3": peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "P-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, encoder_hidden_size=32),
}


def with_adapter(folder, config: peft.PeftConfig, place) -> peft.PeftModel:
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base.eval(), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(place)
    return theirs


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("LoRA", "prompt") else pytest.mark.slow) for name in ADAPTERS],
)
def test_with_an_adapter(llama, tmp_path, name):
    """As PEFT writes; of virtual tokens without padding only, where PEFT leaves a gap behind them."""
    folder = llama[2]
    theirs = with_adapter(folder, ADAPTERS[name], tmp_path)
    ours = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    prompts = PROMPTS if name in ("LoRA", "(IA)3", "prefix") else {k: v[:1] for k, v in PROMPTS.items()}
    for settings in (SETTINGS["greedy"], SETTINGS["beams"]):
        expected = theirs_written(theirs, settings, prompts)
        if expected.shape[1] <= 12:  # PEFT gives the new tokens alone where embeddings went in
            expected = np.concatenate((prompts["input_ids"], expected), 1)
        np.testing.assert_array_equal(ours_written(ours, settings, prompts), expected)
    padded = {key: value[1:2] for key, value in PROMPTS.items()}
    alone = {key: value[1:2, 4:] for key, value in PROMPTS.items()}
    together = ours_written(ours, SETTINGS["greedy"], padded)[:, 9:]
    np.testing.assert_array_equal(together, ours_written(ours, SETTINGS["greedy"], alone)[:, 5:])


def test_adapters_by_row_and_switching_compile_nothing(llama):
    folder = llama[2]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), _lora(4), "one")
    model.add_adapter("two", _lora(8))
    model.set_train(False)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = ours_written(model, SETTINGS["greedy"])
    with model.disable_adapter():
        alone[None] = ours_written(model, SETTINGS["greedy"])
    session = sessions_of(model).kept
    graphs = len(session.prompt_step.compile_cache), len(session.token_step.compile_cache)
    assert graphs == (1, 1)
    assert len({texts.tobytes() for texts in alone.values()}) == 3
    for names in ((None, "one", "two"), ("two", "one", None)):
        mixed = ours_written(model, {**SETTINGS["greedy"], "adapter_names": list(names)})
        for row, name in enumerate(names):
            np.testing.assert_array_equal(mixed[row], alone[name][row])
    session = sessions_of(model._mixed).kept
    assert (len(session.prompt_step.compile_cache), len(session.token_step.compile_cache)) == (1, 1)
    beams = {**SETTINGS["beams"], "adapter_names": ["one", "two", "one"]}
    model.set_adapter("two")
    np.testing.assert_array_equal(ours_written(model, beams)[1], ours_written(model, SETTINGS["beams"])[1])


def _lora(rank: int) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
    )


def test_graphs_are_used_again(llama):
    ours = llama[1]
    sessions_of(ours).kept = None
    first = ours.generate(PROMPTS["input_ids"][:, :8], max_new_tokens=6)
    session = sessions_of(ours).kept
    assert session.prompt == bucket(8) == 16
    ours.generate(PROMPTS["input_ids"], max_new_tokens=7, do_sample=True, temperature=0.7)
    assert sessions_of(ours).kept is session
    assert len(session.prompt_step.compile_cache) == len(session.token_step.compile_cache) == 1
    again = ours.generate(PROMPTS["input_ids"][:, :8], max_new_tokens=6)
    np.testing.assert_array_equal(first.asnumpy(), again.asnumpy())
    assert all(attention.cache is None for attention in session.attentions)


def test_the_same_seed_draws_the_same(llama):
    ours, settings = llama[1], {"max_new_tokens": 10, "do_sample": True, "temperature": 2.0}
    texts = [ours_written(ours, {**settings, "seed": seed}) for seed in (1, 1, 2)]
    np.testing.assert_array_equal(texts[0], texts[1])
    assert (texts[0] != texts[2]).any()
    several = ours_written(ours, {**settings, "num_return_sequences": 2, "seed": 1})
    assert several.shape == (6, 19)
    assert (several[0] != several[1]).any()


def test_lists_of_unequal_length(llama):
    ours = llama[1]
    rows = [row[row != PAD].tolist() for row in PROMPTS["input_ids"]]
    found = ours.generate(rows, max_new_tokens=12, pad_token_id=PAD).asnumpy()
    np.testing.assert_array_equal(found, ours_written(ours, SETTINGS["greedy"]))


def test_ends_and_what_is_behind(llama):
    theirs, ours, _ = llama
    plain = ours_written(ours, SETTINGS["greedy"])
    settings = {"max_new_tokens": 12, "eos_token_id": [int(plain[0, 12]), int(plain[1, 14])]}
    found = ours_written(ours, settings)
    np.testing.assert_array_equal(found, theirs_written(theirs, settings))
    assert found[0, -1] == PAD or found.shape[1] < 21
    by_length = ours_written(ours, {"max_length": 15})
    assert by_length.shape[1] == 15


REFUSED = {
    "unknown": ({"max_tokens": 5}, "no argument 'max_tokens'; did you mean 'max_"),
    "temperature": ({"temperature": 0.0}, "temperature must be a number greater than 0"),
    "top_p": ({"top_p": 1.5}, r"top_p must be a number in \(0, 1\]"),
    "beams": ({"num_beams": 0}, "num_beams must be an integer, 1 or more"),
    "copies": ({"num_return_sequences": 2}, "needs do_sample=true or as many num_beams"),
    "stop": ({"stop_strings": ["x"]}, "stop_strings needs the tokenizer"),
    "stop text": ({"stop_strings": [""]}, "texts that are not empty"),
    "eos": ({"eos_token_id": "end"}, "one or several token numbers"),
    "early": ({"early_stopping": "always"}, 'true, false or "never"'),
    "length": ({"max_length": 9}, "leaves no more"),
    "streamer": ({"streamer": object()}, "a streamer shows one text"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_settings(llama, settings, message):
    with pytest.raises(InputError, match=message):
        ours_written(llama[1], settings)


def test_refused_prompts(llama, tmp_path):
    ours = llama[1]
    tokens, mask = PROMPTS["input_ids"], PROMPTS["attention_mask"]
    with pytest.raises(InputError, match="padded on the left"):
        ours.generate(tokens, mask[:, ::-1])
    with pytest.raises(InputError, match=r"attention_mask is \(3, 8\), but input_ids is \(3, 9\)"):
        ours.generate(tokens, mask[:, 1:])
    with pytest.raises(InputError, match=r"must be \(batch, length\) integers"):
        ours.generate(tokens[0])
    with pytest.raises(InputError, match="holds no prompt"):
        ours.generate([])
    with pytest.raises(InputError, match="bos_token_id"):
        ours.generate([[]], bos_token_id=None)
    make_decoder("gpt2", tmp_path)
    with pytest.raises(InputError, match="max_position_embeddings is 64; lower max_new_tokens"):
        AutoModelForCausalLM.from_pretrained(tmp_path).generate(tokens, mask, max_new_tokens=60)


def test_settings_of_the_folder(llama, tmp_path):
    theirs, _, _ = llama
    theirs.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6], "top_k": 7, "other": 1}')
    assert GenerationConfig.from_folder(tmp_path).top_k == 7
    ours = AutoModelForCausalLM.from_pretrained(tmp_path)
    settings = {"max_new_tokens": 15, "eos_token_id": [5, 6]}
    np.testing.assert_array_equal(
        ours_written(ours, {"max_new_tokens": 15}), theirs_written(theirs, settings)
    )
    (tmp_path / "generation_config.json").write_text('{"top_k": -1}')
    with pytest.raises(InputError, match=r"generation_config.json: top_k must be an integer, 0 or more"):
        ours.generate(PROMPTS["input_ids"])


def test_an_encoder_can_not_write(minilm_dir):
    from mindpeft.generate import generate

    with pytest.raises(InputError, match="can't generate: it is no decoder"):
        generate(AutoModel.from_pretrained(minilm_dir), [[1, 2]])


def test_an_answer_ends_with_its_turn(llama, tmp_path):
    from mindpeft.data.named_templates import TEMPLATES
    from mindpeft.data.new_tokenizer import learn_tokenizer
    from mindpeft.data.tokenization import AutoTokenizer
    from mindpeft.generate.turns import end_of_turns, lead_of_turns

    learn_tokenizer(["some words to learn"] * 9, 300, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end_of_turns(llama[1], tokenizer, TEMPLATES["chatml"]) == {"eos_token_id": [2, end]}
    assert end_of_turns(llama[1], tokenizer, TEMPLATES["vicuna"]) == {"eos_token_id": [2]}
    assert end_of_turns(llama[1], tokenizer, TEMPLATES["gemma"]) == {"stop_strings": ["<end_of_turn>"]}
    assert end_of_turns(llama[1], tokenizer, "{{ messages[-1].content }}") == {}
    assert end_of_turns(llama[1], tokenizer, TEMPLATES["chatglm3"]) == {"stop_strings": ["<|user|>"]}
    leads = {name: lead_of_turns(tokenizer, TEMPLATES[name]) for name in ("chatml", "llama2", "chatglm3")}
    assert leads == {"chatml": "", "llama2": " ", "chatglm3": "\n "}
