"""Log-likelihoods, multiple choice, perplexity and replies: against plain arithmetic, in batches of any size."""

from __future__ import annotations

import copy
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ByT5Tokenizer, LlamaForCausalLM

from distilvlm import cli
from distilvlm.data import DataError
from distilvlm.evaluate import Evaluation, difference, rescored
from distilvlm.evaluate.text import (
    CHOICES,
    PERPLEXITY,
    PROMPTS,
    Choice,
    Passage,
    choose,
    likelihoods,
    perplexity,
    read_prompts,
    read_texts,
    reply,
    side_by_side,
)
from distilvlm.evaluate.text import likelihood as inside
from distilvlm.evaluate.text.choices import Choice as ChoiceType
from distilvlm.models import text_only
from distilvlm.models.adaptors import AdaptorConfig, Host
from distilvlm.models.save import save
from distilvlm.models.vlm import VLM


def log_probabilities(vlm: VLM, ids: list[int]) -> torch.Tensor:
    """[length - 1] of each token but the first, by the stock class itself."""
    with torch.no_grad():
        logits = vlm.model(input_ids=torch.tensor([ids])).logits[0].float()
    return torch.log_softmax(logits[:-1], dim=-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def ids_of(vlm: VLM, text: str) -> list[int]:
    return vlm.tokenizer(text)["input_ids"]


PASSAGES = [
    Passage((5, 6, 7, 8, 9, 10), 3),
    Passage((5, 6, 7, 8, 9, 11), 5),  # the same but for the last token
    Passage((5, 6, 7, 8, 9, 12), 5),
    Passage((70, 80), 1),
    Passage(tuple(range(20, 60)), 1),
]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_likelihoods_are_those_of_the_stock_model_in_any_batch(
    vlm: VLM, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inside, "_LOGITS", 262 * 7)  # blocks of seven rows
    found = likelihoods(vlm, PASSAGES, batch_size=batch_size)
    for one, passage in zip(found, PASSAGES, strict=True):
        expected = log_probabilities(vlm, list(passage.ids))[passage.start - 1 :]
        assert one.tokens == len(expected) == len(passage.ids) - passage.start
        assert one.total == pytest.approx(float(expected.sum()), abs=1e-4)


def test_options_of_one_token_are_read_once_and_only_their_logits_are_made(
    vlm: VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    original = inside.hidden_states
    monkeypatch.setattr(inside, "hidden_states", lambda *a: rows.append(a[2].input_ids.shape[0]) or original(*a))
    heads: list[int] = []
    linear = nn.functional.linear
    counting = SimpleNamespace(linear=lambda x, w: heads.append(x.shape[0]) or linear(x, w))
    monkeypatch.setattr(inside, "functional", counting)
    likelihoods(vlm, PASSAGES[1:3], batch_size=8)
    assert rows == [1]
    assert heads == [2]  # one position for each option


def test_nothing_to_predict_is_refused(vlm: VLM) -> None:
    for passage in (Passage((5, 6), 2), Passage((5, 6), 0), Passage((5,), 1)):
        with pytest.raises(ValueError, match="can't be predicted"):
            likelihoods(vlm, [passage])


def test_a_tokenizer_that_does_not_say_where_its_tokens_lie_is_refused(vlm: VLM, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a text")
    endless = copy.deepcopy(vlm.tokenizer)
    endless.eos_token = None
    for tokenizer, reason in (
        (ByT5Tokenizer(), "a slow tokenizer gives no offsets; use its fast version"),
        (endless, "has neither a BOS nor an EOS token that a text could begin behind"),
    ):
        vlm.tokenizer = tokenizer
        with pytest.raises(DataError, match=reason):
            perplexity(vlm, read_texts(texts))


def test_nothing_is_asked_of_nobody(vlm: VLM, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no question to choose an answer to"):
        choose(vlm, [])
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.txt holds no question"):
        read_prompts(tmp_path / "empty.txt")


def choice(row: int, options: list[str], right: int, prompt: str = "Is it?", **more: Any) -> ChoiceType:
    pairs = [(prompt, f" {option}") for option in options]
    return Choice.of(("test.jsonl", row), more.pop("task", "test"), prompt, options, right, pairs, **more)


def questions(count: int = 6) -> list[ChoiceType]:
    options = ["red", "a large blue ball", "no"]
    return [choice(row, options, row % 3, "What is it? " + "Well, " * row + "it is") for row in range(count)]


def test_the_most_likely_option_is_chosen_three_ways(vlm: VLM) -> None:
    found = choose(vlm, questions(), batch_size=4)
    for question, sample in zip(questions(), found.samples, strict=True):
        details, totals, tokens = sample.details, [], []
        for read, judged in question.pairs:
            before = len(ids_of(vlm, read))
            each = log_probabilities(vlm, ids_of(vlm, read + judged))[before - 1 :]
            totals.append(float(each.sum()))
            tokens.append(len(each))
        assert details["log_likelihoods"] == pytest.approx(totals, abs=1e-4) and details["tokens"] == tokens
        per_character = np.array(totals) / [len(judged) - 1 for _, judged in question.pairs]
        assert details["per_character"] == int(per_character.argmax())
        assert details["per_token"] == int((np.array(totals) / tokens).argmax())
        assert sample.prediction == details["options"][int(np.argmax(totals))]
        assert details["right"] == (int(np.argmax(totals)) == question.right)
    shares = [
        float(torch.softmax(torch.tensor(s.details["log_likelihoods"]), 0)[s.details["truth"]]) for s in found.samples
    ]
    figures = {name: one.mean for name, one in found.figures.items() if one is not None}
    assert figures["probability"] == pytest.approx(np.mean(shares), abs=1e-6)
    assert figures["chance"] == pytest.approx(1 / 3)
    assert figures["acc"] == pytest.approx(np.mean([s.details["right"] for s in found.samples]))


def test_a_batch_of_another_size_gives_the_same(vlm: VLM) -> None:
    one, all_at_once = choose(vlm, questions(), batch_size=1), choose(vlm, questions(), batch_size=64)
    for a, b in zip(one.samples, all_at_once.samples, strict=True):
        assert a.details["log_likelihoods"] == pytest.approx(b.details["log_likelihoods"], abs=1e-4)


def test_what_was_weighed_is_read_from_its_file(vlm: VLM, tmp_path: Path) -> None:
    found = choose(vlm, questions(), out=tmp_path / "chosen.jsonl")
    assert rescored(tmp_path / "chosen.jsonl", measure=CHOICES).figures == found.figures


def test_several_tasks_are_told_apart_and_an_exams_subjects(vlm: VLM) -> None:
    several = [choice(0, ["a", "b"], 0, task="x"), choice(1, ["a", "b"], 0, task="y", subject="law")]
    assert list(choose(vlm, several).categories) == ["x", "y"]
    exam = [choice(row, ["a", "b"], 0, subject=subject) for row, subject in enumerate(("law", "art"))]
    assert list(choose(vlm, exam).categories) == ["law", "art"]
    assert not choose(vlm, questions()).categories


def test_examples_leave_where_the_context_is_short_the_last_ones_first(
    vlm: VLM, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    shots = [letter * 20 + "\n" for letter in "abc"]
    asked = [choice(0, ["yes", "no"], 0, "Is it?", head="Head.\n", shots=shots)]
    whole = choose(vlm, asked).samples[0].details
    assert whole["shots"] == 3 and not caplog.records
    vlm.model.config.get_text_config().max_position_embeddings = 64  # 6 + 63 + 6 + 3 tokens of a byte each
    short = choose(vlm, asked).samples[0].details
    assert short["shots"] == 2 and "1 questions have fewer examples" in caplog.text
    expected = choose(vlm, [choice(0, ["yes", "no"], 0, "Is it?", head="Head.\n", shots=shots[:2])]).samples[0].details
    assert short["log_likelihoods"] == expected["log_likelihoods"]
    vlm.model.config.get_text_config().max_position_embeddings = 8
    cut = choose(vlm, asked).samples[0].details["log_likelihoods"]
    assert cut[0] == pytest.approx(
        float(log_probabilities(vlm, ids_of(vlm, "d.\nIs it? yes"[-9:]))[-4:].sum()), abs=1e-4
    )
    vlm.model.config.get_text_config().max_position_embeddings = 3
    with pytest.raises(DataError, match="row 0: an option alone is longer than the model's context of 3"):
        choose(vlm, asked)


TEXT = "The harbour was quiet. Nobody had seen the old boat leave, über Nacht, and nobody asked."


@pytest.mark.parametrize(("window", "stride"), [(200, 200), (16, 8), (16, 16), (9, 1)])
def test_every_token_is_predicted_once_from_its_window(vlm: VLM, tmp_path: Path, window: int, stride: int) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    found = perplexity(vlm, read_texts(tmp_path / "a.txt"), window=window, stride=stride, batch_size=3)
    ids = [256, *ids_of(vlm, TEXT)]  # behind the end of another text: there is no BOS
    total = 0.0
    for start in range(1, len(ids), stride):
        end = min(start + stride, len(ids))
        begin = max(0, end - 1 - window)
        total += float(log_probabilities(vlm, ids[begin:end])[start - begin - 1 :].sum())
    size = len(TEXT.encode())
    figures = {name: one.mean for name, one in found.figures.items() if one is not None}
    assert figures["perplexity"] == pytest.approx(math.exp(-total / (len(ids) - 1)), rel=1e-5)
    assert figures["byte_perplexity"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(-total / math.log(2) / size, rel=1e-5)
    assert sum(one.details["bytes"] for one in found.samples) == size
    assert "".join(one.answer for one in found.samples) == TEXT


def test_a_typed_image_token_is_text(vlm: VLM, tmp_path: Path) -> None:
    vlm.model.resize_token_embeddings(259)  # as of most models: <image> has no row
    (tmp_path / "a.md").write_text("Write `<image>` where it goes.")
    (one,) = perplexity(vlm, read_texts(tmp_path / "a.md")).samples
    assert one.answer == "Write `< image >` where it goes."
    assert choose(vlm, [choice(0, ["<image>", "b"], 0, "A <image> is", shots=["<image>"])]).n == 1
    assert reply(vlm, read_prompts(tmp_path / "a.md"), max_new_tokens=2).n == 1


def test_perplexities_have_intervals_and_paired_differences(make_vlm: Callable[..., VLM], tmp_path: Path) -> None:
    rows = [{"text": f"Sentence {number} of a text."} for number in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = read_texts(tmp_path / "texts.jsonl")
    a, b = (perplexity(make_vlm(seed=seed), texts, out=tmp_path / f"{seed}.jsonl") for seed in (0, 1))
    value, gap = a.main, difference(a, b)
    assert value is not None and value.low < value.mean < value.high
    assert gap is not None and b.main is not None and gap.mean == pytest.approx(value.mean - b.main.mean)
    assert gap.low < gap.mean < gap.high
    same = difference(a, perplexity(make_vlm(seed=0), texts))
    assert same is not None and (same.mean, same.low, same.high) == (0, 0, 0)
    assert rescored(tmp_path / "0.jsonl", measure=PERPLEXITY).figures == a.figures
    with pytest.raises(DataError, match="window 600, stride 300: the context is 512"):
        perplexity(make_vlm(), texts, window=600)
    (tmp_path / "texts.jsonl").write_text('{"title": "x"}\n')
    with pytest.raises(DataError, match="row 0: no text in the field 'text'"):
        read_texts(tmp_path / "texts.jsonl")


@pytest.fixture
def plain(vlm: VLM, tmp_path: Path) -> Path:
    """The language model of `vlm` alone, as a checkpoint of its own."""
    lm = LlamaForCausalLM(vlm.model.config.get_text_config())
    lm.model.load_state_dict(vlm.model.model.language_model.state_dict())
    lm.lm_head.load_state_dict(vlm.model.lm_head.state_dict())
    lm.save_pretrained(tmp_path / "plain")
    vlm.tokenizer.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def values(evaluation: Evaluation) -> list[list[float]]:
    return [one.details["log_likelihoods"] for one in evaluation.samples]


def test_a_language_model_alone_says_what_it_says_in_a_vlm_bit_for_bit(vlm: VLM, plain: Path, tmp_path: Path) -> None:
    save(vlm, tmp_path / "model", "square")
    lm, seen = text_only.load(plain), text_only.load(tmp_path / "model")
    assert values(choose(lm, questions())) == values(choose(seen, questions())) == values(choose(vlm, questions()))
    asked = read_prompts()[:3]
    assert [one.prediction for one in reply(lm, asked, max_new_tokens=5).samples] == [
        one.prediction for one in reply(seen, asked, max_new_tokens=5).samples
    ]


def test_text_is_untouched_by_an_adaptor_and_changed_in_its_workflow(vlm: VLM, plain: Path) -> None:
    for hosted in (vlm, text_only.load(plain)):
        before = choose(hosted, questions())
        Host.attach(hosted.model).add("multimodal", AdaptorConfig(positions=(0, 1), projector=False))
        text, adapted = choose(hosted.use("text"), questions()), choose(hosted.use("multimodal"), questions())
        gap = difference(text, before, "probability")
        assert values(text) == values(before) and gap is not None and (gap.mean, gap.low, gap.high) == (0, 0, 0)
        assert values(adapted) != values(before)


def test_replies_are_counted_and_stand_side_by_side(make_vlm: Callable[..., VLM], tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("Hello?\n\nHow are you?\n")
    asked = read_prompts(tmp_path / "asked.txt")
    rows = {str(seed): reply(make_vlm(seed=seed), asked, max_new_tokens=6, batch_size=1) for seed in (0, 1)}
    both = reply(make_vlm(seed=0), asked, max_new_tokens=6, batch_size=2)
    assert [one.prediction for one in both.samples] == [one.prediction for one in rows["0"].samples]
    for one in both.samples:
        assert one.details["words"] == len(one.prediction.split())
        assert one.details["tokens"] == len(one.prediction.encode())  # a token is a byte
        assert one.details["cut"] == (one.details["tokens"] >= 5)
    told = side_by_side(rows)
    assert told.index("## Hello?") < told.index("**0**") < told.index("**1**") < told.index("## How are you?")
    assert f"> {rows['1'].samples[0].prediction.splitlines()[0]}" in told
    assert [one.text for one in read_prompts()] == list(PROMPTS)
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    assert [one.text for one in read_prompts(tmp_path / "talks.jsonl")] == ["Hi?"]


@pytest.fixture
def text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(cli, "_configure_logging", lambda: None)
        monkeypatch.setattr(sys, "argv", ["distilvlm", "text", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return run


def test_models_are_asked_side_by_side(
    text: Callable[..., Any], plain: Path, vlm: VLM, mmlu: Path, tmp_path: Path
) -> None:
    save(vlm, tmp_path / "model", "square")
    out, shown, other = tmp_path / "o.jsonl", tmp_path / "d.md", ["--against", tmp_path / "model"]
    code, said, _ = text(plain, *other, "--task", "mmlu", "--data", mmlu, "--shots", 1, "--out", out, "--json")
    told = json.loads(said)
    assert code == 0 and told["n"] == 4 and list(told["categories"]) == ["abstract_algebra", "law"]
    assert told["differences"]["probability"] == {"mean": 0, "low": 0, "high": 0}
    assert len(out.read_text().splitlines()) == 4
    (tmp_path / "held-out.txt").write_text(TEXT)
    windows = ["--stride", 10, "--window", 20]
    code, said, _ = text(plain, "--task", "perplexity", "--data", tmp_path / "held-out.txt", *windows)
    assert code == 0 and "perplexity per byte" in said
    code, said, _ = text(plain, *other, "--task", "dialogues", "--max-new-tokens", 3, "--show", shown, "--json")
    assert code == 0 and json.loads(said)["differences"]["words"]["mean"] == 0
    assert shown.read_text().count("**plain** (") == len(PROMPTS)


@pytest.mark.parametrize(
    "words",
    [
        ["--task", "perplexity", "--task", "piqa"],
        ["--task", "perplexity"],
        ["--task", "piqa", "--window", 3],
        ["--task", "piqa", "--against-workflow", "text"],
    ],
)
def test_options_that_do_not_fit_are_refused(text: Callable[..., Any], words: list[object]) -> None:
    assert text("nowhere", *words)[0] == 2
