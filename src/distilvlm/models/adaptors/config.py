"""What an adaptor is, beside its weights: plain data, as it stands in `adaptor_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

TEXT = "text"
"""The workflow of the host alone."""


@dataclass(frozen=True, kw_only=True)
class AdaptorConfig:
    """The form of an adaptor (specification §1.1 to §1.4). With frozen layers F, inserted layers I and gates G:

    * structure "c", the final one: y = I(F(x)), no gate. A fresh one is not the identity: it runs its layers twice.
    * "b": h = F(x), y = h + G(I(h)).
    * "a", after ControlNet: y = F(x) + G(I(c)), where c is x at the first inserted layer and from there on what the
      inserted layer before gave.

    Gates are zero at first: "linear" is a d × d layer with bias, "scalar" one number. The method's sources say neither.

    Args:
        positions: of the host's layers behind which one is inserted, from 0, ascending.
        tied: own embedding and own head are one table; None: as the host's are.
        projector: an own one, from vision features to the width of the host.
    """

    positions: tuple[int, ...]
    structure: Literal["a", "b", "c"] = "c"
    gate: Literal["linear", "scalar"] = "linear"
    own_embedding: bool = True
    own_norm: bool = True
    own_head: bool = True
    tied: bool | None = None
    projector: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", tuple(self.positions))
        if not self.positions or min(self.positions) < 0 or list(self.positions) != sorted(set(self.positions)):
            raise ValueError(f"positions are {list(self.positions)}: give every layer once, from 0, in ascending order")
        if self.structure not in ("a", "b", "c"):
            raise ValueError(f"structure is '{self.structure}', not one of a, b and c")
        if self.gate not in ("linear", "scalar"):
            raise ValueError(f"gate is '{self.gate}', neither linear nor scalar")
        if self.tied and not (self.own_embedding and self.own_head):
            raise ValueError("tied is true, but only an own embedding and an own head can be one table")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"positions": list(self.positions)}

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> AdaptorConfig:
        """Raises ValueError for keys that are missing or unknown, which a later version may have written."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(facts) - known):
            raise ValueError(f"an adaptor's configuration has unknown entries {', '.join(unknown)}: update distilvlm")
        if missing := sorted(known - set(facts)):
            raise ValueError(f"an adaptor's configuration lacks {', '.join(missing)}")
        return cls(**facts)
