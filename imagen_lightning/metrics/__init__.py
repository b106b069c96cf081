"""What pictures are measured by: functions of images, captions and features; callbacks and verbs only call them."""

from imagen_lightning.metrics.caption_accuracy import CaptionAccuracy, caption_accuracy

__all__ = ["CaptionAccuracy", "caption_accuracy"]
