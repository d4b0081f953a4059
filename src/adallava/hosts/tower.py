"""What a vision tower gives token selection: patch features, and the keys and queries that say where CLS looks.

LLaVA takes its features before a tower's last layer (``vision_feature_layer`` -2), so that layer's attention is
the one that tells which of them matter. Its keys and queries are computed here from the features, with the tower's own
weights: hooks would not do, because several threads may use one tower.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adallava.errors import ConfigError
from adallava.selection.common import Patches


def tower_patches(tower: Any, pixel_values: Tensor, feature_layer: int = -2) -> Patches:
    """Encode images [B, 3, height, width] with a CLIP tower; features are hidden states ``feature_layer`` without CLS.

    Raises ``ConfigError`` for a tower without a CLS token, and for features after the last layer.
    """
    if getattr(getattr(tower, "embeddings", None), "class_embedding", None) is None:
        raise ConfigError(
            f"{type(tower).__name__} has no CLS token, whose attention is needed. Use a CLIP tower or another selector."
        )
    layers = tower.encoder.layers
    depth = len(layers)
    index = feature_layer % (depth + 1)
    if index == depth:
        raise ConfigError(f"feature layer {feature_layer} is after the last layer, so no layer looks at its features.")
    hidden = tower(pixel_values.to(tower.embeddings.patch_embedding.weight.dtype), output_hidden_states=True)
    features = hidden.hidden_states[index]  # [B, 1 + N, C]
    looking = layers[index]
    normed = looking.layer_norm1(features)
    return Patches(features[:, 1:], looking.self_attn.k_proj(normed), looking.self_attn.q_proj(normed))
