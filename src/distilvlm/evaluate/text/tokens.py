"""Text as the tokens that a likelihood is asked of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from distilvlm.data.markers import neutralise
from distilvlm.data.problems import DataError, RowError
from distilvlm.models.vlm import VLM


@dataclass(frozen=True)
class Tokens:
    """A text's tokens; special ones that the tokenizer puts in front (BOS) have no characters."""

    ids: list[int]
    ends: list[int]  # of each token, where its characters end in the text

    def behind(self, characters: int) -> int:
        """The first token with a character behind so many: one that lies on both sides is behind, too."""
        return next((number for number, end in enumerate(self.ends) if end > characters), len(self.ids))


def harmless(text: str, where: str) -> str:
    """`text` without what the tokenizer of a VLM would take for a picture.

    Raises:
        DataError: half of a surrogate pair, which no tokenizer takes; says `where`.
    """
    try:
        return neutralise(text, "text")[0]
    except RowError as error:
        raise DataError(f"{where}: {error}") from None


def tokenised(vlm: VLM, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of each text (a `harmless` one) as training has them: with BOS where the tokenizer puts one.

    Raises:
        DataError: a slow tokenizer, which does not say where its tokens lie.
    """
    tokenizer: Any = vlm.tokenizer
    if not tokenizer.is_fast:
        raise DataError(f"{tokenizer.name_or_path}: a slow tokenizer gives no offsets; use its fast version")
    if not texts:
        return []
    found = tokenizer(list(texts), return_offsets_mapping=True, truncation=False, padding=False, verbose=False)
    return [_tokens(ids, spans) for ids, spans in zip(found["input_ids"], found["offset_mapping"], strict=True)]


def _tokens(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> Tokens:
    length = len(ids)
    while length and spans[length - 1] == (0, 0):  # an end of text, which nobody has written
        length -= 1
    return Tokens(list(ids[:length]), [end for _, end in spans[:length]])


def opening(vlm: VLM) -> int:
    """What stands before a text's first token, so that this, too, is predicted: BOS, or the end of another text.

    Raises:
        DataError: the tokenizer has neither.
    """
    tokenizer: Any = vlm.tokenizer
    for found in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if found is not None and found < vlm.embedding_rows:
            return found
    raise DataError(f"{tokenizer.name_or_path} has neither a BOS nor an EOS token that a text could begin behind")


def context(vlm: VLM) -> int | None:
    """How many tokens the model can read; None where it does not say."""
    return getattr(vlm.model.config.get_text_config(), "max_position_embeddings", None)
