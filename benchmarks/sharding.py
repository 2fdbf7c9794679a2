"""Processes that share a student (machine.parallel: fsdp, deepspeed): losses, memory, and checkpoints of other numbers.

    python benchmarks/sharding.py             # 1, 2 and 4 processes over gloo, on a CPU: results/sharding.csv
    python benchmarks/sharding.py --simulate  # 8 to 1,024 GPUs: results/sharding_simulated.csv, and their plot

Each row of the first is a run of the same recipe: a student and a teacher with random weights on easy-VQA, all loss
terms, everything of the language model trains. Against the run of one process: the largest difference of a loss or
gradient norm, as a share. Of the process that holds most: bytes of weights, gradients and moments that train (`held`),
and the resident set's peak after the first update above that before the student was built (`peak`). "2 → 4" was killed
behind a checkpoint of two processes and continued by four. DeepSpeed's ZeRO, stage 1, is run where it is installed: its
`held` is without gradients, which are gone behind an update, and as large as the student before.

The model behind the second stands in docs/scale-out.md. Needs `pip install 'distilvlm[quickstart,benchmarks]'`.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import measuring
import torch
import yaml

import distilvlm
from distilvlm.quickstart import questions
from distilvlm.runs.events import read_events
from distilvlm.train.parallel import Replicated, Sharded
from distilvlm.train.rows import local
from distilvlm.train.zero import Zero

FIELDS = [
    "date",
    "machine",
    "torch",
    "width",
    "layers",
    "processes",
    "parallel",
    "difference",
    "held_mib",
    "peak_mib",
    "seconds",
]
UPDATES, SAVED = 6, 2

VISION = {
    "model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "projection_dim": 64,
}  # fmt: skip


def language(width: int, layers: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers,
        "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }  # fmt: skip


def write_recipe(directory: Path, width: int, layers: int) -> Path:
    data = directory / "data"
    questions.write(data)
    source = {"path": str(data / "conversations.json"), "images": str(data)}
    model = {"vision": {"config": VISION}}
    recipe = {
        "name": "sharding",
        "student": {**model, "language": {"config": language(width, layers), "tokenizer": str(data / "tokenizer")}},
        "teacher": {**model, "language": {"config": language(320, 6), "tokenizer": str(data / "tokenizer")}},
        "data": {"questions": source},
        "stages": [
            {
                "name": "sft",
                "train": ["projector", "language"],
                "data": ["questions"],
                "loss": {"text": 1.0, "response": 1.0, "visual": 1.0, "relation": 0.5},
                # Adam divides by the gradient's size: without a floor, rounding decides where it is almost 0.
                "optim": {"lr": 1e-3, "eps": 1e-3, "batch": 4, "updates": UPDATES, "clip": 1.0},
            }
        ],
        "machine": {"micro_batch": 1, "checkpoint_every": SAVED},
    }
    file = directory / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def child(recipe: Path, run: Path, die: int, settings: Sequence[str]) -> None:
    """What each process runs: the recipe, until an update or its end; notes what it held."""
    torch.set_num_threads(1)
    distilvlm.runs.expense.estimate = lambda *_, **__: []
    start, held, steps = resident("VmRSS"), 0, 0

    def watching(step: Callable[[Any, torch.optim.Optimizer], None]) -> Callable[[Any, torch.optim.Optimizer], None]:
        def watched(sharing: Any, optimizer: torch.optim.Optimizer) -> None:
            nonlocal held, steps
            steps += 1
            if steps == die:
                os.kill(os.getpid(), signal.SIGKILL)
            step(sharing, optimizer)
            if steps == 1:
                Path("/proc/self/clear_refs").write_text("5")  # the peak is that of the updates behind this one
                tensors = [t for p, state in optimizer.state.items() for t in (p, p.grad, *state.values())]
                held = sum(local(t).numel() * t.element_size() for t in tensors if t is not None)
                if isinstance(sharing, Zero):  # beside its part of all, the weights; gradients are gone by now
                    held += sum(rows.numel() * rows.element_size() for rows in sharing.held.values())
            if steps == UPDATES - 1:
                rank = os.environ.get("RANK", "0")
                (run.parent / f"{run.name}.{rank}").write_text(f"{held} {resident('VmHWM') - start}")

        return watched

    for kind in (Replicated, Sharded, Zero):
        kind.step = watching(kind.step)
    distilvlm.run(recipe, list(settings), directory=run)


def resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(field)).split()[1])


def launch(recipe: Path, run: Path, processes: int, parallel: str, die: int = 0) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = [f"machine.parallel={parallel}"]
    if parallel == "deepspeed":
        file = run.with_suffix(".json")
        file.write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000}}))
        settings.append(f"machine.deepspeed={file}")
    command = [sys.executable, __file__, "--child", str(recipe), str(run), str(die), *settings]
    together = []
    for rank in range(processes):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        where |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        together.append(subprocess.Popen(command, env=os.environ | (where if processes > 1 else {})))
    statuses = [one.wait() for one in together]
    if any(statuses) != bool(die):
        raise SystemExit(f"{processes} processes ended with {statuses}")


def figures(run: Path, one: Path) -> dict[str, object]:
    """What a run's row says of it, beside the run of one process."""
    told = [event for event in read_events(run / "events.jsonl") if event["event"] == "update"]
    expected = [event for event in read_events(one / "events.jsonl") if event["event"] == "update"]
    pairs = [
        (event[name], other[name])
        for event, other in zip(told, expected, strict=True)
        for name in ("loss", "gradient_norm")
    ]
    noted = [file.read_text().split() for file in run.parent.glob(f"{run.name}.[0-9]*")]
    held, peak = (max(int(words[i]) for words in noted) / 2**20 if noted else None for i in (0, 1))
    return {
        "difference": f"{max(abs(a - b) / abs(b) for a, b in pairs):.1e}",
        "held_mib": "" if held is None else round(held),
        "peak_mib": "" if peak is None else round(peak),
        "seconds": round(sorted(event["seconds"] for event in told[1:])[len(told[1:]) // 2], 3),
    }


def measured(width: int, layers: int, continued: bool) -> Iterator[dict[str, object]]:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        recipe, one = write_recipe(directory, width, layers), directory / "one"
        launch(recipe, one, 1, "ddp")
        yield {"processes": 1, "parallel": "-", **figures(one, one)}
        ways = [(2, "ddp"), (2, "fsdp"), (4, "fsdp")]
        if find_spec("deepspeed") is not None:
            ways += [(2, "deepspeed"), (4, "deepspeed")]
        for processes, parallel in ways:
            run = directory / f"{parallel}{processes}"
            launch(recipe, run, processes, parallel)
            yield {"processes": processes, "parallel": parallel, **figures(run, one)}
        if not continued:
            return
        launch(recipe, directory / "killed", 2, "fsdp", die=SAVED + 2)
        for processes in (1, 2, 4):
            run = directory / f"continued{processes}"
            shutil.copytree(directory / "killed", run)
            launch(recipe, run, processes, "fsdp")
            found = figures(run, one)
            yield {"processes": f"2 → {processes}", "parallel": "fsdp", **found}


@dataclass(frozen=True)
class Cluster:
    """Nodes of 8 GPUs; bytes per second and direction of one GPU, as published, and seconds per step of a ring."""

    inside: float = 450e9  # NVLink of an H200: 900 GB/s in both directions (NVIDIA H200 datasheet)
    between: float = 50e9  # one 400 Gb/s port of InfiniBand NDR per GPU (NVIDIA DGX H200 datasheet)
    share: float = 0.8  # of these that a collective call reaches: assumed
    latency: float = 5e-6  # assumed

    def ring(self, gpus: int, size: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes; an all-reduce is one of each."""
        bandwidth = self.share * (self.inside if gpus <= 8 else self.between)
        return (gpus - 1) * (size / gpus / bandwidth + self.latency)


@dataclass(frozen=True)
class Step:
    """A measured update of one GPU (results/step_gpu.csv), and what of its models goes over the network."""

    student: float  # seconds of student and losses
    teacher: float  # of the teacher, which runs before
    layers: int = 24
    layer: float = 14.9e6  # parameters of a layer of Qwen2.5-0.5B
    root: float = 136e6  # and of its embedding, which is its head
    teacher_layers: int = 37
    teacher_layer: float = 46.8e6  # of Qwen2.5-1.5B

    def ddp(self, cluster: Cluster, gpus: int) -> float:
        """Gradients in fp32 are summed while the backward pass, two thirds of the student's time, goes on."""
        summed = 2 * cluster.ring(gpus, 4 * (self.layers * self.layer + self.root))
        return self.teacher + self.student / 3 + max(self.student * 2 / 3, summed)

    def fsdp(self, cluster: Cluster, gpus: int, split_teacher: bool = False) -> float:
        """Layers are gathered in bf16 forward and back, their gradients split in fp32 beside the computation; what
        belongs to the task itself is gathered before and split behind it, and a teacher's layers as they are needed."""
        gathered = self.layers * cluster.ring(gpus, 2 * self.layer)
        divided = self.layers * cluster.ring(gpus, 4 * self.layer)
        apart = 2 * cluster.ring(gpus, 4 * self.root)
        theirs = self.teacher_layers * cluster.ring(gpus, 2 * self.teacher_layer) if split_teacher else 0.0
        run = max(self.student / 3, gathered) + max(self.student * 2 / 3, gathered + divided)
        return self.teacher + theirs + apart + run


def simulated() -> list[dict[str, object]]:
    with (Path(__file__).parent / "results" / "step_gpu.csv").open(newline="") as file:
        seconds = {row["what"]: float(row["seconds"]) for row in csv.DictReader(file)}
    local_step = Step(seconds["cached"], seconds["local"] - seconds["cached"])
    cached_step = Step(seconds["cached"], 0.0)
    cluster = Cluster()
    rows: list[dict[str, object]] = []
    for gpus in (8, 16, 32, 64, 128, 256, 512, 1024):
        times = {
            "ddp, whole teacher": local_step.ddp(cluster, gpus),
            "fsdp, whole teacher": local_step.fsdp(cluster, gpus),
            "fsdp, split teacher": local_step.fsdp(cluster, gpus, split_teacher=True),
            "fsdp, teacher elsewhere": cached_step.fsdp(cluster, gpus),
        }
        rows += [{"gpus": gpus, "how": how, "seconds": round(time, 4)} for how, time in times.items()]
    return rows


def draw(rows: Sequence[dict[str, Any]], file: Path) -> None:
    from matplotlib import pyplot  # the measurements above do without

    pyplot.switch_backend("svg")
    pyplot.rcParams["svg.hashsalt"] = "distilvlm"  # else ids differ from time to time
    figure, axis = pyplot.subplots(figsize=(6.2, 3.4), layout="constrained")
    for how, colour in zip(
        dict.fromkeys(row["how"] for row in rows), ("#2563a8", "#c2571a", "#7a3e9d", "#3a8f4d"), strict=True
    ):
        own = [row for row in rows if row["how"] == how]
        axis.plot([row["gpus"] for row in own], [row["seconds"] for row in own], "o-", color=colour, label=how)
    axis.set_xscale("log", base=2)
    axis.set_xticks([row["gpus"] for row in rows if row["how"] == rows[0]["how"]])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("GPUs, 8 samples each (simulated)")
    axis.set_ylabel("seconds per update")
    axis.grid(True, alpha=0.3)
    axis.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        recipe, run, die, *settings = sys.argv[2:]
        return child(Path(recipe), Path(run), int(die), settings)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true", help="many GPUs, from measured computation")
    parser.add_argument("--width", type=int, default=256, help="of the student's language model")
    parser.add_argument("--layers", type=int, default=6, help="of the student's language model")
    parser.add_argument("--whole", action="store_true", help="no run is killed and continued")
    measuring.arguments(parser, "sharding.csv")
    options = parser.parse_args()
    if options.simulate:
        rows = simulated()
        options.output = options.results.with_name("sharding_simulated.csv")
        measuring.write(options, ["gpus", "how", "seconds"], rows)
        draw(rows, Path(__file__).parents[1] / "docs" / "scale-out-simulated.svg")
        return None
    common = measuring.prepare(options)
    rows = []
    for row in measured(options.width, options.layers, not options.whole):
        print(row, flush=True)
        row |= {"width": options.width, "layers": options.layers}
        rows.append({**{name: common[name] for name in FIELDS if name in common}, **row})
    return measuring.write(options, FIELDS, rows)


if __name__ == "__main__":
    main()
