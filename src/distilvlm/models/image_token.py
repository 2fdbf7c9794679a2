"""The id of `<image>`: a spare row of the embedding where there is one, otherwise one past the end."""

from __future__ import annotations

import logging

from transformers import AddedToken, PreTrainedTokenizerBase

from .vlm import IMAGE_TOKEN

log = logging.getLogger(__name__)


def place_image_token(tokenizer: PreTrainedTokenizerBase, rows: int) -> int:
    """Make `<image>` a special token of the tokenizer (in place) and return its id.

    Many embeddings have more rows than the tokenizer has ids (Qwen2.5: 151,936 and 151,665): the next id is then a
    row that no text uses. Others have none to spare (SmolLM2): the id is then `rows`, which is never embedded, so that
    cross-entropy and divergence keep the model's own vocabulary. Also gives a tokenizer without padding token one.

    Raises:
        ValueError: the tokenizer has ids that the embedding has no row for.
    """
    highest = max(tokenizer.get_vocab().values())
    known = tokenizer.get_vocab().get(IMAGE_TOKEN)
    others = max((id for token, id in tokenizer.get_vocab().items() if token != IMAGE_TOKEN), default=-1)
    if others >= rows:
        raise ValueError(
            f"the tokenizer has ids up to {highest}, but the language model's embedding has {rows} rows: "
            "this tokenizer is another model's"
        )
    # Also where the token is there already: it may be an ordinary one, which text could be split around differently.
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert isinstance(image_id, int)
    if (known is None and image_id <= others) or image_id > rows:
        raise ValueError(
            f"'{IMAGE_TOKEN}' got id {image_id}, which the embedding's {rows} rows and the tokenizer's other ids "
            f"(up to {others}) leave no place for: renumber the tokenizer's added tokens without gaps"
        )
    if image_id == rows:
        log.info(
            "no embedding row to spare for %s: id %d is virtual, only a saved model has a row for it", IMAGE_TOKEN, rows
        )
    else:
        log.info("%s has id %d of %d embedding rows", IMAGE_TOKEN, image_id, rows)
    _require_padding(tokenizer)
    return image_id


def _require_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is not None:
        return
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has neither a padding nor an end-of-text token: give it 'eos_token'")
    tokenizer.pad_token = tokenizer.eos_token
    log.info("the tokenizer has no padding token: padding with its end-of-text token %r", tokenizer.eos_token)
