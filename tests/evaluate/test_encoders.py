"""Encoders measured by themselves: neighbours, a probe, and the distance to teachers' features."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from distilvlm.data import DataError
from distilvlm.evaluate import difference
from distilvlm.evaluate.encoders import (
    FEATURE_READOUT,
    Compared,
    Labels,
    Readout,
    Vectors,
    feature_errors,
    feature_questions,
    fitted,
    labelled,
    measured,
    nearest,
    pictures,
    predicting_the_mean,
    taken,
)
from distilvlm.evaluate.encoders.error import Pairs
from distilvlm.models.encoders import build_encoder
from distilvlm.recipe.encoders import EncoderSpec

VIT = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/{train,test}/COLOUR/*.png: noisy pictures of three colours, 12 and 4 of each."""
    root, random = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 4)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + random.normal(0, 25, (20, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def labels(folders: Path) -> Labels:
    return Labels(labelled(folders / "train"), labelled(folders / "test"))


def test_neighbours_vote_with_weights_of_their_cosines() -> None:
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 2])
    query = torch.tensor([[3.0, 1.0]])
    assert nearest(gallery, labels, query, k=1).tolist() == [0]
    assert nearest(gallery, labels, query, k=3, temperature=0.07).tolist() == [
        0
    ]  # one that is much nearer outvotes two
    assert nearest(gallery, labels, query, k=3, temperature=10.0).tolist() == [1]
    assert nearest(gallery, labels, -query, k=50).tolist() == [2]  # k larger than the gallery is all of it


def test_equally_near_neighbours_count_in_order_and_ties_go_to_the_smallest_class() -> None:
    gallery = torch.tensor([[1.0, 0.0]] * 3)
    assert nearest(gallery, torch.tensor([2, 1, 0]), gallery[:1], k=1).tolist() == [2]
    assert nearest(gallery, torch.tensor([2, 1, 0]), gallery[:1], k=2).tolist() == [1]
    with pytest.raises(ValueError, match="2 labels for 3 training pictures"):
        nearest(gallery, torch.tensor([0, 1]), gallery)


def clouds(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three overlapping clouds in 6 dimensions, one of which is the same everywhere."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.tensor([[2.0, 0, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0]])
    found = centres[labels] + torch.randn(count, 6, generator=random)
    found[:, 5] = 7.0
    return found, labels


def test_a_probe_is_at_the_minimum_of_its_convex_loss() -> None:
    inputs, labels = clouds(90, 0)
    probe = fitted(inputs, labels, torch.arange(90) % 5 == 0)
    weight = probe.weight.clone().requires_grad_(True)
    bias = probe.bias.clone().requires_grad_(True)
    scaled = (inputs.double() - probe.mean) / probe.deviation
    loss = nn.functional.cross_entropy(scaled @ weight.T + bias, labels) + probe.strength / 2 * weight.square().sum()
    loss.backward()
    assert weight.grad is not None and bias.grad is not None
    assert max(float(weight.grad.abs().max()), float(bias.grad.abs().max())) < 1e-6
    test, truth = clouds(600, 1)
    assert (probe.classes(test) == truth).double().mean() > 0.75
    again = fitted(inputs, labels, torch.arange(90) % 5 == 0)
    assert torch.equal(again.weight, probe.weight)


def test_the_penalty_is_chosen_on_pictures_that_are_held_out() -> None:
    random = torch.Generator().manual_seed(3)
    noise, labels = torch.randn(60, 40, generator=random), torch.arange(60) % 2
    held_out = torch.arange(60) >= 40
    assert fitted(noise, labels, held_out).strength >= 1  # nothing to learn: the strongest fits new pictures best
    plain = labels[:, None] * 4.0 + torch.randn(60, 1, generator=random)
    assert fitted(plain, labels, held_out).strength < 1
    with pytest.raises(ValueError, match="0 of 60 training pictures are held out"):
        fitted(noise, labels, held_out & False)


def test_an_encoder_is_measured_on_folders_and_the_same_on_rows(folders: Path, labels: Labels) -> None:
    encoder = build_encoder(EncoderSpec(config=VIT, layer=1), "tiny", seed=1)
    found = measured(Vectors(encoder, pooling="both"), labels)
    assert list(found) == ["knn", "probe"]
    assert found["knn"].n == 12 and found["knn"].by_picture
    for evaluation in found.values():  # a random encoder still tells colours
        assert evaluation.main is not None and evaluation.main.mean > 0.9
    assert {sample.prediction for sample in found["knn"].samples} <= {*COLOURS}

    files = {}
    for part in ("train", "test"):
        rows = [
            {
                "image": str(path.relative_to(folders)),
                "conversations": [
                    {"from": "human", "value": "<image>\nWhich class?"},
                    {"from": "gpt", "value": path.parent.name},
                ],
            }
            for path in sorted((folders / part).rglob("*.png"))
        ]
        files[part] = folders / f"{part}.json"
        files[part].write_text(json.dumps(rows))
    by_rows = measured(Vectors(encoder, pooling="both"), Labels(*(labelled(files[part], folders) for part in files)))
    for name, evaluation in by_rows.items():
        assert [one.prediction for one in evaluation.samples] == [one.prediction for one in found[name].samples]


def test_vectors_do_not_depend_on_the_batch(labels: Labels) -> None:
    encoder = build_encoder(EncoderSpec(config=VIT, layer=1), "tiny", seed=1)
    paths = pictures(labels.test)
    together, alone = (Vectors(encoder, batch=batch).of(paths) for batch in (5, 1))
    assert together.shape == (12, 32) and torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together, Vectors(encoder, pooling="cls").of(paths), atol=1e-2)


def test_cls_of_an_encoder_without_one_is_refused(labels: Labels) -> None:
    siglip = build_encoder(EncoderSpec(config={**VIT, "model_type": "siglip_vision_model"}, layer=1), "siglip")
    with pytest.raises(ValueError, match="'siglip' has no CLS token"):
        Vectors(siglip, pooling="cls").of(pictures(labels.test)[:1])


def test_fewer_pictures_are_taken_evenly_from_classes(labels: Labels) -> None:
    few = taken(labels.training, 7)
    names = [question.answer for question in few.questions]
    assert sorted(names.count(name) for name in COLOURS) == [2, 2, 3]
    assert taken(labels.training, None) is labels.training and taken(labels.training, 99) is labels.training


def test_what_is_held_out_depends_on_a_picture_and_not_on_its_neighbours(labels: Labels) -> None:
    part = Labels(taken(labels.training, 12), labels.test)
    by_path = dict(zip(pictures(labels.training), labels.held_out().tolist(), strict=True))
    assert [by_path[path] for path in pictures(part.training)] == part.held_out().tolist()
    assert 0 < sum(by_path.values()) < len(by_path)


def test_unusable_labels_are_named(folders: Path, labels: Labels, tmp_path: Path) -> None:
    (tmp_path / "violet").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "violet" / "0.png")
    with pytest.raises(DataError, match=r"pictures of \['violet'\]"):
        Labels(labels.training, labelled(tmp_path))
    row = {"conversations": [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    with pytest.raises(DataError, match="row 0 has 0 pictures: one picture with its class as the answer is needed"):
        labelled(tmp_path / "rows.json")


def paired(shift: float, constant: bool = False) -> Compared:
    """Pictures are numbers in their names; teacher "a" has features of scale 100, "b" of scale 1."""

    def compared(paths: Sequence[str]) -> Iterator[Pairs]:
        for start in range(0, len(paths), 5):
            numbers = torch.tensor(
                [sum(map(ord, Path(path).parent.name + Path(path).name)) % 7 for path in paths[start : start + 5]]
            )
            target = torch.zeros(len(numbers), 4, 3) if constant else numbers[:, None, None].expand(-1, 4, 3).double()
            yield {"a": (100 * (target + shift), 100 * target), "b": (target, target)}

    return compared


def test_feature_errors_are_in_units_of_the_means_and_teachers_count_alike(labels: Labels) -> None:
    questions = feature_questions(labels.test, ["a", "b"])
    training = pictures(labels.training)
    perfect = feature_errors(paired(0.0), training, questions)
    assert perfect.figures["feature_error"].mean == 0 and perfect.figures["explained"].mean == 1
    off = feature_errors(paired(1.0), training, questions)
    a, b = (off.categories[name]["feature_error"].mean for name in ("a", "b"))
    assert b == 0 and a > 0
    assert off.main.mean == pytest.approx(a / 2, rel=1e-5)  # though a's features are 100 times larger
    mean = predicting_the_mean(questions)
    assert (mean.main.mean, mean.main.low, mean.main.high) == (1, 1, 1)
    gap = difference(off, mean)
    assert gap.mean == pytest.approx(off.main.mean - 1) and gap.low < gap.mean < gap.high
    card = off.samples[0]
    assert card.details["right"] == (card.details["error"] < card.details["mean"]) and "%" in card.details["verdict"]


def test_an_encoder_that_predicts_the_mean_gains_nothing(labels: Labels) -> None:
    training, questions = pictures(labels.training), feature_questions(labels.test, ["a"])
    means = [target for pairs in paired(0.0)(training) for target in pairs["a"][1]]
    mean = torch.stack(means).mean(0)

    def blind(paths: Sequence[str]) -> Iterator[Pairs]:
        return ({"a": (mean.expand_as(pairs["a"][1]), pairs["a"][1])} for pairs in paired(0.0)(paths))

    assert feature_errors(blind, training, questions).main.mean == pytest.approx(1, rel=1e-5)


def test_a_readout_finds_what_is_linear_in_the_student_and_nothing_else(labels: Labels) -> None:
    mixing = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

    def tokens(paths: Sequence[str]) -> Iterator[Pairs]:
        for start in range(0, len(paths), 5):
            own = [random_of(path, 4, 6) for path in paths[start : start + 5]]
            student = torch.stack(own)
            other = torch.stack([random_of(f"{path} other", 4, 5) for path in paths[start : start + 5]])
            yield {"linear": (student, 100 * (student @ mixing) + 7), "unrelated": (student, other)}

    training, questions = pictures(labels.training), feature_questions(labels.test, ["linear", "unrelated"])
    found = feature_errors(Readout(tokens, training), training, questions, FEATURE_READOUT)
    assert found.categories["linear"]["feature_readout"].mean < 1e-5
    assert (
        0.9 < found.categories["unrelated"]["feature_readout"].mean < 1.2
    )  # the penalty keeps noise from being learned


def test_a_readout_needs_pictures_to_choose_its_penalty_on(labels: Labels) -> None:
    with pytest.raises(ValueError, match="training pictures are held out to choose the readout's penalty"):
        Readout(paired(0.0), pictures(labels.training)[:1])


def random_of(text: str, *shape: int) -> Tensor:
    """A tensor that is a function of a text."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def test_teachers_that_say_nothing_or_are_not_there_are_named(labels: Labels) -> None:
    training = pictures(labels.training)
    with pytest.raises(ValueError, match="features of 'a' are the same on all pictures"):
        feature_errors(paired(0.0, constant=True), training, feature_questions(labels.test, ["a"]))
    with pytest.raises(ValueError, match=r"not compared with \['c'\]"):
        feature_errors(paired(0.0), training, feature_questions(labels.test, ["c"]))
    with pytest.raises(ValueError, match="no training pictures: there is no mean to predict"):
        feature_errors(paired(0.0), [], feature_questions(labels.test, ["a"]))


def test_a_picture_is_seen_once_however_often_it_is_asked_for(labels: Labels) -> None:
    encoder = build_encoder(EncoderSpec(config=VIT, layer=1), "tiny", seed=1)
    seen: list[int] = []
    vectors = Vectors(encoder, progress=lambda done, of: seen.append(of))
    paths = pictures(labels.test)
    first = vectors.of(paths[:3])
    again = vectors.of([paths[2], paths[0], paths[2]])
    assert seen == [3] and torch.equal(again, first[[2, 0, 2]])
