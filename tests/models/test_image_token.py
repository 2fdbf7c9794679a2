"""The id of `<image>`, which text never uses."""

import json
import logging

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distilvlm.models.image_token import place_image_token


def test_a_spare_row_is_used_where_there_is_one_and_none_is_added_where_not(make):
    spare, full = make("clip", "llama"), make("clip", "llama-tied")
    assert (spare.image_id, spare.embedding_rows, spare.image_id_is_virtual) == (29, 40, False)
    assert (full.image_id, full.embedding_rows, full.image_id_is_virtual) == (29, 29, True)
    for vlm in (spare, full):
        assert vlm.model.config.image_token_index == 29
        assert vlm.tokenizer("a<image>b", add_special_tokens=False).input_ids == [3, 29, 4]
        assert vlm.tokenizer.decode([3, 29, 4], skip_special_tokens=True).replace(" ", "") == "ab"


def test_an_image_token_that_is_there_already_keeps_its_id(tokenizer_directory):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    assert place_image_token(tokenizer, 40) == 29
    tokenizer.add_tokens(["later"])
    assert place_image_token(tokenizer, 40) == 29


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tokenizer_directory):
    with pytest.raises(ValueError, match=r"ids up to 28.*20 rows"):
        place_image_token(AutoTokenizer.from_pretrained(tokenizer_directory), 20)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda facts: facts["model"]["vocab"].update(z=35),  # 29 words, whose ids go up to 35
            "'<image>' got id 29, which the embedding's 40 rows and the tokenizer's other ids .up to 35. leave no",
        ),
        (lambda facts: None, "the tokenizer has neither a padding nor an end-of-text token: give it 'eos_token'"),
    ],
)
def test_a_tokenizer_that_leaves_no_place_or_pads_with_nothing_is_refused(tokenizer_directory, change, told):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(facts)
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(facts)))
    with pytest.raises(ValueError, match=told):
        place_image_token(bare, 40)


def test_padding_is_decided_and_logged(tokenizer_directory, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    tokenizer.pad_token = None
    with caplog.at_level(logging.INFO):
        place_image_token(tokenizer, 40)
    assert tokenizer.pad_token == "<eos>" and any("no padding token" in line for line in caplog.messages)
