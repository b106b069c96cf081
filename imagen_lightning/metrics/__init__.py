"""What pictures are measured by: functions of images, captions and features; callbacks and verbs only call them."""

from imagen_lightning.metrics.caption_accuracy import CaptionAccuracy, caption_accuracy
from imagen_lightning.metrics.vlb import VariationalBound, variational_bound

__all__ = ["CaptionAccuracy", "VariationalBound", "caption_accuracy", "variational_bound"]
