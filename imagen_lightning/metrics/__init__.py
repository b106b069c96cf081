"""What pictures are measured by: functions of images, captions and features; callbacks and verbs only call them."""

from imagen_lightning.metrics.caption_accuracy import CaptionAccuracy, caption_accuracy
from imagen_lightning.metrics.protocol import Protocol, Value, columns, refuse_mixed
from imagen_lightning.metrics.vlb import VariationalBound, variational_bound

__all__ = [
    "CaptionAccuracy",
    "Protocol",
    "Value",
    "VariationalBound",
    "caption_accuracy",
    "columns",
    "refuse_mixed",
    "variational_bound",
]
