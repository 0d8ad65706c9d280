"""Sentences become numbers of tokens, by the ``tokenizer.json`` beside a model's weights. Imports no torch.

Nothing is cut, and nothing that the tokenizer does not know is let through: either would give an embedding of another
sentence than the one that was approved.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedvfm import errors
from fedvfm.backbones import identity
from fedvfm.config import words as words_config

FILE, SETTINGS = identity.TOKENIZER
CLIP, SIGLIP = "clip", "siglip"
MOST_BYTES = 64 << 20
_LEGACY_END = 2
"""``eos_token_id`` of older configurations of CLIP, which says nothing."""


@dataclass(frozen=True)
class Encoded:
    """Sentences of one length.

    Attributes:
        ids: sentence by sentence, class after class, filled up behind the end.
        ends: place of the token whose state is the sentence's.
        first: tokens before the words.
    """

    ids: tuple[tuple[int, ...], ...]
    ends: tuple[int, ...]
    first: int


class Tokenizer:
    """The tokenizer of one model.

    Args:
        folder: where the weights lie.
        config: what ``config.json`` says.

    Attributes:
        sha256: of ``tokenizer.json``.

    Raises:
        TokenizerError: if it is missing, damaged, or of another model.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.path = folder / FILE
        self.kind = str(config.get("model_type"))
        text = config.get("text_config")
        self._text: Mapping[str, Any] = text if isinstance(text, dict) else {}
        self.sha256, self._own, values = self._read()
        self._special = {
            int(row["id"]) for row in values.get("added_tokens") or () if isinstance(row, dict) and row.get("special")
        }
        self._unknown = self._unknown_of(values.get("model"))
        self._begin, self._end = self._marks()
        self.pad = self._end[-1] if self.kind == CLIP else self._pad(values)

    def _read(self) -> tuple[str, Any, dict[str, Any]]:
        import tokenizers

        try:
            if self.path.stat().st_size > MOST_BYTES:
                raise ValueError
            data = self.path.read_bytes()
            values = json.loads(data)
            own = tokenizers.Tokenizer.from_buffer(data)
            sha256 = identity.sha256_of(self.path)
        except FileNotFoundError:
            raise errors.TokenizerError(
                f"{self.path}: is not there; sentences cannot be read without it. Bring the tokenizer.json that was "
                "published with the weights"
            ) from None
        except Exception as error:  # the library raises plain exceptions for what it cannot read
            raise errors.TokenizerError(
                f"{self.path}: cannot be read ({type(error).__name__}). Bring the tokenizer.json that was published "
                "with the weights"
            ) from None
        own.no_padding()
        own.no_truncation()
        return sha256, own, values if isinstance(values, dict) else {}

    def _unknown_of(self, model: Any) -> int | None:
        """Number of the token that stands for what the tokenizer does not know."""
        if not isinstance(model, dict):
            return None
        if isinstance(model.get("unk_id"), int):
            return int(model["unk_id"])
        name = model.get("unk_token")
        ids: int | None = self._own.token_to_id(name) if isinstance(name, str) else None
        return ids

    def _marks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tokens before and behind every sentence."""
        both = self._own.encode("").ids
        wanted = 2 if self.kind == CLIP else 1
        said = self._text.get("eos_token_id")
        wrong = len(both) != wanted or (
            self.kind == CLIP and isinstance(said, int) and said != _LEGACY_END and said != both[-1]
        )
        size = self._text.get("vocab_size")
        if wrong or (isinstance(size, int) and max(both) >= size):
            raise errors.TokenizerError(
                f"{self.path}: puts {both[:4]} around a sentence; a {self.kind} model has "
                f"{'a begin and an end token' if wanted == 2 else 'an end token alone'}, of numbers that its "
                "config.json knows. Bring the tokenizer.json that was published with the weights"
            )
        return tuple(both[:-1]), tuple(both[-1:])

    def _pad(self, values: Mapping[str, Any]) -> int:
        """What short sentences are filled up with: its state is read too, so it must be the one of the training."""
        padding = values.get("padding")
        if isinstance(padding, dict) and isinstance(padding.get("pad_id"), int):
            return int(padding["pad_id"])
        beside = self.path.with_name(SETTINGS)
        if beside.is_file():
            named = identity.read_json(beside).get("pad_token")
            name = named.get("content") if isinstance(named, dict) else named
            ids = self._own.token_to_id(name) if isinstance(name, str) else None
            if ids is not None:
                return int(ids)
        said = self._text.get("pad_token_id", 1)
        return said if isinstance(said, int) else 1

    def encode(self, words: words_config.WordsConfig, class_names: Sequence[str], length: int) -> Encoded:
        """All sentences of a recipe.

        Args:
            words: of the recipe.
            class_names: of its data.
            length: tokens that the text tower takes at most.

        Raises:
            WordsError: naming every sentence that cannot be read as it is meant.
        """
        wrong: list[str] = []
        begins = self._ids(words.begins) if words.learned else []
        if words.learned and begins and len(begins) != words.context:
            wrong.append(
                f"context = {words.context}: '{words.begins}' has {len(begins)} tokens, and each vector begins as one; "
                f"set context = {len(begins)}"
            )
        rows: list[tuple[int, ...]] = []
        seen: dict[tuple[int, ...], str] = {}
        room, size = length - len(self._begin) - len(self._end), self._text.get("vocab_size")
        if isinstance(size, int) and self.pad >= size:
            wrong.append(f"pad = {self.pad}: the model knows {size} tokens; leave it to 'fedvfm recipe lock'")
        for sentence in (each for group in words.sentences(class_names) for each in group):
            ids = self._ids(sentence)
            wrong += self._sentence_faults(sentence, ids, begins, room, words)
            if words.learned and not begins:
                ids = [self._end[-1]] * words.context + ids
            key = tuple(ids)
            if key in seen:
                wrong.append(f"'{sentence}' and '{seen[key]}' are the same to the tokenizer; word them otherwise")
            seen[key] = sentence
            rows.append((*self._begin, *ids, *self._end))
        if wrong:
            raise errors.WordsError("recipe.words", list(dict.fromkeys(wrong)))
        full = length if self.kind == SIGLIP else max(map(len, rows))
        ends = tuple(full - 1 if self.kind == SIGLIP else len(row) - 1 for row in rows)
        return Encoded(tuple((*row, *(self.pad,) * (full - len(row))) for row in rows), ends, len(self._begin))

    def _ids(self, text: str) -> list[int]:
        return list(self._own.encode(text, add_special_tokens=False).ids)

    def _sentence_faults(
        self, sentence: str, ids: Sequence[int], begins: Sequence[int], room: int, words: words_config.WordsConfig
    ) -> list[str]:
        size = self._text.get("vocab_size")
        if self.kind == SIGLIP and any(not (each.islower() or each.isdigit() or each == " ") for each in sentence):
            return [f"'{sentence}': a siglip model was trained on small letters without punctuation; write it so"]
        if not ids or self._unknown in ids or self._special & set(ids):
            return [f"'{sentence}': holds words or signs that the tokenizer does not know; word it otherwise"]
        if isinstance(size, int) and max(ids) >= size:
            return [f"'{sentence}': has a token of number {max(ids)}, the model knows {size}; bring its own {FILE}"]
        count = len(ids) + (words.context if words.learned and not begins else 0)
        if count > room:
            return [f"'{sentence}': has {count} tokens, the model takes {room}; shorten it"]
        if list(ids[: len(begins)]) != list(begins):
            return [
                f"'{sentence}': its first tokens are not those of '{words.begins}'; put another word before the class"
            ]
        return []


def pinned(
    folder: Path, config: Mapping[str, Any], words: words_config.WordsConfig, class_names: Sequence[str]
) -> words_config.WordsConfig:
    """The words with what locking writes into them, once every sentence could be read.

    Raises:
        TokenizerError, WordsError: if the tokenizer or a sentence cannot be used.
    """
    own = opened(folder, config, words)
    own.encode(words, class_names, own_length(config))
    pad = own.pad if own.kind == SIGLIP else None
    return words.model_copy(update={"tokenizer_sha256": own.sha256, "pad": pad if words.pad is None else words.pad})


def opened(folder: Path, config: Mapping[str, Any], words: words_config.WordsConfig) -> Tokenizer:
    """The tokenizer of a folder of weights, which is the one that a recipe pins.

    Raises:
        TokenizerError: if it is missing, damaged, another, or of another model.
    """
    own = Tokenizer(folder, config)
    if words.tokenizer_sha256 not in (None, own.sha256):
        raise errors.TokenizerError(
            f"{own.path}: sha256 is {own.sha256[:16]}..., the recipe pins {str(words.tokenizer_sha256)[:16]}...: "
            "sentences would be read otherwise. Bring the tokenizer.json that the coordinator has"
        )
    if words.pad is not None:
        own.pad = words.pad
    return own


def own_length(config: Mapping[str, Any]) -> int:
    """Tokens that the text tower takes at most, of ``config.json``, else transformers' own default."""
    text = config.get("text_config")
    said = text.get("max_position_embeddings") if isinstance(text, dict) else None
    return said if isinstance(said, int) else 64 if config.get("model_type") == SIGLIP else 77
