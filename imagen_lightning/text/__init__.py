"""Text encoders: frozen ones (`TinyTextEncoder`, `T5TextEncoder`), a trainable one over their states, new words.

Importing this package does not import transformers; `T5TextEncoder` does when it is first used.
"""

from imagen_lightning.text.cleaning import clean_caption
from imagen_lightning.text.common import masked_mean
from imagen_lightning.text.pseudo_tokens import PseudoTokens
from imagen_lightning.text.t5 import T5TextEncoder
from imagen_lightning.text.tiny import TinyTextEncoder
from imagen_lightning.text.transformer import TransformerEncoder

__all__ = ["PseudoTokens", "T5TextEncoder", "TinyTextEncoder", "TransformerEncoder", "clean_caption", "masked_mean"]
