"""Masks come from one rendering and one tokenisation, whatever the template does to its text."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from distilvlm.data import IGNORED, DataError, Template, explain, export_chat_template
from distilvlm.data.problems import RowError
from distilvlm.data.records import PICTURE

from .small_data import (
    CHATML,
    CHATML_WITH_BLOCKS,
    LIST_CONTENT,
    LLAMA2,
    TRIMMING,
    make_record,
    make_tokenizer,
)

TALK = ("@\nwhat colour is it?", "it is red", "sure?", " yes, 5 times\n")


def learned(encoded, tokenizer) -> str:
    """The learned tokens as text, `|` between runs."""
    marked = explain(encoded, tokenizer)
    return "|".join(piece.split("⟧")[0] for piece in marked.split("⟦")[1:])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "it is red<|im_end|>| yes, 5 times\n<|im_end|>"),
        (CHATML_WITH_BLOCKS, "it is red<|im_end|>| yes, 5 times\n<|im_end|>"),
        (TRIMMING, "it is red<|im_end|>|yes, 5 times<|im_end|>"),
        (LIST_CONTENT, "it is red<|im_end|>| yes, 5 times\n<|im_end|>"),
    ],
)
def test_answers_and_their_end_are_learned_and_nothing_else(template, expected):
    tokenizer = make_tokenizer(template)
    assert learned(Template.of("chat", tokenizer).encode(make_record(*TALK), 3, 512), tokenizer) == expected


def test_llama_style_learns_the_end_behind_a_space_and_has_one_bos():
    tokenizer = make_tokenizer(LLAMA2, bos="<s>", eos="</s>")
    encoded = Template.of("chat", tokenizer).encode(make_record(*TALK), 3, 512)
    assert learned(encoded, tokenizer) == " it is red </s>| yes, 5 times </s>"
    bos = tokenizer.convert_tokens_to_ids("<s>")
    assert encoded.input_ids[0] == bos and encoded.input_ids[1] != bos


def test_mask_equals_a_hand_written_list_of_tokens():
    tokenizer = make_tokenizer(CHATML)
    encoded = Template.of("chat", tokenizer).encode(make_record("@\nis it?", "is red"), 2, 512)
    pieces = [
        ("<|im_start|>user\n", False),
        ("@@", False),
        ("\nis it?<|im_end|>\n<|im_start|>assistant\n", False),
        ("is red<|im_end|>", True),
        ("\n", False),
    ]
    ids, labels = [], []
    for text, is_learned in pieces:
        part = [0, 0] if text == "@@" else tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if is_learned else [IGNORED] * len(part)
    assert encoded.input_ids.tolist() == ids
    assert encoded.labels.tolist() == labels
    start = len(tokenizer("<|im_start|>user\n", add_special_tokens=False)["input_ids"])
    assert encoded.placeholder_positions.tolist() == [start, start + 1]


def test_blocks_and_marks_give_the_same_labels():
    record = make_record(*TALK, system="be brief")
    one, other = (
        Template.of("chat", make_tokenizer(template)).encode(record, 3, 512)
        for template in (CHATML, CHATML_WITH_BLOCKS)
    )
    assert one.input_ids.equal(other.input_ids) and one.labels.equal(other.labels)


def test_ids_and_mask_are_those_of_transformers():
    tokenizer = make_tokenizer(CHATML_WITH_BLOCKS)
    record = make_record("what is it?", "it is 5 red", "sure?", "yes 😀")
    encoded = Template.of("chat", tokenizer).encode(record, 3, 512)
    theirs = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in record.turns],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert encoded.input_ids.tolist() == theirs["input_ids"]
    assert (encoded.labels != IGNORED).int().tolist() == theirs["assistant_masks"]


def test_vicuna_is_the_published_text():
    tokenizer = make_tokenizer(None, eos="</s>")
    template = Template.of("vicuna", tokenizer)
    record = make_record("@\nq1", "a1", "q2", "5 a2")
    assert template.renderer.render(record.turns).text.replace(PICTURE, "<image>") == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nq1 ASSISTANT: a1</s>"
        "USER: q2 ASSISTANT: 5 a2</s>"
    )
    # The space belongs to what is learned even where it is a token of its own (before a digit): the prompt ends in ':'.
    assert learned(template.encode(record, 3, 512), tokenizer) == " a1</s>| 5 a2</s>"
    assert tokenizer.decode(template.prompt(record, 3).input_ids.tolist()).endswith("ASSISTANT:")


def test_plain_learns_caption_and_newline_without_end_of_turn():
    tokenizer = make_tokenizer(None)
    template = Template.of("plain", tokenizer)
    encoded = template.encode(make_record("@\nwrite a caption", "it is red"), 4, 512)
    caption = tokenizer("it is red\n", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids.tolist() == [0] * 4 + caption
    assert encoded.labels.tolist() == [IGNORED] * 4 + caption
    with pytest.raises(RowError, match="2 answers"):
        template.encode(make_record(*TALK), 4, 512)


@pytest.mark.parametrize("kind", ["vicuna", "plain"])
def test_bos_once_where_the_tokenizer_writes_one(kind):
    tokenizer = make_tokenizer(None, bos="<s>", eos="</s>")
    encoded = Template.of(kind, tokenizer).encode(make_record("@\nq", "a"), 2, 512)
    bos = tokenizer.convert_tokens_to_ids("<s>")
    assert (encoded.input_ids == bos).sum() == 1 and encoded.input_ids[0] == bos
    assert encoded.labels[0] == IGNORED


def test_offsets_that_were_trimmed_give_the_same_mask():
    record = make_record("@\nq", "  red  5 is \n it", "q", "it")
    plain, trimmed = (
        Template.of("vicuna", make_tokenizer(None, trim_offsets=trim)).encode(record, 3, 512) for trim in (False, True)
    )
    assert plain.labels.tolist() == trimmed.labels.tolist()


def test_earlier_truncation_and_padding_of_the_tokenizer_do_not_matter():
    tokenizer = make_tokenizer(CHATML)
    template = Template.of("chat", tokenizer)
    before = template.encode(make_record(*TALK), 3, 512)
    tokenizer(["a"], truncation=True, max_length=4, padding="max_length")
    assert template.encode(make_record(*TALK), 3, 512).input_ids.equal(before.input_ids)


@pytest.mark.parametrize("template", [CHATML, TRIMMING])
def test_any_conversation_learns_exactly_its_answers(template):
    tokenizer = make_tokenizer(template)
    made = Template.of("chat", tokenizer)
    rng = random.Random(0)
    for _ in range(150):
        texts = ["".join(rng.choices("ab 5é😀\n∈.", k=rng.randint(1, 12))) + "x" * rng.randint(0, 1) for _ in range(6)]
        texts = [text if text.strip() else f"{text}b" for text in texts[: rng.choice([2, 4, 6])]]
        record = make_record(*texts)
        encoded = made.encode(record, 3, 4096)
        answers = texts[1::2] if template == CHATML else [text.strip() for text in texts[1::2]]
        assert learned(encoded, tokenizer) == "|".join(f"{answer}<|im_end|>" for answer in answers)
        whole = tokenizer(made.renderer.render(record.turns).text, add_special_tokens=False)
        assert encoded.input_ids.tolist() == whole["input_ids"]


def test_cutting_keeps_the_front_and_names_what_does_not_fit():
    template = Template.of("chat", make_tokenizer(CHATML))
    record = make_record("@\nq", "it is red and blue")
    whole = template.encode(record, 4, 512)
    length = len(whole.input_ids)
    cut = template.encode(record, 4, length - 3)
    assert cut.cut and not whole.cut
    assert cut.input_ids.equal(whole.input_ids[:-3]) and cut.labels.equal(whole.labels[:-3])
    with pytest.raises(RowError, match="1 x 4 visual tokens are more than the context of 5") as error:
        template.encode(record, 4, 5)
    assert error.value.field == "image"
    first = int((whole.labels != IGNORED).nonzero()[0])
    with pytest.raises(RowError, match="nothing to learn"):
        template.encode(record, 4, first)


def test_prompt_is_what_stood_before_the_last_answer():
    tokenizer = make_tokenizer(LLAMA2, bos="<s>", eos="</s>")
    template = Template.of("chat", tokenizer)
    encoded, prompt = template.encode(make_record(*TALK), 3, 512), template.prompt(make_record(*TALK), 3)
    assert prompt.input_ids.equal(encoded.input_ids[: len(prompt.input_ids)])
    assert int(encoded.labels[len(prompt.input_ids)]) != IGNORED  # the next token is the answer's first
    assert bool((prompt.labels == IGNORED).all())
    assert prompt.placeholder_positions.equal(encoded.placeholder_positions)


def test_prompt_without_answer_opens_the_assistants_turn():
    tokenizer = make_tokenizer(CHATML)
    prompt = Template.of("chat", tokenizer).prompt(make_record("what is it?"), 3)
    assert tokenizer.decode(prompt.input_ids.tolist()).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_without_text_teaches_nothing():
    tokenizer = make_tokenizer(CHATML)
    encoded = Template.of("chat", tokenizer).encode(make_record("q", " ", "q", "red"), 3, 512)
    assert learned(encoded, tokenizer) == "red<|im_end|>"


def test_templates_that_hide_their_answers_are_refused_by_name():
    dropping = "{% for message in messages if message['role'] == 'user' %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(DataError, match=r"chat template.*can't be used for training: .*answer"):
        Template.of("chat", make_tokenizer(dropping))
    blocks_elsewhere = CHATML_WITH_BLOCKS.replace("== 'assistant'", "== 'user'")
    with pytest.raises(DataError, match="blocks hold"):
        Template.of("chat", make_tokenizer(blocks_elsewhere))
    with pytest.raises(DataError, match=r"no chat template.*vicuna"):
        Template.of("chat", make_tokenizer(None))


def test_tokenizers_that_no_template_can_use_are_refused_by_name():
    without_picture, without_end = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE())), make_tokenizer()
    without_end.eos_token = None
    for kind, tokenizer, told in (
        (
            "chat",
            ByT5Tokenizer(),
            r"ByT5Tokenizer: a slow tokenizer gives no offsets; use its fast version \(tokenizer",
        ),
        ("vicuna", without_end, "the tokenizer has no eos_token, which ends every answer"),
        ("plain", without_picture, "the tokenizer has no special token <image>"),
    ):
        with pytest.raises(DataError, match=f"the {kind} template of .*{told}"):
            Template.of(kind, tokenizer)


def test_a_row_that_the_template_refuses_is_told_with_its_words():
    refusing = "{{ raise_exception('no system turns') if messages[0]['role'] == 'system' }}" + CHATML
    template = Template.of("chat", make_tokenizer(refusing))
    with pytest.raises(RowError, match=r"the chat template of .* refuses it: no system turns"):
        template.encode(make_record("q", "a", system="be brief"), 3, 512)


def test_a_template_that_drops_the_picture_is_refused_per_row():
    dropping = CHATML.replace("message['content']", "message['content'].split('what')[-1]")
    template = Template.of("chat", make_tokenizer(dropping))
    with pytest.raises(RowError, match="0 image tokens for 1 pictures"):
        template.encode(make_record("@ what", "red"), 3, 512)


def test_the_date_is_pinned():
    dated = "{{ strftime_now('%Y-%m-%d') }}" + CHATML
    template = Template.of("chat", make_tokenizer(dated))
    assert template.renderer.render(make_record("q", "a").turns).text.startswith("26 Jul 2024<|im_start|>")


@pytest.mark.parametrize("base", [CHATML, TRIMMING, LIST_CONTENT, CHATML_WITH_BLOCKS, "vicuna", "plain"])
def test_exported_template_writes_the_same_text(base):
    kind = base if base in ("vicuna", "plain") else "chat"
    tokenizer = make_tokenizer(base if kind == "chat" else None)
    record = make_record("@\nwhat is it?", "it is red")
    ours = Template.of(kind, tokenizer).renderer.render(record.turns).text.replace(PICTURE, "<image>")
    tokenizer.chat_template = export_chat_template(kind, tokenizer)
    as_text = [
        {"role": "user", "content": "<image>\nwhat is it?"},
        {"role": "assistant", "content": "it is red"},
    ]
    as_parts = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "it is red"}]},
    ]
    assert tokenizer.apply_chat_template(as_text, tokenize=False) == ours
    assert tokenizer.apply_chat_template(as_parts, tokenize=False) == ours
    # A stage that goes on from the saved model finds the same template under "chat", and does not wrap it again.
    if kind != "plain":
        again = Template.of("chat", tokenizer)
        assert again.renderer.render(record.turns).text.replace(PICTURE, "<image>") == ours
    assert export_chat_template("chat", tokenizer) == tokenizer.chat_template
