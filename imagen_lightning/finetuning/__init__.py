"""What a trained cascade's stage becomes on another domain's images."""

from imagen_lightning.finetuning.start import SamplingChanges, from_cascade

__all__ = ["SamplingChanges", "from_cascade"]
