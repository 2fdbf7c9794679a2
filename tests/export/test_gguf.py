"""GGUF files hold the student's numbers under llama.cpp's names, and nothing that is never read."""

import numpy as np
import pytest
import torch
from transformers.utils.chat_template_utils import render_jinja_template

from distilvlm.export import export
from distilvlm.export.gguf.language import holding
from distilvlm.export.gguf.writing import held
from distilvlm.export.ours import Ours, questions
from distilvlm.models.plain_vit import plain_vit
from distilvlm.models.save import load, save

gguf = pytest.importorskip("gguf", reason="the gguf package writes these files: pip install 'distilvlm[gguf]'")


@pytest.fixture(scope="module")
def written(student, tmp_path_factory):
    """written(vision, language, splits) → (student, {file: tensors by name}, {file: metadata by key}), of all types."""
    made = {}

    def write(*which):
        if which not in made:
            out = tmp_path_factory.mktemp("gguf") / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("distilvlm.export.exporting._has_llama_cpp", lambda: False)
                done = export(str(student(*which)), "gguf", out, types=["f16", "q8_0", "q4_0"])
            assert [check.checked for check in done.checks] == [False] * 3
            readers = {file: gguf.GGUFReader(out / file) for file in done.files}
            tensors = {file: {tensor.name: tensor for tensor in held.tensors} for file, held in readers.items()}
            facts = {
                file: {key: field.contents() for key, field in held.fields.items()} for file, held in readers.items()
            }
            made[which] = load(student(*which)), tensors, facts
        return made[which]

    return write


def values(tensor):
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def test_nothing_is_checked_without_llama_cpp_and_that_is_said(student, tmp_path, monkeypatch):
    monkeypatch.setattr("distilvlm.export.exporting._has_llama_cpp", lambda: False)
    done = export(str(student("siglip")), "gguf", tmp_path / "out")
    assert done.files == ("mmproj-f16.gguf", "model-f16.gguf") and done.passed
    assert "NOT CHECKED: llama-cpp-python is not installed" in done.checks[0].lines()[0]
    assert '"passed": null' in (tmp_path / "out" / "parity.json").read_text()


@pytest.mark.parametrize("language", ["llama", "qwen2"])
def test_the_language_model_is_all_there_in_the_types_asked_for(written, language):
    vlm, tensors, facts = written("siglip", language)
    parameters = {id(p) for p in [*vlm.model.get_decoder().parameters(), vlm.model.lm_head.weight]}
    for wanted in ("f16", "q8_0", "q4_0"):
        file = tensors[f"model-{wanted}.gguf"]
        assert len(file) == len(parameters)  # a tied head stands there once
        assert ("output.weight" in file) == (language != "llama")
        assert facts[f"model-{wanted}.gguf"]["general.architecture"] == language
        assert file["blk.0.attn_norm.weight"].tensor_type.name == "F32"
        assert file["blk.0.ffn_up.weight"].tensor_type.name == wanted.upper()
        better = {"f16": "F16", "q8_0": "Q8_0", "q4_0": "Q8_0"}[wanted]
        assert file["token_embd.weight"].tensor_type.name == better
    down = vlm.model.get_decoder().layers[1].mlp.down_proj.weight
    for wanted, near in (("f16", 1e-3), ("q8_0", 1e-2), ("q4_0", 0.1)):
        found = values(tensors[f"model-{wanted}.gguf"]["blk.1.ffn_down.weight"])
        assert torch.equal(found, held(down, wanted))
        assert 0 < float((found - down.detach()).norm() / down.detach().norm()) < near


def test_llamas_queries_and_keys_are_in_the_order_of_adjacent_pairs(written):
    """Rotating (2i, 2i + 1) of what is written is rotating (i, i + half) of what the student has."""
    vlm, tensors, _ = written("siglip", "llama")
    attention = vlm.model.get_decoder().layers[0].self_attn
    half = attention.head_dim // 2
    for name, ours, heads in (("attn_q", attention.q_proj, 4), ("attn_k", attention.k_proj, 2)):
        theirs = values(tensors["model-f16.gguf"][f"blk.0.{name}.weight"]).view(heads, half, 2, -1)
        mine = held(ours.weight, "f16").view(heads, 2, half, -1)
        assert torch.equal(theirs[:, :, 0], mine[:, 0]) and torch.equal(theirs[:, :, 1], mine[:, 1])
    _, tensors, _ = written("siglip", "qwen2")  # which llama.cpp rotates as transformers does
    vlm = written("siglip", "qwen2")[0]
    query = vlm.model.get_decoder().layers[0].self_attn.q_proj
    assert torch.equal(values(tensors["model-f16.gguf"]["blk.0.attn_q.weight"]), held(query.weight, "f16"))
    assert torch.equal(values(tensors["model-f16.gguf"]["blk.0.attn_q.bias"]), query.bias)


def test_words_ends_and_template_are_the_students(written):
    vlm, _, facts = written("siglip", "llama")
    told = facts["model-f16.gguf"]
    assert told["tokenizer.ggml.model"] == "gpt2" and told["tokenizer.ggml.pre"] == "gpt-2"
    assert len(told["tokenizer.ggml.tokens"]) == vlm.embedding_rows == told["llama.vocab_size"]
    assert "<image>" not in told["tokenizer.ggml.tokens"]  # it has no row, and llama.cpp does not need it
    ids = vlm.tokenizer.get_vocab()
    assert told["tokenizer.ggml.eos_token_id"] == ids["<|endoftext|>"]
    assert told["tokenizer.ggml.eot_token_id"] == ids["<|end|>"]
    assert told["tokenizer.ggml.token_type"][ids["<|user|>"]] == gguf.TokenType.CONTROL
    assert told["tokenizer.chat_template"].count("{% for message in messages %}{{ '<|'") == 1
    assert told["tokenizer.ggml.add_bos_token"] is False
    spare = written("siglip", "qwen2")[2]["model-f16.gguf"]
    assert spare["tokenizer.ggml.tokens"][399] == "[PAD399]"
    assert spare["tokenizer.ggml.token_type"][399] == gguf.TokenType.UNUSED


@pytest.mark.parametrize("marker", ["<__media__>", "<__media_aB3x__>"])
@pytest.mark.parametrize("between", ["", "\n"])
def test_behind_llama_cpps_marker_stands_the_newline_of_training(student, written, marker, between):
    vlm, _, facts = written("siglip", "llama")
    template = facts["model-f16.gguf"]["tokenizer.chat_template"]
    ours = Ours(vlm, "pad")
    case = questions([], "What is this?", plain=False)[0]
    for asked, content in ((case, marker + between + case.prompt), (questions([], "", plain=False)[1], None)):
        said = render_jinja_template(
            [[{"role": "user", "content": content or asked.prompt}]], chat_template=template, add_generation_prompt=True
        )[0][0]
        assert said == ours.marked(ours.text(asked), marker)


@pytest.mark.parametrize("vision", ["siglip", "clip", "dinov2"])
def test_the_tower_is_cut_to_the_layer_that_is_read(written, vision):
    vlm, tensors, facts = written(vision, "llama")
    eyes, told = tensors["mmproj-f16.gguf"], facts["mmproj-f16.gguf"]
    depth = vlm.model.config.vision_config.num_hidden_layers
    read = vlm.layout.layer % (depth + 1)
    assert 0 < read < depth  # so there is something to cut
    assert told["clip.vision.block_count"] == read and told["clip.vision.feature_layer"] == [read]
    assert {name.split(".")[2] for name in eyes if name.startswith("v.blk.")} == {str(layer) for layer in range(read)}
    assert not [name for name in eyes if "post_ln" in name]
    assert ("v.class_embd" in eyes) == (vision != "siglip")
    assert ("v.pre_ln.weight" in eyes) == (vision == "clip")
    assert told["clip.projector_type"] == "mlp" and told.get("clip.use_gelu", False) == (vision != "clip")
    assert told["clip.vision.image_mean"] == pytest.approx(vlm.layout.mean)
    assert torch.equal(values(eyes["mm.2.weight"]), held(vlm.model.model.multi_modal_projector.linear_2.weight, "f16"))


@pytest.mark.parametrize("vision", ["siglip", "clip", "dinov2"])
def test_the_plain_tower_computes_what_the_stock_one_computes(student, vision):
    vlm = load(student(vision))
    tower, layout = vlm.model.model.vision_tower.eval(), vlm.layout
    vit = plain_vit(tower, layout)
    pixels = torch.randn(1, 3, layout.size, layout.size, generator=torch.Generator().manual_seed(0))
    patches = torch.nn.functional.conv2d(pixels, vit.patch, stride=layout.patch)[0].flatten(1).T  # [patches, d]
    x = vit.constant.clone()
    x[int(vit.class_token) :] += patches
    norm = torch.nn.functional.layer_norm
    width = x.shape[1]
    if vit.before is not None:
        x = norm(x, (width,), *vit.before, vit.epsilon)
    activations = {"gelu": {}, "gelu_pytorch_tanh": {"approximate": "tanh"}}
    for block in vit.blocks:
        y = norm(x, (width,), *block.first, vit.epsilon)
        query, key, value = (
            (y @ weight.T + bias).view(len(x), vit.heads, -1).transpose(0, 1)
            for weight, bias in (block.query, block.key, block.value)
        )
        mixed = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1) @ value
        x = x + mixed.transpose(0, 1).flatten(1) @ block.output[0].T + block.output[1]
        y = norm(x, (width,), *block.second, vit.epsilon) @ block.up[0].T + block.up[1]
        if vit.activation == "quick_gelu":
            y = y * torch.sigmoid(1.702 * y)
        else:
            y = torch.nn.functional.gelu(y, **activations[vit.activation])
        x = x + y @ block.down[0].T + block.down[1]
    with torch.no_grad():
        stock = tower(pixels, output_hidden_states=True).hidden_states[layout.layer][0]
    torch.testing.assert_close(x, stock, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("language", ["llama", "qwen2"])
def test_a_student_that_held_a_files_weights_is_itself_again(student, language):
    vlm = load(student("siglip", language))
    before = {name: parameter.clone() for name, parameter in vlm.model.named_parameters()}
    tied = vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight
    with holding(vlm, "q4_0"):
        up = vlm.model.get_decoder().layers[0].mlp.up_proj.weight
        assert torch.equal(up, held(before["model.language_model.layers.0.mlp.up_proj.weight"], "q4_0"))
        assert torch.equal(vlm.model.lm_head.weight, held(vlm.model.lm_head.weight, "q8_0"))
    assert (vlm.model.lm_head.weight is vlm.model.get_input_embeddings().weight) == tied
    for name, parameter in vlm.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_bf16_student_becomes_the_same_files_as_its_fp32_twin(student, tmp_path, monkeypatch):
    monkeypatch.setattr("distilvlm.export.exporting._has_llama_cpp", lambda: False)
    vlm = load(student("dinov2"), torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float32):
        vlm.model.to(dtype)
        save(vlm, tmp_path / "student", "pad", replace=True)
        export(str(tmp_path / "student"), "gguf", tmp_path / str(dtype))
    for name in ("mmproj-f16.gguf", "model-f16.gguf"):
        one, other = ((tmp_path / str(dtype) / name).read_bytes() for dtype in (torch.bfloat16, torch.float32))
        assert one == other, name


def test_values_that_f16_has_no_place_for_are_refused_by_name(student, tmp_path):
    vlm = load(student("siglip"))
    vlm.model.get_decoder().layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    save(vlm, tmp_path / "student", "pad")
    with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight holds a value that is not finite in f16"):
        export(str(tmp_path / "student"), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()
