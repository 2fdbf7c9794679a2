"""LLaVA-MoD's golden cases: golden/llava_mod.md says what each array is.

A case's arrays say of what kind it is, never its name; their own names say which setting of the reference made them
(`kto_pair_single0_b0.1.losses`).
"""

from __future__ import annotations

from tests import golden_llava_mod_distillation as distillation
from tests import golden_llava_mod_layers as layers
from tests import golden_llava_mod_pictures as pictures
from tests import golden_llava_mod_preferences as preferences
from tests.golden_cases import GoldenCase, Reading

DEPARTURES = {**distillation.DEPARTURES, **layers.DEPARTURES, **pictures.DEPARTURES}
"""Where we differ from the reference on purpose, and our rule. Arrays are then compared with the rule; where it only
takes a constant away, with the array less that constant."""

KINDS = (
    (distillation.check_distillation, {"labels", "teacher_logits", "student_logits"}),
    (distillation.check_distillation, {"labels", "teacher_logits_f16", "student_logits_f16"}),
    (distillation.check_trainer, {"student_hidden", "lm_head"}),
    (preferences.check_preference, {"chosen_labels", "policy_chosen_logits"}),
    (preferences.check_preference, {"chosen_logratio"}),
    (layers.check_residual, {"coef_weight", "router_weight"}),
    (layers.check_layer, {"x", "ffn_gate", "router_weight"}),
    (pictures.check_expansion, {"input_ids", "image_feats"}),
    (layers.check_gate, {"logits"}),
)
"""How each kind is compared, and the arrays by which it is told."""


def read(case: GoldenCase) -> Reading | None:
    """What was compared with what; None for a case of another kind."""
    for compare, needs in KINDS:
        if needs <= case.arrays.keys():
            reading = Reading(case, DEPARTURES)
            compare(reading)
            reading.finish()
            return reading
    return None


def check(case: GoldenCase) -> bool:
    """Compares the case if it is one of ours; False if its arrays are of another kind."""
    return read(case) is not None
