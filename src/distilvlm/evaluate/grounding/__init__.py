"""Where a model says that things are: boxes read strictly, compared with the true ones, and drawn.

Read `measure.py` first; how boxes are written is in `distilvlm.data.boxes`.
"""

from distilvlm.data.boxes import padded, parsed, unpadded
from distilvlm.evaluate.grounding.blind import blind_answers
from distilvlm.evaluate.grounding.drawing import draw
from distilvlm.evaluate.grounding.measure import GROUNDING, true_boxes
from distilvlm.evaluate.grounding.overlap import iou

__all__ = ["GROUNDING", "blind_answers", "draw", "iou", "padded", "parsed", "true_boxes", "unpadded"]
