"""Networks: `network(x_t, time, conditioning) -> output`."""

from imagen_lightning.networks.efficient_unet import EfficientUNet
from imagen_lightning.networks.lora import LoRA
from imagen_lightning.networks.patch_transformer import PatchTransformer
from imagen_lightning.networks.unet import UNet

__all__ = ["EfficientUNet", "LoRA", "PatchTransformer", "UNet"]
