"""Inner adaptors: a frozen language model that sees, grounds, and still speaks exactly as before (IAA).

`Host.attach(model)` hooks an unmodified Hugging Face decoder, alone or inside a Llava, `host.add` gives it an adaptor,
and `with host.use(workflow)` says whose layers, tables and norms run: "text" is the model as it came, bit for bit.

A word on names: an *adaptor* is decoder layers inserted behind chosen layers of the *host*, with an embedding, a final
norm, an output head and a projector of its own; a *workflow* is "text" or an adaptor's name.
"""

from . import files
from .adaptor import Adaptor
from .config import TEXT, AdaptorConfig
from .host import Host
from .positions import resolve

__all__ = ["TEXT", "Adaptor", "AdaptorConfig", "Host", "files", "resolve"]
