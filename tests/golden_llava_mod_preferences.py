"""LLaVA-MoD's golden cases of preferences."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from distilvlm.losses import Objective, Outcome
from distilvlm.losses.answers import Answers, Preferences
from distilvlm.losses.preference import preference
from tests.golden_cases import Reading, near, scaled
from tests.golden_llava_kd import TrainerCase
from tests.golden_llava_mod_distillation import GRADIENTS, VALUES, loss_of, probabilities_of

NAMES = {"kto_pair": "kto", "sigmoid": "dpo", "hinge": "hinge", "ipo": "ipo"}
SIDES = ("chosen", "rejected")
MOE = 0.0375 + 0.0425
"""What `full.moe` adds, where no array says it (golden/llava_mod.md)."""


def check_preference(reading: Reading) -> None:
    if "chosen_labels" in reading:
        Pairs(reading).check()
    for name in reading.names:
        found = re.fullmatch(r"(?:hand\.)?(single|batch)(\d+)(_?detached)?\.(\w+?)(_detached)?", name)
        if found is None:
            continue
        prefix = "hand." if name.startswith("hand.") else ""
        whole = slice(None) if found[1] == "batch" else slice(int(found[2]), int(found[2]) + 1)
        chosen, rejected = (reading.input(f"{prefix}{side}_logratio")[whole].clone().requires_grad_() for side in SIDES)
        losses = preference(chosen, rejected, chosen * 0, rejected * 0, detach=bool(found[3] or found[5]))
        slopes = torch.autograd.grad(losses.mean(), (chosen, rejected))
        ours = {"losses": losses, "mean": losses.mean(), "grad_chosen": slopes[0], "grad_rejected": slopes[1]}
        if found[4] in ours:
            reading.near(name, ours[found[4]], VALUES if found[4] in ("losses", "mean") else GRADIENTS)


class Pairs:
    """Pairs of answers, whose log-probabilities come of logits through `Answers`."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.labels = {side: reading.input(f"{side}_labels") for side in SIDES}
        self.logits = {
            who: {side: reading.input(f"{who}_{side}_logits") for side in SIDES} for who in ("policy", "ref")
        }
        self.logps = {who: {side: self._logps(who, side) for side in SIDES} for who in ("policy", "ref")}

    def _logps(self, who: str, side: str) -> Tensor:
        this, logits = TrainerCase.of(self.labels[side], 0, 0, 0), self.logits[who][side]
        rows = this.response_rows
        answers = Answers.of(
            logits.flatten(0, 1)[rows],
            torch.eye(logits.shape[-1]),
            rows,
            rows // this.length,
            rows,
            this.response_targets,
        )
        return answers.log_probabilities(this.samples)

    def check(self) -> None:
        for who in ("policy", "ref"):
            for side in SIDES:
                counts = (self.labels[side][:, 1:] != -100).sum(-1)
                for name, value in (("logps", self.logps[who][side]), ("logps_avg", self.logps[who][side] / counts)):
                    if f"{who}_{side}_{name}" in self.reading:
                        self.reading.near(f"{who}_{side}_{name}", value, VALUES)
        for case in dict.fromkeys(name.rpartition(".")[0] for name in self.reading.names):
            if (setting := re.fullmatch(r"(\w+?)((?:_(?:b|ls|single)[\d.]+)*)", case)) and setting[1] in NAMES:
                facts = dict(re.findall(r"_(b|ls|single)([\d.]+)", setting[2]))
                self._check_losses(case, NAMES[setting[1]], facts)
        kinds = "|".join(NAMES)
        found = [re.match(rf"full\.(moe|nomoe)\.({kinds})(?=\.)", name) for name in self.reading.names]
        for case, model, kind in dict.fromkeys((full[0], full[1], full[2]) for full in found if full):
            self._check_full(case, NAMES[kind], model == "moe")

    def _check_losses(self, case: str, kind: str, facts: dict[str, str]) -> None:
        beta, smoothing = float(facts.get("b", 0.1)), float(facts.get("ls", 0))
        only = slice(int(facts["single"]), int(facts["single"]) + 1) if "single" in facts else slice(None)
        policy = [self.logps["policy"][side][only].clone().requires_grad_() for side in SIDES]
        reference = [self.logps["ref"][side][only] for side in SIDES]
        losses = preference(
            policy[0], policy[1], reference[0], reference[1], kind, beta, label_smoothing=smoothing, detach=False
        )
        slopes = torch.autograd.grad(losses.mean(), policy)
        out, gradients = self._objective(kind, beta, smoothing, only)
        values = {"losses": losses, "mean": losses.mean()}
        for side, ours, theirs in zip(SIDES, policy, reference, strict=True):
            values[f"{side}_rewards"] = beta * (ours - theirs)
            name = f"{case}.{side}_rewards"
            if name in self.reading:
                mean = self.reading.input(name).double().mean()
                near(out.terms[f"{side}_reward"], mean, scaled(VALUES, mean), f"mean of {name}")
        for name, value in values.items():
            if f"{case}.{name}" in self.reading:
                self.reading.near(f"{case}.{name}", value, VALUES)
        if f"{case}.mean" in self.reading:
            self.reading.near(f"{case}.mean", out.loss, VALUES)
        for side, slope, gradient in zip(SIDES, slopes, gradients, strict=True):
            name = f"{case}.grad_policy_{side}_logps"
            if name in self.reading:
                self.reading.near(name, slope, GRADIENTS)
                pulled = self._pulled(side, only, self.reading.input(name))
                near(gradient, pulled, scaled(GRADIENTS, pulled), f"{name} through logits")

    def _check_full(self, case: str, kind: str, moe: bool) -> None:
        """The trainer's whole loss, and what it logs: means, of which there may be a number for each record."""
        names = [name for name in self.reading.names if name.startswith(f"{case}.")]
        out, gradients = self._objective(kind, 0.1, 0.0, slice(None), self._added() if moe else 0.0)
        policy, reference = ([self.logps[who][side] for side in SIDES] for who in ("policy", "ref"))
        balance = 0.01 * out.terms["balance"] if moe else torch.tensor(-1.0)
        rewards = [0.1 * (ours - theirs) for ours, theirs in zip(policy, reference, strict=True)]
        losses = preference(policy[0], policy[1], reference[0], reference[1], kind, detach=False)
        for name in names:
            words = set(re.split(r"[._/]", name.removeprefix(f"{case}.")))
            side = int("rejected" in words)
            if "grad" in words and "logits" in words:
                value = gradients[side]
            elif "moe" in words:
                value = balance
            elif words & {"accuracies", "accuracy"}:
                value = out.terms["preference_accuracy"]
            elif words & {"margins", "margin"}:
                value = rewards[0] - rewards[1]
            elif words & {"logps", "logp"} and words & set(SIDES):
                value = policy[side]
            elif words & {"rewards", "reward"} and words & set(SIDES):
                value = rewards[side]
            elif words & {"reward", "rewards"}:
                value = out.terms["preference"] if "losses" not in words else losses
            elif words >= {"policy", "chosen"} or "sft" in words:  # the model's own loss, only logged
                value = self._text() + (balance * 15 / 32 if moe else 0)
            elif "losses" in words:
                value = losses + (balance if moe else 0)
            elif words <= {"loss", "total", "mean", "value"}:
                value = out.loss
            else:
                continue
            value = value.mean() if value.dim() == 1 and self.reading.shape(name) == () else value
            self.reading.near(name, value.expand(self.reading.shape(name)), GRADIENTS if "grad" in words else VALUES)

    def _text(self) -> Tensor:
        """Cross-entropy of the chosen answers, of tokens."""
        this, logits = TrainerCase.of(self.labels["chosen"], 0, 0, 0), self.logits["policy"]["chosen"]
        objective, rows = Objective(reference=frozenset({"token_mean"})), this.response_rows
        return loss_of(objective, this, rows, logits.flatten(0, 1)[rows], torch.eye(logits.shape[-1]), None, None).loss

    def _added(self) -> float:
        """What both answers' balance adds to the loss of `full.moe`."""
        each = [name for name in self.reading.names if re.search(r"(chosen|rejected)_moe_loss$", name)]
        return sum(float(self.reading.input(name)) for name in each[:2]) if each else MOE

    def _objective(
        self, kind: str, beta: float, smoothing: float, only: slice, moe: float = 0.0
    ) -> tuple[Outcome, list[Tensor]]:
        """A stage's loss of the pairs, as a batch of chosen and rejected in turn; its gradients for their logits."""
        objective = Objective(
            text=0,
            preference=1,
            balance=0.01 if moe else 0,
            preference_kind=kind,
            beta=beta,
            label_smoothing=smoothing,
            reference=frozenset({"undetached_z0", "padding", "doubled_balance"}),
        )
        length = max(labels.shape[1] for labels in self.labels.values())
        labels, logits = (
            torch.stack([_padded(of[side][only], length, fill) for side in SIDES], 1).flatten(0, 1)
            for of, fill in ((self.labels, -100), (self.logits["policy"], 0))
        )
        this = TrainerCase.of(labels, 0, 0, 0)
        logits = logits.clone().requires_grad_()
        known = torch.stack([self.logps["ref"][side][only] for side in SIDES], 1).flatten()
        rows = objective.rows(this.response_rows, this.visual_rows)
        # Chosen and rejected answers take turns, and have the shares of the reference's example.
        of_sides = (
            [probabilities_of(moe / 0.01 * share, labels.numel() // 2) for share in (15 / 32, 17 / 32)] if moe else []
        )
        routed = [torch.stack([of.unflatten(0, (-1, length)) for of in of_sides], 1).flatten(0, 2)] if moe else []
        out = loss_of(
            objective,
            this,
            rows,
            logits.flatten(0, 1)[rows],
            torch.eye(logits.shape[-1]),
            None,
            None,
            preferences=Preferences(torch.tensor([1, -1]).repeat(this.samples // 2), known),
            router_probabilities=routed,
            position_owners=torch.where(labels != -100, torch.arange(len(labels)).unsqueeze(1), -1).flatten(),
        )
        out.loss.backward()
        assert logits.grad is not None
        both = logits.grad.unflatten(0, (-1, 2))  # [pairs, 2, length, vocab]
        return out, [both[:, place, : self.labels[side].shape[1]] for place, side in enumerate(SIDES)]

    def _pulled(self, side: str, only: slice, slope: Tensor) -> Tensor:
        """The gradient of log-probabilities as that of their logits, in float64."""
        logits, labels = self.logits["policy"][side][only].double().requires_grad_(), self.labels[side][only, 1:]
        each = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp_min(0).unsqueeze(2)).squeeze(2)
        logps = (each * (labels != -100)).sum(-1)
        return torch.autograd.grad(logps, logits, slope.double())[0]


def _padded(tensor: Tensor, length: int, fill: float) -> Tensor:
    """[pairs, length, ...]"""
    missing = tensor.new_full((len(tensor), length - tensor.shape[1], *tensor.shape[2:]), fill)
    return torch.cat([tensor, missing], 1)
