"""Further files of IAA's golden cases are compared, too: other sizes, and arrays that the shipped file lacks.

They are made here by stock Llamas alone: an adaptor's workflow is a deeper Llama, whose layers stand in the order of
the flow.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import CLIPVisionConfig, CLIPVisionModel, GenerationConfig, LlamaConfig, LlamaForCausalLM

from tests import golden_iaa as ours
from tests.conftest import SHIPPED
from tests.golden_cases import Arrays, GoldenCase, find

USED = (0, 1, 5)  # of the published positions, those of six layers
FLOWS = {"MM": ("_condition", "_condtion", ""), "G": ("_condition_grounding", "_condtion_grounding", "_G")}
CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
FACTS = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "clip": CLIP,
}
TEXT_MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])


class Reference:
    """Weights in the reference's layout, and stock Llamas that compute what its flows do."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(5)
        self.base = self.llama(6)
        self.flows = {name: self.llama(6 + len(USED)) for name in FLOWS}
        self.tower = CLIPVisionModel(CLIPVisionConfig(**CLIP)).eval()
        self.order = [(i, kind) for i in range(6) for kind in ("base", "own") if kind == "base" or i in USED]
        base = self.base.state_dict()
        self.weights = dict(base)
        for name, (mark, sic, letter) in FLOWS.items():
            own = self.flows[name].state_dict()
            for place, (layer, kind) in enumerate(self.order):
                for key in [k for k in own if k.startswith(f"model.layers.{place}.")]:
                    rest = key.split(".", 3)[3]
                    if kind == "base":
                        own[key].copy_(base[f"model.layers.{layer}.{rest}"])
                    else:
                        number = USED.index(layer)
                        self.weights[f"model.condition_layers{mark.removeprefix('_condition')}.{number}.{rest}"] = own[
                            key
                        ]
            self.weights[f"model.embed_tokens{mark}.weight"] = own["model.embed_tokens.weight"]
            self.weights[f"model.norm{mark}.weight"] = own["model.norm.weight"]
            self.weights[f"lm_head{sic}.weight"] = own["lm_head.weight"]
            for layer, wide in ((0, 16), (2, 24)):
                self.weights[f"model.mm_projector{letter}.{layer}.weight"] = self.random(24, wide)
                self.weights[f"model.mm_projector{letter}.{layer}.bias"] = self.random(24)
        for key, value in self.tower.state_dict().items():
            self.weights[f"model.vision_tower.vision_tower.vision_model.{key}"] = value

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.draw) * 0.3

    def llama(self, layers: int) -> Any:
        names = {
            name for name in FACTS if name not in ("clip", "rope_theta") and not name.startswith(("mm_", "image_"))
        }
        facts = {name: FACTS[name] for name in names} | {"num_hidden_layers": layers}
        model = LlamaForCausalLM(LlamaConfig(**facts)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(self.random(*parameter.shape))
        return model

    def projected(self, flow: str, features: Tensor) -> Tensor:
        letter = FLOWS[flow][2]
        weight = {n: self.weights[f"model.mm_projector{letter}.{n}.weight"] for n in (0, 2)}
        bias = {n: self.weights[f"model.mm_projector{letter}.{n}.bias"] for n in (0, 2)}
        hidden = torch.nn.functional.gelu(features @ weight[0].T + bias[0])
        return hidden @ weight[2].T + bias[2]

    def spliced(self, flow: str, ids: Tensor, labels: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = self.flows[flow].model.embed_tokens.weight
        rows, targets = [], []
        for row, (tokens, learned) in enumerate(zip(ids.tolist(), labels.tolist(), strict=True)):
            pieces = [pictures[row] if token == -200 else table[token][None] for token in tokens]
            rows.append(torch.cat(pieces))
            wide = [len(piece) for piece in pieces]
            targets.append([t for label, n in zip(learned, wide, strict=True) for t in [label if n == 1 else -100] * n])
        longest = max(map(len, rows))
        embeds, found = torch.zeros(len(rows), longest, table.shape[1]), torch.full((len(rows), longest), -100)
        mask = torch.zeros(len(rows), longest, dtype=torch.int64)
        for number, row in enumerate(rows):
            embeds[number, : len(row)], mask[number, : len(row)] = row, 1
            found[number, : len(row)] = torch.tensor(targets[number])
        return embeds, mask, found


def hidden(out: Any, places: Sequence[int]) -> Tensor:
    """What each layer of the base reads, and the last, normed ones."""
    return torch.stack([out.hidden_states[place] for place in (*places, len(out.hidden_states) - 1)])


def made() -> dict[str, Tensor | str]:
    reference = Reference()
    draw = reference.draw
    with torch.no_grad():
        pixels = torch.randn(2, 3, 8, 8, generator=draw)
        features = reference.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        text = torch.randint(3, 50, (2, 7), generator=draw)
        ids = torch.randint(3, 50, (2, 6), generator=draw)
        ragged = torch.randint(3, 50, (2, 6), generator=draw)
        labels = {"mm": ids.clone(), "ragged": ragged.clone()}
        ids[0, 1] = ids[1, 3] = ragged[0, 2] = -200
        for learned in labels.values():
            learned[:, :4] = -100
        labels["mm"][0, 3] = ids[0, 3]
        given = {"text_ids": text, "text_padmask": TEXT_MASK, "mm_ids": ids, "mm_labels": labels["mm"]}
        given |= {"pixel_values": pixels, "ragged_ids": ragged, "ragged_labels": labels["ragged"]}
        mid: Arrays = {"vision_features": features}
        plain = reference.base(input_ids=text, output_hidden_states=True)
        out: Arrays = {"text_logits": plain.logits, "text_hidden_states": hidden(plain, range(6))}
        out["text_rightpad_logits"] = reference.base(input_ids=text, attention_mask=TEXT_MASK).logits
        settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        settings |= {"output_logits": True, "return_dict_in_generate": True}
        greedy = {"Text": reference.base.generate(text, generation_config=GenerationConfig(**settings))}
        for flow, model in reference.flows.items():
            pictures = mid[f"image_embeds_{flow}"] = reference.projected(flow, features)
            embeds, mask, targets = reference.spliced(flow, ids, labels["mm"], pictures)
            mid |= {f"{flow}_inputs_embeds": embeds, f"{flow}_attention_mask": mask}
            seen = model(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True, use_cache=True)
            places = [place for place, (_, kind) in enumerate(reference.order) if kind == "base"]
            out |= {f"{flow}_logits": seen.logits, f"{flow}_hidden_states": hidden(seen, places)}
            out[f"{flow}_noimage_logits"] = model(input_ids=text).logits
            for kind, name in (("base", "base"), ("own", "iaa")):
                slots = [p for p, (_, which) in enumerate(reference.order) if which == kind]
                for part in ("key", "value"):
                    layers = [getattr(seen.past_key_values.layers[slot], f"{part}s") for slot in slots]
                    out[f"{flow}_prefill_{name}_{part}_cache"] = torch.stack(layers)
            given_too = {"inputs_embeds": embeds, "attention_mask": mask}
            greedy[flow] = model.generate(**given_too, generation_config=GenerationConfig(**settings))
        for flow, found in greedy.items():
            out[f"{flow}_greedy_tokens"] = found.sequences[:, -4:]
            out[f"{flow}_greedy_step_logits"] = torch.stack(found.logits, 1)
        mid["MM_labels_spliced"] = reference.spliced("MM", ids, labels["mm"], mid["image_embeds_MM"])[2]
        for which, rows in (("MM", ids), ("ragged", ragged)):
            key = "mm" if which == "MM" else which
            embeds, mask, targets = reference.spliced("MM", rows, labels[key], mid["image_embeds_MM"])
            logits = reference.flows["MM"](inputs_embeds=embeds, attention_mask=mask).logits
            out[f"{which}_loss"] = cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
            if which == "ragged":
                mid |= {"ragged_inputs_embeds": embeds, "ragged_attention_mask": mask, "ragged_labels": targets}
                out["ragged_logits"] = logits
        twice = [layer for layer in range(6) for _ in range(2 if layer in USED else 1)]
        copy = reference.llama(6 + len(USED))
        state = reference.base.state_dict()
        for place, layer in enumerate(twice):
            for key in [k for k in copy.state_dict() if k.startswith(f"model.layers.{place}.")]:
                state[key] = reference.base.state_dict()[f"model.layers.{layer}.{key.split('.', 3)[3]}"]
        copy.load_state_dict(state)
        out["init_copy_MM_noimage_logits"] = copy(input_ids=text).logits
    meta = {"config_json": json.dumps(FACTS), "ehce_layers_used": torch.tensor(USED)}
    cases = {"w": reference.weights, "in": given, "mid": mid, "out": out, "meta": meta}
    return {f"{case}/{name}": array for case, arrays in cases.items() for name, array in arrays.items()}


@pytest.fixture(scope="module")
def further(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("golden")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        arrays = made()
    kept = {name: array if isinstance(array, str) else array.numpy() for name, array in arrays.items()}
    np.savez(directory / "iaa_further.npz", **kept)  # type: ignore[arg-type]
    return directory


def case_of(directory: Path, name: str) -> GoldenCase:
    return next(case for case in find(directory).cases if case.file.startswith("iaa") and case.name == name)


@pytest.mark.parametrize("name", ["w", "in", "mid", "out", "meta"])
def test_further_cases_agree(further: Path, name: str):
    reading = ours.read(case_of(further, name))
    assert reading is not None
    assert reading.given | reading.compared == set(reading.names)


def altered(array: Tensor, place: int) -> Tensor:
    changed = array.clone().view(-1)
    changed[place] += 1e-2 * max(1.0, float(array.abs().max())) if array.is_floating_point() else 1
    return changed.view_as(array)


@pytest.mark.parametrize("name", ["mid", "out", "gradnorm", "grad", "metric", "pad", "meta"])
def test_every_altered_output_of_the_shipped_file_is_noticed(name: str):
    require_noticed(case_of(SHIPPED, name))


@pytest.mark.parametrize("name", ["mid", "out", "meta"])
def test_every_altered_output_of_further_files_is_noticed(further: Path, name: str):
    require_noticed(case_of(further, name))


def require_noticed(case: GoldenCase) -> None:
    reading = ours.read(case)
    assert reading is not None
    for key in sorted(reading.compared):
        for entry in (0,) if key in reading.given else (0, -1):  # where only some positions count, the first does
            arrays = {**case.arrays, key: altered(case.arrays[key], entry)}
            with pytest.raises(AssertionError):
                ours.read(replace(case, arrays=arrays))
                pytest.fail(f"{case.name}/{key} may change unnoticed")


@pytest.mark.parametrize(
    ("name", "key", "notices"),
    [
        ("w", "model.condition_layers.2.mlp.up_proj.weight", "out"),
        ("w", "lm_head_condtion_grounding.weight", "out"),
        ("w", "model.mm_projector_G.2.bias", "mid"),
        ("w", "model.vision_tower.vision_tower.vision_model.embeddings.class_embedding", "mid"),
        ("in", "text_ids", "out"),
        ("in", "ragged_labels", "out"),
        ("in", "pixel_values", "mid"),
    ],
)
def test_an_altered_input_changes_what_is_computed_of_it(further: Path, name: str, key: str, notices: str):
    case = case_of(further, notices)
    given = case.siblings[name]
    change = given[key] * 1.05 + 0.01 if given[key].is_floating_point() else given[key].roll(1, -1)
    siblings = {**case.siblings, name: {**given, key: change}}
    with pytest.raises(AssertionError):
        ours.read(replace(case, siblings=siblings))


def test_an_array_that_nothing_compares_fails_its_case_by_name(further: Path):
    case = case_of(further, "out")
    with pytest.raises(pytest.fail.Exception, match=r"iaa_further\.npz: nothing here compares warmth of case 'out'"):
        ours.read(replace(case, arrays={**case.arrays, "warmth": torch.zeros(())}))


def test_one_batch_of_all_workflows_writes_the_tokens_of_each_alone(further: Path):
    """Rows of text, of pictures and of boxes in turn, left-padded: the reference's own tokens, to the last."""
    case = case_of(further, "out")
    model = ours.model_of(case)
    embeds, lengths, workflows, expected = [], [], [], []
    for row in (0, 1):
        for flow, workflow in ours.WORKFLOWS.items():
            if flow == "Text":
                with model.host.use("text"):
                    rows = model.vlm.model.get_input_embeddings()(model.given["text_ids"])
            else:
                rows, _ = model.prompt("mm", workflow)
            embeds.append(rows[row].detach())
            lengths.append(rows.shape[1])
            workflows.append(workflow)
            expected.append(case.arrays[f"{flow}_greedy_tokens"][row].tolist())
    longest = max(lengths)
    padded = torch.stack([torch.cat([torch.zeros(longest - len(one), one.shape[1]), one]) for one in embeds])
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths])
    settings = GenerationConfig(max_new_tokens=len(expected[0]), do_sample=False, pad_token_id=0)
    with model.host.use(workflows):
        out: Any = model.vlm.model.generate(inputs_embeds=padded, attention_mask=mask, generation_config=settings)
    assert out[:, -len(expected[0]) :].tolist() == expected
