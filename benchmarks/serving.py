"""Tokens per second and time to the first token of `distilvlm serve`, against `transformers serve`, and memory.

    python benchmarks/serving.py MODEL [--gguf EXPORT] [--adaptors NAME=PATH NAME=PATH]

MODEL is a student, or a language model alone: `transformers serve` batches continuously for the latter only
(`--continuous-batching`), which is then a third contender. EXPORT is what `distilvlm export MODEL EXPORT --to gguf`
made: each of its files is a contender, served by llama.cpp (`--llama-server`: the program) with a slot for every
client. Servers run one after the other, each in a process of its own with all threads, and are asked over HTTP by 1,
4 and 16 clients at a time. A client asks one question after the other, greedily and as a stream; a round is as many
questions as it has clients, times `--questions`, after one that warms up. All contenders are asked the same, every
second question with a picture where the model sees. Tokens are counted in the texts that came back, by the model's
tokenizer.

"memory": one server with a base and its adaptors against three (the base, and with each adaptor), all alive at once and
asked once: sums of their proportional set sizes, so that pages that processes share count once.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import measuring
import numpy as np
from PIL import Image
from transformers import AutoTokenizer

FIELDS = [
    "date", "machine", "torch", "transformers", "threads", "clock", "model", "dtype", "measure", "server", "clients",
    "questions", "new", "tokens", "seconds", "tokens_per_second", "ratio", "first_median", "first_worst", "mib",
]  # fmt: skip
THINGS = ["a river", "two cats", "the moon", "an old clock", "bread", "a long train", "rain", "the first day of school"]
CONTEXT = 1024
"""Positions that llama.cpp holds for each client: it takes the memory when it begins."""
WARM_UP = 2
"""Tokens that each client asks for before it is timed."""


@contextlib.contextmanager
def serving(command: Sequence[str], options: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Address and process number of a server, from when it answers to the end of the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    called = [*command, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        called, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    # What a server says is read all the time: a full pipe would stop it.
    said: list[str] = []
    assert process.stderr is not None
    threading.Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + options.patience
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"{' '.join(called)} does not answer:\n{''.join(said[-20:])}")
            with contextlib.suppress(OSError):
                fetched(address, "/health")
                break
            time.sleep(0.2)
        yield address, process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def question(number: int, options: argparse.Namespace, new: int) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "text", "text": f"Tell me a long story about {THINGS[number % 8]}."}]
    if options.sees and number % 2:
        noise = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).resize((320, 240)).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": content if len(content) > 1 else content[0]["text"]}]
    return {"messages": messages, "max_tokens": new, "temperature": 0.0, "stream": True}


def post(address: str, body: dict[str, Any]) -> Any:
    """The reply to a question, as a stream of lines. Raises HTTPError with what the server says."""
    data, kind = json.dumps(body).encode(), {"Content-Type": "application/json"}
    try:
        return urllib.request.urlopen(urllib.request.Request(f"{address}/v1/chat/completions", data, kind))
    except urllib.error.HTTPError as error:
        error.msg += f": {error.read().decode()[:500]}"
        raise


def fetched(address: str, path: str) -> Any:
    with urllib.request.urlopen(f"{address}{path}") as reply:
        return json.load(reply)


def answered(address: str, body: dict[str, Any]) -> tuple[str, float]:
    """The text, and seconds to its first part."""
    start, first, text = time.perf_counter(), None, ""
    with post(address, body) as reply:
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            for choice in json.loads(line[6:]).get("choices", []):
                if part := choice["delta"].get("content"):
                    first = first or time.perf_counter() - start
                    text += part
    return text, first or time.perf_counter() - start


def asked(address: str, name: str, clients: int, options: argparse.Namespace) -> tuple[float, list[tuple[str, float]]]:
    """Seconds of a round, and each of its answers."""

    def talk(client: int, questions: int, new: int) -> list[tuple[str, float]]:
        bodies = [question(client + clients * n, options, new) | {"model": name} for n in range(questions)]
        return [answered(address, body) for body in bodies]

    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(lambda client: talk(client, 1, WARM_UP), range(clients)))
        start = time.perf_counter()
        answers = list(threads.map(lambda client: talk(client, options.questions, options.new), range(clients)))
        return time.perf_counter() - start, [one for each in answers for one in each]


def speed(options: argparse.Namespace) -> list[dict[str, object]]:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    dtype = {"fp32": "float32", "bf16": "bfloat16"}[options.dtype]
    theirs = ["transformers", "serve", options.model, "--device", options.device, "--dtype", dtype]
    theirs = [str(Path(sys.executable).parent / theirs[0]), *theirs[1:]]
    commands = {"distilvlm": ours(options.model, options), "transformers": theirs}
    if not options.sees:
        commands["transformers, continuous batching"] = [*theirs, "--continuous-batching"]
    for file in sorted(Path(options.gguf).glob("model-*.gguf")) if options.gguf else []:
        commands[f"llama.cpp, {file.stem.removeprefix('model-')}"] = llama_cpp(file, options)
    found: list[dict[str, object]] = []
    for server, command in commands.items():
        if server.split(",")[0] not in options.servers:
            continue
        with serving(command, options) as (address, _):
            name = options.model
            if server == "distilvlm":
                name = fetched(address, "/v1/models")["data"][0]["id"]
            for clients in options.clients:
                seconds, answers = asked(address, name, clients, options)
                tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text, _ in answers)
                first = sorted(seconds for _, seconds in answers)
                row: dict[str, object] = {"measure": "speed", "server": server, "clients": clients}
                row |= {"questions": options.questions * clients, "new": options.new, "tokens": tokens}
                row |= {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 2)}
                row |= {"first_median": round(statistics.median(first), 4), "first_worst": round(first[-1], 4)}
                found.append(row)
                print(row, flush=True)
    own = {row["clients"]: float(str(row["tokens_per_second"])) for row in found if row["server"] == "distilvlm"}
    for row in found:
        if row["clients"] in own:
            row["ratio"] = round(own[row["clients"]] / float(str(row["tokens_per_second"])), 2)
    return found


def memory(options: argparse.Namespace) -> list[dict[str, object]]:
    """One server with all adaptors, and a server for each workflow."""
    each = [ours(options.model, options), *(ours(options.model, options, [pair]) for pair in options.adaptors)]
    found: list[dict[str, object]] = []
    for what, commands in (
        ("one base, all workflows", [ours(options.model, options, options.adaptors)]),
        (f"{len(each)} servers, a workflow each", each),
    ):
        with contextlib.ExitStack() as running:
            servers = [running.enter_context(serving(command, options)) for command in commands]
            for address, _ in servers:
                for model in fetched(address, "/v1/models")["data"]:
                    body = question(1, options, 4) | {"model": model["id"], "stream": False}
                    post(address, body).read()
            held = sum(proportional_mib(process) for _, process in servers)
        found.append({"measure": "memory", "server": what, "mib": round(held)})
        print(found[-1], flush=True)
    found[1]["ratio"] = round(float(str(found[1]["mib"])) / float(str(found[0]["mib"])), 2)
    return found


def ours(model: str, options: argparse.Namespace, adaptors: Sequence[str] = ()) -> list[str]:
    added = [part for pair in adaptors for part in ("--adaptor", pair)]
    given = ["serve", model, *added, "--precision", options.dtype, "--device", options.device]
    return [sys.executable, "-m", "distilvlm", *given]


def llama_cpp(file: Path, options: argparse.Namespace) -> list[str]:
    """llama-server on an exported model; what it keeps of earlier questions is off, as it is with the others."""
    seeing = file.parent / "mmproj-f16.gguf"
    context = CONTEXT * max(options.clients)
    command = [options.llama_server, "-m", str(file), "--parallel", str(max(options.clients)), "-c", str(context)]
    command += ["--threads", str(options.threads), "--no-cache-prompt", "--device", "none"]
    return [*command, "--mmproj", str(seeing)] if seeing.exists() else command


def proportional_mib(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory of a student, or of a language model")
    parser.add_argument("--adaptors", nargs="*", default=[], metavar="NAME=PATH", help="of the model, for 'memory'")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--questions", type=int, default=3, help="of each client")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer, at most")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--gguf", metavar="EXPORT", help="directory of model-*.gguf and mmproj-f16.gguf, made of MODEL")
    parser.add_argument("--llama-server", default="llama-server", help="llama.cpp's program")
    parser.add_argument("--servers", nargs="*", default=["distilvlm", "transformers", "llama.cpp"])
    parser.add_argument("--patience", type=float, default=180, help="seconds for a server to be there")
    measuring.arguments(parser, "serving.csv")
    options = parser.parse_args()
    common = measuring.prepare(options) | {"model": Path(options.model).name, "dtype": options.dtype, "clock": "wall"}
    settings = json.loads((Path(options.model) / "config.json").read_text())
    options.sees = "vision_config" in settings
    rows = speed(options) if options.servers else []
    if options.adaptors:
        rows += memory(options)
    measuring.write(options, FIELDS, [{**common, **row} for row in rows])


if __name__ == "__main__":
    main()
