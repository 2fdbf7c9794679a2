"""A conversation line by line: what was said before counts, pictures stand where they were shown, it can be stopped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from distilvlm.cli import app
from distilvlm.models.adaptors import files
from distilvlm.models.save import save
from distilvlm.serve import loading
from distilvlm.serve.chat import Talk
from distilvlm.serve.interface import Message, Refused, Request
from distilvlm.serve.local import LocalEngine

from . import small_models as tiny


@pytest.fixture(scope="module")
def engine() -> Iterator[LocalEngine]:
    made = loading.around(tiny.vlm(adaptors=True), "tiny", "pad", "chat")
    yield made
    made.drain(0)


class Terminal:
    """What a terminal shows."""

    def __init__(self, engine: LocalEngine, **settings: object) -> None:
        self.said: list[str] = []
        self.told: list[str] = []
        begun = Request("text", **{"temperature": 0.0, "max_tokens": 8, **settings})
        self.talk = Talk(engine, begun, self.said.append, self.told.append)

    @property
    def answers(self) -> list[str]:
        return "".join(self.said).split("\n")[:-1]


def direct(engine: LocalEngine, *turns: str, model: str = "text", pictures: tuple = ()) -> str:
    roles = ("user", "assistant") * len(turns)
    messages = tuple(Message(role, turn) for role, turn in zip(roles, turns, strict=False))
    request = Request(model, messages, pictures=pictures, temperature=0.0, max_tokens=8)
    return "".join(piece.text for piece in engine.submit(request))


def test_what_was_said_before_counts_until_it_is_forgotten(engine: LocalEngine) -> None:
    terminal = Terminal(engine)
    assert terminal.talk.run(["who?\n", "why?\n", "/reset", "why?"]) == 0
    first = direct(engine, "who?")
    assert terminal.answers == [first, direct(engine, "who?", first, "why?"), direct(engine, "why?")]
    assert terminal.answers[1] != terminal.answers[2]


def test_a_picture_stands_before_the_next_question_and_in_all_after_it(engine: LocalEngine, tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    tiny.picture(1).save(file)
    terminal = Terminal(engine)
    assert terminal.talk.run([f"/picture {file}", "what?", "and?"]) == 0
    shown = (tiny.picture(1),)
    first = direct(engine, "<image>\nwhat?", pictures=shown)
    assert terminal.answers == [first, direct(engine, "<image>\nwhat?", first, "and?", pictures=shown)]
    assert first != direct(engine, "what?")


def test_another_model_goes_on_with_the_conversation(engine: LocalEngine) -> None:
    terminal = Terminal(engine)
    assert terminal.talk.run(["/model seeing", "who?", "/model"]) == 0
    assert terminal.answers == [direct(engine, "who?", model="seeing")] != [direct(engine, "who?")]
    assert "seeing (answers now)" in terminal.told[-1]


def test_what_is_wrong_is_told_and_the_conversation_goes_on(engine: LocalEngine) -> None:
    terminal = Terminal(engine)
    lines = ["/picture nowhere.png", "/model nobody", "/what", "x" * 300, "who?", "/quit", "never asked"]
    assert terminal.talk.run(lines) == 4
    assert "no such file" in terminal.told[0] and "no such model" in terminal.told[1]
    assert "/picture FILE" in terminal.told[2] and "context of 256" in terminal.told[3]
    assert terminal.answers == [direct(engine, "who?")]


def test_an_interrupt_stops_the_answer_and_keeps_what_was_said(engine: LocalEngine) -> None:
    terminal = Terminal(engine, max_tokens=200)

    def interrupted(text: str) -> None:
        terminal.said.append(text)
        if len("".join(terminal.said)) == 5:
            raise KeyboardInterrupt

    terminal.talk.say = interrupted
    assert terminal.talk.ask("who?")
    assert terminal.told[-1].startswith("stopped, ")
    assert [message.role for message in terminal.talk.settings.messages] == ["user", "assistant"]
    assert terminal.talk.settings.messages[1].text == terminal.answers[0] and len(terminal.answers[0]) == 5


def test_the_command_answers_what_is_piped_into_it(engine: LocalEngine, tmp_path: Path) -> None:
    vlm = tiny.vlm(adaptors=True)
    assert vlm.host is not None
    files.save(vlm.host, "seeing", tmp_path / "seeing", {"geometry": "pad", "template": "chat"})
    plain = tiny.vlm()
    plain.model.load_state_dict(vlm.model.state_dict())
    save(plain, tmp_path / "student" / "model", "pad")
    picture = tmp_path / "a.png"
    tiny.picture(1).save(picture)
    given = ["chat", str(tmp_path / "student" / "model"), "--adaptor", f"look={tmp_path / 'seeing'}"]
    settings = ["--picture", str(picture), "--max-tokens", "8"]
    done = CliRunner().invoke(app, [*given, *settings], input="what?\n/model nobody\n")
    expected = direct(engine, "<image>\nwhat?", model="seeing", pictures=(tiny.picture(1),))
    assert done.stdout == f"{expected}\n"
    assert done.exit_code == 1 and "no such model: text, look (answers now)" in done.stderr


def test_a_model_alone_is_called_as_its_directory(tmp_path: Path) -> None:
    save(tiny.vlm(), tmp_path / "student" / "model", "square")
    made = loading.engine(tmp_path / "student" / "model")
    made.drain(0)
    (told,) = made.models
    assert (told.name, told.geometry, told.boxes) == ("student", "square", False)


def test_a_language_model_alone_is_served_and_sees_nothing(tmp_path: Path) -> None:
    model = LlamaForCausalLM(tiny.vlm().model.config.text_config)
    model.save_pretrained(tmp_path / "words")
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    made = loading.engine(tmp_path / "words")
    try:
        assert [(one.name, one.sees) for one in made.models] == [("words", False)]
        with pytest.raises(Refused, match="sees nothing") as refused:
            made.submit(tiny.asked(1, "words"))
        assert refused.value.field == "pictures"
        assert len([id for piece in made.submit(tiny.asked(3, "words")) for id in piece.ids]) > 0
    finally:
        made.drain(0)
