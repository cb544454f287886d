"""Text to token ids and back: what ``transformers.AutoTokenizer`` gives, on ``tokenizers`` alone."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from mindpeft.data.chat_template import Message, render
from mindpeft.data.named_templates import TEMPLATES
from mindpeft.data.tokenizer_files import ROLES, TokenizerFiles, read_tokenizer_folder, write_tokenizer_folder
from mindpeft.errors import InputError, did_you_mean

NO_LIMIT = 1_000_000  # transformers writes 1e30 as model_max_length where a model has none
TRUNCATIONS = {True: "longest_first", "longest_first": "longest_first"}
TRUNCATIONS |= {"only_first": "only_first", "only_second": "only_second", False: None}
PADDINGS = (False, True, "longest", "max_length")


class AutoTokenizer:
    """Finds the tokenizer of a model folder."""

    @staticmethod
    def from_pretrained(folder: str | os.PathLike) -> Tokenizer:
        """Load the tokenizer of a Hugging Face folder (``tokenizer.json``, or ``vocab.txt`` alone).

        Raises:
            InputError: no such folder, no tokenizer in it, or a corrupt file.
        """
        return Tokenizer(read_tokenizer_folder(Path(folder)))


class BatchEncoding(dict):
    """Column name -> list(s) of ids, and which word each token came from."""

    def __init__(self, columns: dict[str, Any], encodings: list[tokenizers.Encoding]):
        super().__init__(columns)
        self._encodings = encodings

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token of row ``batch_index``: the index of its word; None for a special token."""
        return self._encodings[batch_index].word_ids

    @property
    def truncated(self) -> int:
        """How many rows lost tokens to ``max_length``."""
        return sum(bool(encoding.overflowing) for encoding in self._encodings)


class Tokenizer:
    """A tokenizer with the interface and the output of transformers' fast tokenizers.

    Attributes:
        model_max_length: the longest input of the model in tokens, None if it has no limit.
        model_input_names: the columns that the model takes, in order.
        padding_side, truncation_side: ``"right"`` or ``"left"``.
    """

    def __init__(self, files: TokenizerFiles):
        self._files = files
        self._backend = files.backend
        config = files.config
        limit = config.get("model_max_length") or NO_LIMIT
        self.model_max_length: int | None = int(limit) if limit < NO_LIMIT else None
        self.padding_side: str = config.get("padding_side", "right")
        self.truncation_side: str = config.get("truncation_side", "right")
        default = ["input_ids", "token_type_ids", "attention_mask"]
        if not files.is_wordpiece:
            default.remove("token_type_ids")
        self.model_input_names: list[str] = config.get("model_input_names", default)

    def __call__(
        self,
        text: str | Sequence[str] | Sequence[Sequence[str]],
        text_pair: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
        *,
        max_length: int | None = None,
        truncation: bool | str = True,
        add_special_tokens: bool = True,
        padding: bool | str = False,
        is_split_into_words: bool = False,
        return_offsets_mapping: bool = False,
    ) -> BatchEncoding:
        """Encode one text, a list of texts, or pairs of them.

        Args:
            text: one text or a list; with ``is_split_into_words``, one list of words or a list of such lists.
            text_pair: the second texts, in the same form.
            max_length: most tokens of a row, special tokens included; the model's own limit if None.
            truncation: True or ``"longest_first"`` (a pair loses tokens from its longer side),
                ``"only_first"``, ``"only_second"``, or False.
            add_special_tokens: whether to add the likes of [CLS] and [SEP].
            padding: False, ``"longest"`` (True), or ``"max_length"``.
            is_split_into_words: the words are given; see ``BatchEncoding.word_ids``.
            return_offsets_mapping: adds ``offset_mapping``, (start, end) characters of each token.

        Returns:
            ``input_ids``, ``token_type_ids`` (where the model takes them) and ``attention_mask``: lists of
            int for one text, lists of lists for a list.

        Raises:
            InputError: an option out of its range, or lists of unequal length.
        """
        is_batch = not isinstance(text, str)
        if is_split_into_words:
            is_batch = bool(text) and not isinstance(text[0], str)
        rows = list(text) if is_batch else [text]
        if text_pair is not None:
            pairs = list(text_pair) if is_batch else [text_pair]
            if len(pairs) != len(rows):
                raise InputError(f"{len(rows)} texts but {len(pairs)} second texts: give one for each")
            rows = list(zip(rows, pairs, strict=True))
        self._set_truncation(truncation, max_length, add_special_tokens, text_pair is not None)
        self._set_padding(padding, max_length)
        encodings = self._backend.encode_batch(
            rows, add_special_tokens=add_special_tokens, is_pretokenized=is_split_into_words
        )
        columns = self._columns(encodings, return_offsets_mapping)
        if not is_batch:
            columns = {name: values[0] for name, values in columns.items()}
        return BatchEncoding(columns, encodings)

    def decode(self, token_ids: int | Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of one sequence of ids."""
        ids = [token_ids] if isinstance(token_ids, int) else [int(i) for i in token_ids]
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Iterable[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """The texts of several sequences of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def convert_ids_to_tokens(self, ids: int | Iterable[int]) -> str | list[str]:
        """The token of an id, or of each id."""
        if isinstance(ids, int):
            return self._backend.id_to_token(ids)
        return [self._backend.id_to_token(int(i)) for i in ids]

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> int | list[int | None] | None:
        """The id of a token, or of each token; the unknown token's id for one outside the vocabulary."""
        if isinstance(tokens, str):
            found = self._backend.token_to_id(tokens)
            return self.unk_token_id if found is None else found
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text, without special tokens and without truncation."""
        return self.convert_ids_to_tokens(self(text, truncation=False, add_special_tokens=False)["input_ids"])

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """How many special tokens one text, or a pair, gets."""
        return self._backend.num_special_tokens_to_add(pair)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the tokenizer's files into ``folder``; transformers opens them.

        Raises:
            InputError: the folder can't be written.
        """
        write_tokenizer_folder(self._files, Path(folder))

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary without added tokens."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """``cls_token`` -> ``[CLS]`` and so on, for the roles that this tokenizer has."""
        return {f"{role}_token": token for role, token in self._files.special_tokens.items()}

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own template of conversations, Jinja text; None if it has none."""
        return self._files.chat_template

    @property
    def template_variables(self) -> dict[str, str]:
        """What chat templates may use: ``bos_token``, ``eos_token`` and so on, empty where there is none."""
        return {f"{role}_token": self._files.special_tokens.get(role, "") for role in ROLES}

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **variables: Any,
    ) -> str | list[int]:
        """A conversation as one text, or its tokens.

        Args:
            conversation: messages with ``role`` and ``content``.
            chat_template: Jinja text, or the name of a template; the checkpoint's own if None.
            add_generation_prompt: end with what introduces the assistant's next words.
            tokenize: return token ids; else the text.
            variables: what else the template may use.

        Raises:
            InputError: there is no template, or it refuses the conversation.
        """
        template = TEMPLATES.get(chat_template, chat_template) or self.chat_template
        if template is None:
            raise InputError(
                f"this tokenizer has no chat template: give chat_template, such as {', '.join(TEMPLATES)}"
            )
        text = render(
            template,
            conversation,
            add_generation_prompt=add_generation_prompt,
            **{**self.template_variables, **variables},
        )
        return self(text, truncation=False, add_special_tokens=False)["input_ids"] if tokenize else text

    @property
    def added_tokens(self) -> tuple[str, ...]:
        """The tokens beside the vocabulary, and the special ones in it."""
        added = [token.content for token in self._backend.get_added_tokens_decoder().values()]
        return tuple(dict.fromkeys([*added, *self._files.special_tokens.values()]))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the special tokens, each once, in rising order."""
        return sorted({self._backend.token_to_id(token) for token in self._files.special_tokens.values()})

    def _special_id(self, role: str) -> int | None:
        token = self._files.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)

    @property
    def unk_token_id(self) -> int | None:
        """Id of the unknown token, None if there is none."""
        return self._special_id("unk")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token, None if there is none."""
        return self._special_id("pad")

    @property
    def cls_token_id(self) -> int | None:
        """Id of the token that stands first in BERT's input, None if there is none."""
        return self._special_id("cls")

    @property
    def sep_token_id(self) -> int | None:
        """Id of the token that ends each text in BERT's input, None if there is none."""
        return self._special_id("sep")

    @property
    def mask_token_id(self) -> int | None:
        """Id of the token that masked language models fill in, None if there is none."""
        return self._special_id("mask")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, None if there is none."""
        return self._special_id("bos")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, None if there is none."""
        return self._special_id("eos")

    def _set_truncation(
        self, truncation: bool | str, max_length: int | None, special: bool, pair: bool
    ) -> None:
        if truncation not in TRUNCATIONS:
            hint = did_you_mean(str(truncation), [key for key in TRUNCATIONS if isinstance(key, str)])
            raise InputError(
                f"truncation={truncation!r} is unknown: "
                f"use True, False, longest_first, only_first or only_second{hint}"
            )
        strategy, limit = TRUNCATIONS[truncation], self._limit(max_length)
        if strategy is None or limit is None:
            self._backend.no_truncation()
            return
        least = (self.num_special_tokens_to_add(pair) if special else 0) + 1
        if limit < least:
            raise InputError(f"max_length={limit} leaves no room for text: use {least} or more")
        self._backend.enable_truncation(limit, strategy=strategy, direction=self.truncation_side)

    def _set_padding(self, padding: bool | str, max_length: int | None) -> None:
        if padding not in PADDINGS:
            hint = did_you_mean(str(padding), PADDINGS)
            raise InputError(f"padding={padding!r} is unknown: use False, 'longest' or 'max_length'{hint}")
        if not padding:
            self._backend.no_padding()
            return
        if self.pad_token_id is None:
            raise InputError("padding is asked for but this tokenizer has no pad_token")
        length = self._limit(max_length) if padding == "max_length" else None
        if padding == "max_length" and length is None:
            raise InputError("padding='max_length' needs max_length: this tokenizer has no model_max_length")
        self._backend.enable_padding(
            direction=self.padding_side,
            pad_id=self.pad_token_id,
            pad_token=self._files.special_tokens["pad"],
            length=length,
        )

    def _limit(self, max_length: int | None) -> int | None:
        return self.model_max_length if max_length is None else max_length

    def _columns(self, encodings: list[tokenizers.Encoding], offsets: bool) -> dict[str, list]:
        columns = {"input_ids": [encoding.ids for encoding in encodings]}
        if "token_type_ids" in self.model_input_names:
            columns["token_type_ids"] = [encoding.type_ids for encoding in encodings]
        columns["attention_mask"] = [encoding.attention_mask for encoding in encodings]
        if offsets:
            columns["offset_mapping"] = [encoding.offsets for encoding in encodings]
        return columns
