"""ONNX graphs give the student's numbers, for any batch and length, with a cache that grows."""

import json

import numpy as np
import pytest
import torch

from distilvlm.export import export
from distilvlm.export.onnx.graphs import write_vision
from distilvlm.models.save import load

pytest.importorskip("onnxscript", reason="torch writes ONNX by onnxscript: pip install 'distilvlm[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="asks the graphs: pip install 'distilvlm[onnx]'")


@pytest.fixture(scope="module")
def exported(student, tmp_path_factory):
    out = tmp_path_factory.mktemp("onnx") / "out"
    return export(str(student("dinov2", "llama-3")), "onnx", out, tokens=6)


@pytest.fixture(scope="module")
def sessions(exported):
    return {
        name: onnxruntime.InferenceSession(exported.directory / "onnx" / f"{name}.onnx")
        for name in ("embed_tokens", "decoder_model_merged")
    }


def test_the_graphs_say_what_the_student_says(exported):
    assert exported.passed and exported.checks[0].checked
    assert exported.checks[0].worst < 1e-5
    assert {"config.json", "tokenizer.json", "preprocessor_config.json"} < set(exported.files)
    assert not [name for name in exported.files if "safetensors" in name]


@pytest.mark.parametrize("vision", ["clip", "siglip", "dinov2"])
def test_pictures_in_a_batch_are_each_its_own(student, tmp_path, vision):
    vlm = load(student(vision))
    write_vision(vlm, tmp_path / "vision.onnx")
    size = vlm.layout.size
    pixels = np.random.default_rng(0).standard_normal((3, 3, size, size)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    (together,) = session.run(None, {"pixel_values": pixels})
    with torch.no_grad():
        stock = vlm.model.get_image_features(pixel_values=torch.from_numpy(pixels)).pooler_output
    np.testing.assert_allclose(together, torch.stack([*stock]).numpy(), atol=1e-4)


def decoded(session, embedded, mask, positions, past):
    given = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": positions, **past}
    logits, *present = session.run(None, given)
    return logits, dict(zip(past, present, strict=True))


def nothing(session, rows):
    puts = [put for put in session.get_inputs() if put.name.startswith("past_key_values")]
    return {put.name: np.zeros((rows, put.shape[1], 0, put.shape[3]), np.float32) for put in puts}


def test_rows_of_several_lengths_answer_as_each_alone(sessions):
    decoder, embed = sessions["decoder_model_merged"], sessions["embed_tokens"]
    rng = np.random.default_rng(0)
    lines = [rng.integers(0, 300, length) for length in (3, 7, 5)]
    mask = np.array([[0] * (7 - len(line)) + [1] * len(line) for line in lines], np.int64)
    ids = np.array([[0] * (7 - len(line)) + [*line] for line in lines], np.int64)
    positions = (mask.cumsum(1) - 1).clip(0)
    (embedded,) = embed.run(None, {"input_ids": ids})
    together, past = decoded(decoder, embedded, mask, positions, nothing(decoder, 3))
    chosen = together[:, -1].argmax(-1)[:, None]
    (next_row,) = embed.run(None, {"input_ids": chosen})
    longer = np.concatenate([mask, np.ones((3, 1), np.int64)], 1)
    after, _ = decoded(decoder, next_row, longer, longer.sum(1, keepdims=True) - 1, past)
    for row, line in enumerate(lines):
        alone_ids = np.array([[*line, chosen[row, 0]]], np.int64)
        (embedded,) = embed.run(None, {"input_ids": alone_ids})
        ones = np.ones_like(alone_ids)
        logits, _ = decoded(decoder, embedded, ones, ones.cumsum(1) - 1, nothing(decoder, 1))
        np.testing.assert_allclose(together[row, -1], logits[0, -2], atol=1e-4)
        np.testing.assert_allclose(after[row, -1], logits[0, -1], atol=1e-4)


def test_nothing_of_this_machine_is_in_the_graphs(exported):
    for name in exported.files:
        if name.endswith(".onnx"):
            content = (exported.directory / name).read_bytes()
            assert b"distilvlm/" not in content and b"site-packages" not in content, name
    told = json.loads((exported.directory / "config.json").read_text())["transformers.js_config"]
    assert told == {"dtype": "fp32", "use_external_data_format": True}
