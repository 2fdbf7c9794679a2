"""Answers: greedy, the same in every batch, and what the stock class answers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from distilvlm.data.geometry import canvas, decode
from distilvlm.data.problems import DataError
from distilvlm.data.records import Record, Turn
from distilvlm.data.template import Template
from distilvlm.evaluate.generate import answer
from distilvlm.models.decode import greedy
from distilvlm.models.forward import pixel_values, vision_features
from distilvlm.models.vlm import VLM


def stock_answer(vlm: VLM, record: Record, template: str, limit: int) -> str:
    """One record through the stock class's own `generate`, with a row for `<image>` as a saved model has it."""
    model = copy.deepcopy(vlm.model).eval()
    if vlm.image_id_is_virtual:
        model.resize_token_embeddings(vlm.embedding_rows + 1, mean_resizing=False)
    written = Template.of(template, vlm.tokenizer)
    prompt = written.prompt(replace(record, turns=record.turns[:-1]), vlm.layout.placeholders)
    ids = prompt.input_ids.clone()
    ids[prompt.placeholder_positions] = vlm.image_id
    pictures = [canvas(decode(path), "square", vlm.layout.size) for path in record.images]
    out = model.generate(
        input_ids=ids[None],
        attention_mask=torch.ones_like(ids[None]),
        **({"pixel_values": pixel_values(vlm.layout, torch.stack(pictures))} if pictures else {}),
        do_sample=False,
        max_new_tokens=limit,
        suppress_tokens=[vlm.image_id],
        eos_token_id=[256, 258] if template == "chat" else 256,
        pad_token_id=256,
    )
    return vlm.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("template", ["chat", "vicuna"])
@pytest.mark.parametrize(("language", "rows"), [("llama", 262), ("llama", 259), ("qwen2", 262)])
def test_the_text_is_the_stock_class_s(
    make_vlm: Callable[..., VLM], records: list[Record], template: str, language: str, rows: int
) -> None:
    vlm = make_vlm(language, rows)
    answers = answer(vlm, records, template, "square", batch_size=8, max_new_tokens=12)
    assert answers == [stock_answer(vlm, record, template, 12) for record in records]
    assert len(set(answers)) > 4  # a model that always says the same would pass everything here


@pytest.mark.parametrize("template", ["chat", "vicuna", "plain"])
def test_the_text_does_not_depend_on_the_batch(vlm: VLM, records: list[Record], template: str) -> None:
    asked = [record for record in records if record.images or template != "plain"]
    alone = answer(vlm, asked, template, "square", batch_size=1, max_new_tokens=12)
    for batch_size in (2, 3, 8):
        assert answer(vlm, asked, template, "square", batch_size=batch_size, max_new_tokens=12) == alone
    backwards = answer(vlm, asked[::-1], template, "square", batch_size=3, max_new_tokens=12)
    assert backwards[::-1] == alone


def test_a_batch_decodes_to_the_ids_of_each_row_alone(vlm: VLM) -> None:
    torch.manual_seed(0)
    lengths = [3, 9, 5, 7, 2, 8]
    prompts = [torch.randn(length, 32) for length in lengths]
    padded = torch.zeros(6, 9, 32)
    mask = torch.zeros(6, 9, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, 9 - len(prompt) :] = prompt
        mask[row, 9 - len(prompt) :] = 1
    vlm.model.eval()

    def alone(row: int, ends: set[int]) -> list[int]:
        ones = torch.ones(1, lengths[row], dtype=torch.int64)
        return greedy(vlm.model, prompts[row][None], ones, ends=ends, limit=20)[0]

    # Ends that are met early in some rows and late or never in others, so that rows leave the batch one by one.
    free = [alone(row, set()) for row in range(6)]
    ends = {free[0][2], free[3][7]}
    together = greedy(vlm.model, padded, mask, ends=ends, limit=20)
    assert together == [alone(row, ends) for row in range(6)]
    assert len({len(ids) for ids in together}) > 2
    assert not ends & {id for ids in together for id in ids}


def test_the_true_answer_is_never_seen(vlm: VLM, records: list[Record]) -> None:
    changed = [replace(record, turns=(record.turns[0], Turn("assistant", " 5"))) for record in records]
    without = [replace(record, turns=record.turns[:1]) for record in records]
    answers = [answer(vlm, r, "vicuna", "square", max_new_tokens=8) for r in (records, changed, without)]
    assert answers[0] == answers[1] == answers[2]


def test_kept_features_give_the_same_text_and_nothing_is_decoded(
    vlm: VLM, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {
        path: vision_features(vlm.model.eval(), vlm.layout, canvas(decode(path), "square", 28)[None])[0]
        for record in records
        for path in record.images
    }
    expected = answer(vlm, records, "chat", "square", max_new_tokens=8)
    monkeypatch.setattr("distilvlm.evaluate.generate.decode", lambda path: pytest.fail(f"{path} decoded"))
    assert answer(vlm, records, "chat", "square", max_new_tokens=8, features=kept.__getitem__) == expected


def test_the_picture_matters(vlm: VLM, records: list[Record]) -> None:
    other = [replace(record, images=tuple(record.images[::-1])) for record in records[2:3]]
    asked = records[2:3] + other
    first, second = answer(vlm, asked, "chat", "square", max_new_tokens=12)
    assert first != second


def steer(vlm: VLM, token: int) -> None:
    """Make `token` the likeliest everywhere: the head's row points along the only direction that the norm leaves."""
    with torch.no_grad():
        vlm.model.model.language_model.norm.weight.zero_()
        vlm.model.model.language_model.norm.weight[0] = 1
        for layer in vlm.model.model.language_model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        vlm.model.get_input_embeddings().weight[:, 0] = 1
        vlm.model.lm_head.weight[token, 0] = 100


def test_the_image_token_is_never_said(vlm: VLM, records: list[Record]) -> None:
    text_only = records[1:2]
    steer(vlm, 259)
    likeliest = answer(vlm, text_only, "chat", "square", max_new_tokens=4)
    with torch.no_grad():
        vlm.model.lm_head.weight[259, 0] = -100
    assert likeliest == answer(vlm, text_only, "chat", "square", max_new_tokens=4)
    steer(vlm, 40)
    assert answer(vlm, text_only, "chat", "square", max_new_tokens=4) == [vlm.tokenizer.decode([40] * 4)]


@pytest.mark.parametrize(
    ("template", "token"),
    [("chat", "<|im_end|>"), ("chat", "<eos>"), ("vicuna", "<eos>"), ("plain", "\n")],
)
def test_an_answer_ends_where_the_template_teaches(vlm: VLM, records: list[Record], template: str, token: str) -> None:
    steer(vlm, vlm.tokenizer(token, add_special_tokens=False)["input_ids"][0])
    text_only = [replace(records[1], turns=records[1].turns[:1])]
    asked = records[:1] if template == "plain" else text_only
    steps: list[int] = []
    vlm.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    if template == "plain":  # its prompt is the picture alone, which `steer` does not reach: make it text's
        torch.nn.init.zeros_(vlm.model.model.multi_modal_projector.linear_2.weight)
        torch.nn.init.zeros_(vlm.model.model.multi_modal_projector.linear_2.bias)
        with torch.no_grad():
            vlm.model.model.multi_modal_projector.linear_2.bias[0] = 1
    assert answer(vlm, asked, template, "square", max_new_tokens=9) == [""]
    assert len(steps) == 1


def test_a_picture_that_cannot_be_read_is_named_or_left_out(vlm: VLM, records: list[Record]) -> None:
    expected = answer(vlm, records, "chat", "square", max_new_tokens=6)
    Path(records[4].images[0]).write_bytes(b"\x89PNG, but not really")
    with pytest.raises(DataError, match=r"test\.json, row 4, field 'image': .*3\.png"):
        answer(vlm, records, "chat", "square", max_new_tokens=6)
    bad = []
    found = answer(vlm, records, "chat", "square", max_new_tokens=6, bad=bad)
    assert [row.key.row for row in bad] == [4]
    assert found == [*expected[:4], "", *expected[5:]]


def test_a_question_longer_than_the_context_is_named(vlm: VLM, records: list[Record]) -> None:
    long = replace(records[1], turns=(Turn("user", "x" * 600),))
    with pytest.raises(DataError, match=r"test\.json, row 1, field 'conversation': \d+ positions .* context of 512"):
        answer(vlm, [long], "chat", "square")


def test_the_model_is_left_as_it_was(vlm: VLM, records: list[Record]) -> None:
    vlm.model.train()
    vlm.model.model.vision_tower.eval()
    modes = [module.training for module in vlm.model.modules()]
    state = torch.get_rng_state()
    answer(vlm, records, "chat", "square", max_new_tokens=2)
    assert [module.training for module in vlm.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_counts_records(vlm: VLM, records: list[Record]) -> None:
    told: list[tuple[int, int]] = []
    answer(vlm, records, "chat", "square", batch_size=3, max_new_tokens=1, progress=lambda *n: told.append(n))
    assert told == [(3, 8), (6, 8), (8, 8)]
