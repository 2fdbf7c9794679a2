"""What a model costs to use: counted where it can be, measured where it must be."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from distilvlm.cost import meter
from distilvlm.cost.serving import Serving, serving, serving_table
from distilvlm.models.upcycling import upcycle


def model(layers: int = 2, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_parameters_and_bytes_are_exact() -> None:
    dense = model().to(torch.bfloat16)
    body = 64 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32  # the tied head is the embedding
    measured = serving(dense, prompt=4, new=2)
    assert measured.parameters == measured.active_parameters == body
    assert measured.weight_bytes == 2 * body
    # Two of four experts serve a token; the shared expert of zeros serves none, but takes bytes.
    sparse = serving(upcycle(model(), layers=[0]), prompt=4, new=2)
    feed_forward, router, biases = 3 * 32 * 64, 4 * 32, 2 * 3 * 32
    assert sparse.parameters == body + 3 * feed_forward + router + biases
    assert sparse.active_parameters == body + feed_forward + router + biases
    assert sparse.weight_bytes > 4 * sparse.parameters


def test_speed_is_tokens_over_the_time_that_each_part_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves by the number of tokens read, or by two for a token that is written."""
    ticks = [0.0]
    dense = model()
    original = dense.forward

    def forward(input_ids, **options):
        ticks[0] += input_ids.shape[1] if input_ids.shape[1] > 1 else 2
        return original(input_ids=input_ids, **options)

    dense.forward = forward
    monkeypatch.setattr("distilvlm.cost.serving.time.perf_counter", lambda: ticks[0])
    measured = serving(dense, prompt=7, new=5)
    assert (measured.prefill, measured.decoding) == (1.0, 0.5)


def test_what_is_written_is_the_likeliest_token(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, seen = model(), []
    original = dense.forward

    def forward(input_ids, **options):
        seen.append(input_ids)
        return original(input_ids=input_ids, **options)

    dense.forward = forward
    serving(dense, prompt=5, new=3)
    prompt, *written = seen[-4:]
    told = dense.generate(prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.cat(written, dim=1).tolist() == told[:, 5:].tolist()


@pytest.mark.skipif(not meter.CLEAR.exists(), reason="only Linux records the highest resident set")
def test_memory_counts_weights_and_what_running_adds() -> None:
    small, long = serving(model(), prompt=8, new=1), serving(model(), prompt=4096, new=1)
    assert small.peak_memory_bytes is not None and long.peak_memory_bytes is not None
    assert small.peak_memory_bytes >= small.weight_bytes
    assert long.peak_memory_bytes > small.peak_memory_bytes + 2 * 4096 * 32 * 4


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which files are mapped")
def test_weights_leave_the_file_that_they_were_mapped_from(tmp_path: Path) -> None:
    """Or the file would count as far as it was read, and stay in memory as long as the model."""
    model().save_pretrained(tmp_path)

    def mapped() -> bool:
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert mapped()
    serving(loaded, prompt=2, new=1)
    assert not mapped()
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()


def test_the_table_names_every_model_and_what_is_not_known() -> None:
    out = io.StringIO()
    one = Serving(1_234_567_890, 987_654, 6_000_000, 1234.5, 56.78, None)
    Console(file=out, width=80).print(serving_table({"dense": one}, "a machine"))
    text = out.getvalue()
    assert all(part in text for part in ("dense", "1,234.6 M", "987,654", "6 MB", "1,234", "56.8", "–", "a machine"))
