"""A frozen language model with adaptors, one of which, or none, or one for each row, is active."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from . import adaptor as making
from .adaptor import Adaptor
from .anatomy import Anatomy, anatomy, weight_of
from .config import TEXT, AdaptorConfig
from .flow import Entry, Insertion, Passing, Replacement, Sight
from .precision import FullPrecision
from .slots import Workflow

log = logging.getLogger(__name__)

_ATTRIBUTE = "_adaptor_host"
_BASE = "base"


class Host:
    """Adaptors beside a model, and which of them are active.

    The model keeps its class, its weights and their names; adaptors live in `adaptors`, a tree of their own, which must
    be moved (`host.adaptors.to(...)`) and put into training mode along with it. A deep copy of the model has a host and
    adaptors of its own.

    In training use `set`, in everything else `use`. Only one thread at a time may be inside `use`; others that run the
    model meanwhile (a streamer's) run in its workflow.
    """

    def __init__(self, model: PreTrainedModel, parts: Mapping[str, str] | None = None) -> None:
        self.model = model
        self.base: Anatomy = anatomy(model, parts)
        self.adaptors = nn.ModuleDict()
        self.passing = Passing()
        self._active: str | tuple[str, ...] = TEXT
        self._users: list[int] = []  # threads inside `use`, innermost last
        self._rows: dict[tuple[object, ...], list[tuple[Adaptor, Tensor | None]]] = {}
        self._handles: list[RemovableHandle] = []
        self._insertions: dict[int, RemovableHandle] = {}

    @classmethod
    def attach(cls, model: PreTrainedModel, parts: Mapping[str, str] | None = None) -> Host:
        """The host of a causal language model or a Llava: the one that it has, or a new one.

        Args:
            parts: 'decoder', 'layers' or 'norm' -> name in the model, where it calls them otherwise than others do.

        Raises:
            ValueError: a part is not found.
        """
        if (host := cls.of(model)) is None:
            host = cls(model, parts)
            host._hook()
            setattr(model, _ATTRIBUTE, host)
        return host

    @staticmethod
    def of(model: nn.Module) -> Host | None:
        """The host of a model; None if it was never attached."""
        return getattr(model, _ATTRIBUTE, None)

    def detach(self) -> None:
        """Take all hooks away: the model is as it was. The adaptors stay in this object."""
        for handle in [*self._handles, *self._insertions.values()]:
            handle.remove()
        self._handles.clear()
        self._insertions.clear()
        if Host.of(self.model) is self:
            delattr(self.model, _ATTRIBUTE)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adaptors, in the order in which they were added."""
        return tuple(self.adaptors)

    def __getitem__(self, name: str) -> Adaptor:
        if name not in self.adaptors:
            raise ValueError(f"there is no adaptor '{name}': there is {', '.join(self.names) or 'none'}")
        found = self.adaptors[name]
        assert isinstance(found, Adaptor)
        return found

    def add(
        self,
        name: str,
        config: AdaptorConfig,
        start: str = _BASE,
        full_precision: Mapping[str, Tensor] | str | Path | None = None,
    ) -> Adaptor:
        """Give the model an adaptor. From here on nothing of the model itself trains.

        Args:
            start: 'base', whose layers, tables, norm and projector it copies, or the adaptor that it is a copy of.
            full_precision: of a quantised base: its weights from before, a directory of safetensors or a state dict.

        Raises:
            ValueError: a name that is taken or none; a form that does not fit the host or the adaptor to start from; a
                quantised base without `full_precision`.
        """
        self._require_free(name)
        if start == _BASE:
            source = None if full_precision is None else FullPrecision(full_precision)
            made = making.from_base(self.base, config, source)
        else:
            made = making.from_other(self.base, self[start], config)
        return self.put(name, made)

    def put(self, name: str, adaptor: Adaptor) -> Adaptor:
        """Take in an adaptor that was made for this host (adaptor.py, files.py)."""
        self._require_free(name)
        self.model.requires_grad_(False)
        taken = sorted((a.slot, a.slot + len(a.layers)) for a in map(self.__getitem__, self.names))
        slot = self.base.depth + 1  # behind the host's layers and the ledger (slots.py)
        for first, end in taken:
            if slot + len(adaptor.layers) <= first:
                break
            slot = end
        adaptor.place(slot)
        self.adaptors[name] = adaptor
        self._rows.clear()
        for position in adaptor.config.positions:
            if position not in self._insertions:
                hook = Insertion(self, position)
                # Before hooks that record hidden states: they see what the next layer reads.
                self._insertions[position] = self.base.layers[position].register_forward_hook(
                    hook, with_kwargs=True, prepend=True
                )
        log.info(
            "adaptor '%s': structure %s, %d layers behind %s, %s parameters; the model itself is frozen",
            name,
            adaptor.config.structure,
            len(adaptor.layers),
            list(adaptor.config.positions),
            f"{sum(p.numel() for p in adaptor.parameters()):,}",
        )
        return adaptor

    def remove(self, name: str) -> None:
        """Unload an adaptor. Raises ValueError while it is active."""
        self[name]
        if name in self._names():
            raise ValueError(f"adaptor '{name}' is active: set another workflow before it is removed")
        del self.adaptors[name]
        self._rows.clear()
        used = {position for other in self.names for position in self[other].config.positions}
        for position in set(self._insertions) - used:
            self._insertions.pop(position).remove()

    def bytes(self, name: str) -> int:
        """What a workflow's own weights take: an adaptor's, or for "text" the whole model's."""
        tree = self.model if name == TEXT else self[name]
        # A quantised model's weights are buffers, and a tied table stands there twice.
        state = [value for value in tree.state_dict(keep_vars=True).values() if isinstance(value, Tensor)]
        return sum(value.numel() * value.element_size() for value in {id(value): value for value in state}.values())

    @property
    def active(self) -> str | tuple[str, ...]:
        """The workflow of all rows, or that of each row."""
        return self._active

    @property
    def workflows(self) -> tuple[Workflow, ...]:
        """What a cache remembers of the active ones: one entry, or one for each row."""
        return tuple((name, 0 if name == TEXT else self[name].serial) for name in self._names())

    def set(self, workflow: str | Sequence[str]) -> None:
        """Make a workflow the active one until another is: "text", an adaptor's name, or one of these for each row.

        Raises:
            ValueError: there is no such adaptor.
        """
        names = (workflow,) if isinstance(workflow, str) else tuple(workflow)
        if not names:
            raise ValueError("no workflow is given: name one, or one for each row of the batch")
        for name in set(names) - {TEXT}:
            self[name]
        self._active = names[0] if len(set(names)) == 1 else names

    @contextmanager
    def use(self, workflow: str | Sequence[str]) -> Iterator[Host]:
        """Inside, a workflow is active; after it, whichever was before. Arguments and errors as `set`.

        Raises:
            RuntimeError: another thread is inside: one model runs in one workflow, or in one for each row, at a time.
        """
        thread = threading.get_ident()
        if self._users and self._users[-1] != thread:
            raise RuntimeError(
                f"another thread uses this model in workflow {self._active}: put both threads' rows into one batch "
                "with a workflow for each row, or let one wait"
            )
        before = self._active
        self.set(workflow)
        self._users.append(thread)
        try:
            yield self
        finally:
            self._users.pop()
            self._active = before

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows of a batch with a workflow for each: to be said when rows leave it and its cache
        (`cache.batch_select_indices`). With one workflow for all rows there is nothing to say."""
        if not isinstance(self._active, str):
            self.set([self._active[row] for row in rows])

    def embedding(self) -> nn.Module:
        """The input embedding of the one active workflow."""
        return self._part("embed_tokens", self.base.embed_tokens)

    def head_weight(self) -> Tensor:
        """The output head's weight of the one active workflow, [V, d]."""
        return weight_of(self._part("lm_head", self.base.lm_head))

    def projector(self) -> nn.Module:
        """The projector of the one active workflow. Raises ValueError where the model has none."""
        if self.base.projector is None:
            raise ValueError("this host is a language model: it has no projector")
        return self._part("projector", self.base.projector)

    def resize_token_embeddings(self, rows: int) -> None:
        """`model.resize_token_embeddings`, the adaptors' own tables included: added rows begin as the base's do."""
        active, before = self._active, self.base.vocabulary
        self.model.resize_token_embeddings(rows)
        self.model.requires_grad_(False)
        hooked = list(self._insertions)
        self.detach()
        self.base = anatomy(self.model)
        setattr(self.model, _ATTRIBUTE, self)
        self._hook()
        for position in hooked:
            hook = Insertion(self, position)
            self._insertions[position] = self.base.layers[position].register_forward_hook(
                hook, with_kwargs=True, prepend=True
            )
        for name in self.names:
            _resize(self[name], self.base, before)
        self._active = active

    def shares(self, batch: int, device: torch.device) -> list[tuple[Adaptor, Tensor | None]]:
        """Active adaptors, each with the rows of a batch that are its own; None: all.

        Raises:
            ValueError: another number of rows than workflows were given for.
        """
        if isinstance(self._active, str):
            return [] if self._active == TEXT else [(self[self._active], None)]
        if batch != len(self._active):
            raise ValueError(
                f"workflows are given for {len(self._active)} rows, the batch has {batch}: beams, several answers to a "
                "row and flattened rows need one workflow for the whole batch"
            )
        key = (self._active, device)
        if key not in self._rows:
            self._rows.clear()  # of the last batch
            self._rows[key] = [
                (self[name], torch.tensor([r for r, n in enumerate(self._active) if n == name], device=device))
                for name in dict.fromkeys(self._active)
                if name != TEXT
            ]
        return self._rows[key]

    def require_same_tables(self) -> None:
        """Raises ValueError where the model's tables are not those that adaptors were made for."""
        tables = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        if tables != (self.base.embed_tokens, self.base.lm_head) or self.base.vocabulary != self._vocabulary:
            raise ValueError(
                "the model's embedding or head was replaced or resized, and the adaptors' own were not: use "
                "host.resize_token_embeddings"
            )

    def _names(self) -> tuple[str, ...]:
        return (self._active,) if isinstance(self._active, str) else self._active

    def _part(self, part: str, of_base: nn.Module) -> nn.Module:
        if not isinstance(self._active, str):
            raise ValueError(f"several workflows are active, {list(self._active)}: each has its own {part}")
        own = None if self._active == TEXT else getattr(self[self._active], part)
        return of_base if own is None else own

    def _require_free(self, name: str) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name) or name in (TEXT, _BASE) or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"'{name}' cannot be an adaptor's name: use small letters, digits and '-', and no word taken"
            )
        if name in self.adaptors:
            raise ValueError(f"there is an adaptor '{name}' already: remove it, or call this one otherwise")

    def _hook(self) -> None:
        base, handles = self.base, self._handles
        self._vocabulary = base.vocabulary
        handles.append(base.decoder.register_forward_pre_hook(Entry(self), with_kwargs=True))
        tables: dict[str, Any] = {"embed_tokens": base.embed_tokens, "norm": base.norm, "lm_head": base.lm_head}
        if base.projector is not None and base.sees is not None:
            tables["projector"] = base.projector
            handles.append(base.sees.register_forward_pre_hook(Sight(self), with_kwargs=True))
        for part, module in tables.items():
            replacement = Replacement(self, part)
            handles.append(module.register_forward_pre_hook(replacement.before))
            handles.append(module.register_forward_hook(replacement.after, prepend=True))


def _resize(adaptor: Adaptor, base: Anatomy, before: int) -> None:
    with torch.no_grad():
        for part, of_base in (("embed_tokens", base.embed_tokens), ("lm_head", base.lm_head)):
            own: Any = getattr(adaptor, part)
            if own is None or (part == "lm_head" and adaptor.config.tied):
                continue
            grown = weight_of(of_base).to(own.weight.dtype, copy=True)
            kept = min(before, grown.shape[0])
            grown[:kept] = own.weight[:kept]
            own.weight = nn.Parameter(grown, requires_grad=own.weight.requires_grad)
            setattr(own, "num_embeddings" if part == "embed_tokens" else "out_features", grown.shape[0])
        if adaptor.config.tied:
            embedding, head = adaptor.embed_tokens, adaptor.lm_head
            assert isinstance(embedding, nn.Embedding) and isinstance(head, nn.Linear)
            head.weight, head.out_features = embedding.weight, embedding.num_embeddings
