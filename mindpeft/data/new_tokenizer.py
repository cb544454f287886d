"""A byte-level tokenizer learnt from texts, for models that begin from nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mindpeft.data.named_templates import TEMPLATES
from mindpeft.data.tokenizer_files import read_tokenizer_folder, write_tokenizer_folder
from mindpeft.files import atomic_write, write_json

SPECIAL = {"pad": "<pad>", "bos": "<s>", "eos": "</s>"}
TURNS = ("<|im_start|>", "<|im_end|>")  # those of the chatml template


def learn_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> dict[str, int]:
    """Learn byte pairs, and write a tokenizer with the chatml template into a folder.

    Args:
        texts: to learn from.
        vocab_size: tokens, the 256 bytes and the special ones included.
        folder: where to.

    Returns:
        ``vocab_size`` as it came out, and the ids of the special tokens, by their config keys.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL.values(), *TURNS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    with atomic_write(folder / "tokenizer.json", "w") as file:
        file.write(backend.to_str(pretty=True))
    config = {f"{role}_token": token for role, token in SPECIAL.items()}
    write_json(folder / "tokenizer_config.json", config | {"chat_template": TEMPLATES["chatml"]})
    write_tokenizer_folder(read_tokenizer_folder(folder), folder)
    ids = {f"{role}_token_id": backend.token_to_id(token) for role, token in SPECIAL.items()}
    return {"vocab_size": backend.get_vocab_size(), **ids}
