"""A finished student in the forms that other programs load, each proven to say what the student says.

`export` writes one directory: `hf` (hugging_face.py, card.py), `gguf/` for llama.cpp, `onnx/` for onnxruntime. What a
format has no place for is refused first (possible.py). Then the files are asked the same questions as the student
(ours.py, parity.py), by the program they are for, and `parity.json` beside them says what came out.
"""

from .exporting import Exported, export
from .parity import Parity
from .possible import FORMATS, require_possible

__all__ = ["FORMATS", "Exported", "Parity", "export", "require_possible"]
