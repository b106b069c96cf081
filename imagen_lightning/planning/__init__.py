"""What training takes, before it is begun."""

from imagen_lightning.planning.advice import Advice, cheapest, fits
from imagen_lightning.planning.plan import Plan, Training, make_plan
from imagen_lightning.planning.show import show_plan
from imagen_lightning.planning.step import find_precision

__all__ = [
    "Advice",
    "Plan",
    "Training",
    "cheapest",
    "find_precision",
    "fits",
    "make_plan",
    "show_plan",
]
