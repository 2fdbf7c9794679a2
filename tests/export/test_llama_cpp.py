"""llama.cpp itself, with files of ours, says what the student says."""

import pytest
import torch

from distilvlm.export import export
from distilvlm.export.gguf.speaker import LlamaCpp
from distilvlm.export.ours import Ours, questions
from distilvlm.models.save import load

pytest.importorskip("gguf", reason="the gguf package writes these files: pip install 'distilvlm[gguf]'")
pytest.importorskip("llama_cpp", reason="llama.cpp is asked through llama-cpp-python, which compiles for minutes")


@pytest.mark.parametrize("language", ["llama", "llama-3", "qwen2"])
def test_every_type_of_every_language_model_says_what_it_holds(student, tmp_path, language):
    done = export(str(student("siglip", language)), "gguf", tmp_path / "out", types=["f16", "q8_0", "q4_0"], tokens=8)
    assert [check.what for check in done.checks] == ["gguf f16", "gguf q8_0", "gguf q4_0"]
    for check in done.checks:
        assert check.checked and check.passed, check.lines()
        assert all(case.same_prompt for case in check.cases)
    assert done.checks[0].worst < 0.005 and done.checks[0].cases[0].features < 0.01
    assert [note.split(":")[0] for note in done.notes if "rounded weights" in note] == ["q8_0", "q4_0"]


def test_a_picture_need_not_be_a_whole_number_of_patches(student, tmp_path):
    done = export(str(student("siglip-rest")), "gguf", tmp_path / "out", tokens=4)
    assert done.passed and done.checks[0].cases[0].features < 0.01


ODD = "It's 1234 DON'T  naïve\n\n 日本 x² `a`\tb\u00a0c <|end|> 3.14"


@pytest.mark.parametrize("splits", ["gpt-2", "smollm", "qwen2", "llama-bpe", "sentencepiece"])
def test_text_becomes_the_same_ids(student, tmp_path, splits):
    done = export(str(student("siglip", "qwen2", splits)), "gguf", tmp_path / "out", prompt=ODD, tokens=2)
    assert done.passed, done.checks[0].lines()
    assert all(case.same_prompt for case in done.checks[0].cases)


@pytest.mark.parametrize("vision", ["clip", "dinov2"])
def test_patches_behind_a_class_token_are_right_and_what_a_build_drops_is_told(student, tmp_path, vision):
    source = student(vision)
    done = export(str(source), "gguf", tmp_path / "out", tokens=4)
    ours = Ours(load(source), "pad")
    picture = questions([], "", plain=False)[0]
    theirs = LlamaCpp(tmp_path / "out" / "model-f16.gguf", tmp_path / "out" / "mmproj-f16.gguf", ours)
    ours.begin(picture)
    theirs.begin(picture)
    theirs.close()
    first = 0 if done.passed else 1  # a build that takes the class token for a patch hands over one patch less
    mine, other = ours.features[first:], theirs.features[: len(ours.features) - first]
    assert float((mine - other).norm() / mine.norm()) < 0.01
    assert any("issue 25814" in note for note in done.notes)
    text = next(case for case in done.checks[0].cases if case.name == "text alone")
    assert text.passed
    if not done.passed:
        assert "issue 25814" in done.checks[0].lines()[-1]


def test_a_wrong_order_of_queries_is_found(student, tmp_path, monkeypatch):
    monkeypatch.setattr("distilvlm.export.gguf.language._interleaved", lambda weight, heads: weight)
    done = export(str(student("siglip", "llama")), "gguf", tmp_path / "out", tokens=4)
    assert not done.passed


def test_a_file_that_llama_cpp_does_not_load_is_told_by_name(student, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"llama\.cpp does not load model\.gguf"):
        LlamaCpp(tmp_path / "model.gguf", tmp_path / "mmproj.gguf", Ours(load(student("siglip")), "pad"))


def test_a_token_that_llama_cpp_does_not_take_is_told_with_what_it_said(student, tmp_path):
    export(str(student("siglip")), "gguf", tmp_path / "out", tokens=1)
    ours = Ours(load(student("siglip")), "pad")
    theirs = LlamaCpp(tmp_path / "out" / "model-f16.gguf", tmp_path / "out" / "mmproj-f16.gguf", ours)
    with pytest.raises(ValueError, match=r"llama\.cpp gave up with -1: .*invalid token"):
        theirs.step(10**6)
    theirs.close()


def test_pictures_reach_llama_cpp_as_the_canvases_that_the_student_sees(student, tmp_path):
    """Another picture gives other logits, so equal ones are no accident."""
    from PIL import Image

    for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        Image.new("RGB", (30, 20), colour).save(tmp_path / f"{name}.png")
    files = [str(tmp_path / f"{name}.png") for name in ("red", "blue")]
    done = export(str(student("siglip")), "gguf", tmp_path / "out", pictures=files, tokens=1)
    assert done.passed and [case.name for case in done.checks[0].cases] == [*files, "text alone"]
    ours = Ours(load(student("siglip")), "pad")
    red, blue = (ours.begin(case) for case in questions(files, "Describe the picture.", plain=False)[:2])
    assert float((red - blue).abs().max()) > 10 * done.checks[0].worst * float(torch.stack([red, blue]).abs().max())
