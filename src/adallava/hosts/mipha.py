"""Mipha: a LLaVA whose decoder is Phi, whose tower is SigLIP, and whose language-model head has a bias.

transformers' LLaVA holds all of it but the bias, so this is a subclass with a config of its own. Importing this module
makes the type known to ``AutoConfig``, ``AutoModelForImageTextToText`` and ``AutoProcessor``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)


class MiphaConfig(LlavaConfig):
    """A ``LlavaConfig`` whose language-model head has a bias."""

    model_type = "mipha"


class MiphaForConditionalGeneration(LlavaForConditionalGeneration):
    """LLaVA with a bias in ``lm_head``; everything else is inherited."""

    config_class = MiphaConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        text = config.get_text_config()
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=True)
        self.post_init()


AutoConfig.register(MiphaConfig.model_type, MiphaConfig, exist_ok=True)
AutoModelForImageTextToText.register(MiphaConfig, MiphaForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MiphaConfig, LlavaProcessor, exist_ok=True)
