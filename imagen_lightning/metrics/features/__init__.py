"""Feature extractors: pictures to the vectors whose distributions are compared."""

from imagen_lightning.metrics.features.base import FeatureExtractor, extract
from imagen_lightning.metrics.features.clip import ClipFeatures
from imagen_lightning.metrics.features.external import OnnxFeatures, TorchScriptFeatures
from imagen_lightning.metrics.features.inception import InceptionFeatures
from imagen_lightning.metrics.features.load import load_extractor
from imagen_lightning.metrics.features.random_conv import RandomConvFeatures

__all__ = [
    "ClipFeatures",
    "FeatureExtractor",
    "InceptionFeatures",
    "OnnxFeatures",
    "RandomConvFeatures",
    "TorchScriptFeatures",
    "extract",
    "load_extractor",
]
