"""``mindpeft init-model``: a small decoder that has learnt nothing yet, with a tokenizer of its own."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from mindpeft.errors import InputError

# Sizes of Llama's shape, for a model of some three million numbers.
_SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def init_model(
    folder: Annotated[Path, typer.Argument(help="The checkpoint folder to make.")],
    sizes: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Keys of config.json.")
    ] = None,
    model_type: Annotated[str, typer.Option(help="llama, qwen2, mistral, gpt2, ...")] = "llama",
    vocab_size: Annotated[int, typer.Option(min=300, help="Tokens of the tokenizer.")] = 2048,
    data: Annotated[
        Path | None, typer.Option(help="Text for the tokenizer; default: Python's own documentation.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the weights.")] = 0,
) -> None:
    """Make a small decoder with random weights, to train from nothing: nothing to download.

    \b
    Examples:
      mindpeft init-model tiny-llama
      mindpeft init-model tiny-gpt2 --model-type gpt2 n_layer=4 n_embd=192 n_head=6
      mindpeft train scripts/recipes/causal_lm.yaml model.path=tiny-llama
    """
    import mindspore as ms

    from mindpeft.console import out
    from mindpeft.data.new_tokenizer import learn_tokenizer
    from mindpeft.models.auto import AutoModelForCausalLM, architecture

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is there already and not empty: choose another folder")
    heads = architecture(model_type, "--model-type").HEADS
    if "AutoModelForCausalLM" not in heads:
        raise InputError(f"--model-type {model_type} is no decoder")
    config_class = heads["AutoModelForCausalLM"].config_class
    keys = {entry.name for entry in fields(config_class)}
    known = {key: value for key, value in _SIZES.items() if key in keys}
    chosen = {**known, **_values(sizes or [])}
    config_class.from_dict({}, **chosen)  # refuses keys and values before anything is written
    texts = _texts(data)
    folder.mkdir(parents=True, exist_ok=True)
    special = learn_tokenizer(texts, vocab_size, folder)
    ms.set_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class.from_dict({}, **chosen, **special))
    model.save_pretrained(folder)
    count = sum(parameter.size for parameter in model.get_parameters())
    out.print(f"{folder}: a {model_type} of {count:,} random numbers and {special['vocab_size']} tokens")


def _values(texts: list[str]) -> dict[str, Any]:
    found = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise InputError(f"{text!r} is no size: write key=value, such as num_hidden_layers=4")
        found[key] = yaml.safe_load(value)
    return found


def _texts(data: Path | None) -> list[str]:
    if data is None:
        from mindpeft.data.stdlib_docs import load_stdlib_docs

        return [row.values["text"] for row in load_stdlib_docs()[0].rows]
    from mindpeft.data.readers import read_table

    table = read_table(data)
    return [value for row in table.rows for value in row.values.values() if isinstance(value, str)]
