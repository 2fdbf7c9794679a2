"""The page holds everything, says what it lacks, needs nothing else, and is well-formed."""

from __future__ import annotations

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from distilvlm import cli
from distilvlm.report import write_report
from distilvlm.report.axes import reading
from distilvlm.report.page import render
from distilvlm.report.read import read
from tests.report.tiny import ANSWERS, SCRIPT

BLOCKS = {"p", "br", "td", "th", "dt", "dd", "li", "tr", "caption", "div", "h2", "h3", "h4", "article", "summary"}
VOID = {"meta", "img", "input", "br", "link", "hr", "path", "circle"}


class Reader(HTMLParser):
    """Collects text and attributes, and makes sure that every element is closed in its turn."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in BLOCKS:
            self.text.append(" ")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at line {self.getpos()[0]} closes another element"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & {*self.open}:
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())


@pytest.fixture(params=["run_page", "comparison_page", "sparse_page"])
def page(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def test_every_element_is_closed_and_ids_are_unique(page: str) -> None:
    reader = Reader(page)
    assert not reader.open
    ids = [attrs["id"] for _, attrs in reader.elements if "id" in attrs]
    assert len(ids) == len({*ids})
    assert next(attrs for tag, attrs in reader.elements if tag == "html")["lang"] == "en"


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    for tag, attrs in Reader(page).elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            target = attrs.get(name)
            assert target is None or target.startswith(("data:image/", "#")), f"<{tag} {name}={target!r}>"
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert "fetch(" not in page and "XMLHttpRequest" not in page and "import(" not in page


def test_every_picture_and_chart_has_a_text(comparison_page: str) -> None:
    elements = Reader(comparison_page).elements
    pictures = [attrs for tag, attrs in elements if tag == "img"]
    assert pictures and all(attrs["alt"] for attrs in pictures)
    assert all(attrs.get("aria-label") or attrs.get("aria-hidden") for tag, attrs in elements if tag == "svg")


def test_links_lead_to_sections_of_the_page(page: str) -> None:
    reader = Reader(page)
    ids = {attrs["id"] for _, attrs in reader.elements if "id" in attrs}
    assert {attrs["href"][1:] for tag, attrs in reader.elements if tag == "a" and attrs["href"]} <= ids


def test_a_run_tells_stages_terms_and_what_trained(run_page: str) -> None:
    words = Reader(run_page).words
    for stage in ("1. dpt", "2. sft", "3. dft"):
        assert stage in words
    assert "projector (4,321 float32)" in words
    assert "dpt captions 10 \u2013 \u2013 \u2013 \u2013 \u2013" in words  # a report of an earlier version counts less
    assert "sft questions 10 8 1 " in words
    assert "text + 0.5 relation" in words  # as recorded; sft and dft from the recipe:
    assert "text + response + visual + 0.5 relation" in words
    assert "reset language" in words
    titles = re.findall(r"<figcaption><b>(.*?)</b>", run_page)
    kd = [f"term: {term}" for term in ("text", "response", "visual", "relation")]
    rest = ["learning rate", "gradient norm", "seconds per update"]
    kd = ["loss (weighted sum)", *kd, *rest]
    assert titles == [*kd, "term: text (the whole loss)", *rest, *kd]


def test_a_run_tells_command_machine_versions_and_hashes(run_page: str, finished: Path) -> None:
    words = Reader(run_page).words
    assert "distilvlm run 'my recipe.yaml'" in words and "/somewhere/bin" not in words
    assert "2026-11-21 21:16:04 UTC" in words
    assert "Xeon, 2 CPU cores, 16 GB, no GPU" in words
    assert "python 3.11.7, torch 2.13.0" in words
    for name, entry in json.loads((finished / "model" / "manifest.json").read_text())["files"].items():
        assert name in words and entry["sha256"] in words
    assert "micro_batch: 2" in words  # the recipe


def test_a_run_tells_findings_costs_and_what_was_skipped(run_page: str) -> None:
    words = Reader(run_page).words
    assert "warning parts.random, stage dpt: frozen and random" in words and "Fix: train it" in words
    assert "Checks that found nothing wrong: 1" in words
    assert "peak memory 1.1 GB 1 GB +10%" in words
    assert "time per update 90 ms 100 ms \u221210%" in words
    assert "peak memory 1.1 GB not measured \u2013" in words
    assert "3 samples cut at the end" in words and "2 image tokens typed into a text" in words
    assert "sft questions.json 7 image no file 7.png" in words


def test_the_table_holds_every_score_and_difference_with_its_interval(comparison_page: str, comparison: Path) -> None:
    words = Reader(comparison_page).words
    content = json.loads((comparison / "comparison.json").read_text())
    for seed in content["seeds"]:
        for row in seed["rows"]["colours"].values():
            low, mean, high = (100 * row["accuracy"][key] for key in ("low", "mean", "high"))
            assert f"{mean:.1f} [{low:.1f}, {high:.1f}]" in words
    assert "\u221225.0 [\u221250.0, \u221212.5]" in words
    assert "below 0 on 1 of 2 seeds; the other intervals include 0" in words
    assert "1,234 parameters, 567 of the language model" in words


def test_what_runs_differ_in_is_drawn_as_a_curve_with_a_line_for_each_seed(comparison: Path, tmp_path: Path) -> None:
    shutil.copytree(comparison, tmp_path / "copy")
    file = tmp_path / "copy" / "comparison.json"
    content = json.loads(file.read_text())
    content["trends"] = [{"over": "size <&> shape", "runs": {"1": "control", "4": "distilled"}}]
    file.write_text(json.dumps(content))
    page = render(read(tmp_path / "copy"))
    (said,) = re.findall(r'aria-label="([^"]* over size &lt;&amp;&gt; shape: [^"]*)"', page)
    for seed in content["seeds"]:
        rows = seed["rows"]["colours"]
        ends = [100 * rows[name]["accuracy"]["mean"] for name in ("control", "distilled")]
        assert f"seed {seed['seed']} from {reading(ends[0])} to {reading(ends[1])}" in said


def test_samples_come_in_the_order_of_what_they_tell(comparison_page: str) -> None:
    places = {question: comparison_page.index(f">{question}<") for question in ANSWERS}
    assert sorted(places, key=places.__getitem__) == [
        "q-distilled-1",
        "q-distilled-2",
        "q-control-only",
        "q-teacher-only",
        "q-other-wrong",
        "q-same-wrong",
        "q-all-right",
    ]
    assert "7 of 7 questions are shown" in Reader(comparison_page).words


def test_each_answer_is_marked_right_or_wrong_in_words(comparison_page: str) -> None:
    words = Reader(comparison_page).words
    told = words.index("q-teacher-only")
    card = words[told : words.index("q-", told + 1)]
    assert "right answer blue majority red wrong teacher blue right control red wrong distilled red wrong" in card


def test_pictures_that_are_gone_or_were_never_there_are_said(comparison_page: str) -> None:
    words = Reader(comparison_page).words
    assert "gone.png not shown: " in words
    assert "text only" in words
    pair = comparison_page.index("q-teacher-only")
    assert comparison_page.rindex('class="pictures several"', 0, pair) > comparison_page.rindex('class="card"', 0, pair)


def test_what_a_model_says_is_never_markup(comparison_page: str) -> None:
    assert SCRIPT not in comparison_page
    assert "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;" in comparison_page
    assert "Colours &amp; &lt;shapes&gt;" in comparison_page
    elements = Reader(comparison_page).elements
    assert sum(tag == "script" for tag, _ in elements) == 1
    assert not any(name.startswith("on") for _, attrs in elements for name in attrs)


def test_what_was_not_recorded_is_said(comparison_page: str) -> None:
    words = Reader(comparison_page).words
    assert "The run directories of teacher are not there" in words
    control = words[words.index("control", words.index("Stages and what trained", 200)) :]
    assert "Not recorded: exact command" in control and "about.json" in control and "doctor.json" in control
    assert "No finished model" in control
    assert "the run is not finished, so it has no model" in words


def test_each_missing_file_alone_is_said(finished: Path, tmp_path: Path) -> None:
    for name in ("about.json", "doctor.json", "cost.json"):
        copy = tmp_path / name
        shutil.copytree(finished, copy, ignore=shutil.ignore_patterns(name, "model"))
        words = Reader(render(read(copy))).words
        assert f"this run has no {name}" in words


def test_an_unfinished_run_says_how_far_it_is(finished: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("model"))
    lines = (copy / "events.jsonl").read_text().splitlines(keepends=True)
    (copy / "events.jsonl").write_text("".join(lines[:4]) + '{"event": "upd')  # a kill cut the last line off
    words = Reader(render(read(copy))).words
    assert "State not finished" in words
    assert "dpt, 4 of 6 updates so far" in words
    assert "No update was made yet" in words


def test_masks_show_what_is_picture_and_what_is_learned(run_page: str) -> None:
    page = run_page[run_page.index('id="masks"') :]
    assert "picture: 4 visual tokens" in page
    learned = re.findall(r'<mark class="learned">\u27e6(.*?)\u27e7</mark>', page.split("</p>", 1)[1], re.DOTALL)
    said = [re.sub("<[^>]*>", "", text).replace("&lt;", "<").replace("&gt;", ">") for text in learned]
    assert said == ["a red picture\u21b5\n", "red<|im_end|>", "a picture of the sky<|im_end|>"]


def test_the_page_is_small(comparison_page: str, run_page: str) -> None:
    assert len(comparison_page.encode()) < 400_000 and len(run_page.encode()) < 300_000


def test_the_same_directory_gives_the_same_page(comparison: Path, comparison_page: str) -> None:
    made = re.compile(r"Made [-0-9: ]+ UTC")
    assert made.sub("", render(read(comparison))) == made.sub("", comparison_page)


def test_the_command_writes_one_file(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_configure_logging", lambda: None)
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["distilvlm", "report", str(finished), "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert str(out) in capsys.readouterr().out
    assert out.read_text().startswith("<!doctype html>")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_without_a_place_the_page_goes_into_the_directory(comparison: Path) -> None:
    path = write_report(comparison)
    assert path == comparison / "report.html"
    path.unlink()
