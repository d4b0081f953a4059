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


def has_cls(tower: Any) -> bool:
    """Whether a vision tower has a CLS token, as CLIP's has and SigLIP's has not."""
    return getattr(getattr(tower, "embeddings", None), "class_embedding", None) is not None


def tower_features(tower: Any, pixel_values: Tensor, feature_layer: int = -2) -> Tensor:
    """Encode images [B, 3, height, width]: hidden states ``feature_layer`` of all patches, [B, N, C], without CLS."""
    return _hidden(tower, pixel_values, feature_layer)[:, int(has_cls(tower)) :]


def tower_patches(tower: Any, pixel_values: Tensor, feature_layer: int = -2) -> Patches:
    """``tower_features`` of a CLIP tower, with the keys and queries that say where CLS looks.

    Raises ``ConfigError`` for a tower without a CLS token, and for features after the last layer.
    """
    if not has_cls(tower):
        raise ConfigError(
            f"{type(tower).__name__} has no CLS token, whose attention is needed. Use a CLIP tower or another selector."
        )
    layers = tower.encoder.layers
    index = feature_layer % (len(layers) + 1)
    if index == len(layers):
        raise ConfigError(f"feature layer {feature_layer} is after the last layer, so no layer looks at its features.")
    features = _hidden(tower, pixel_values, feature_layer)
    looking = layers[index]
    normed = looking.layer_norm1(features)
    return Patches(features[:, 1:], looking.self_attn.k_proj(normed), looking.self_attn.q_proj(normed))


def _hidden(tower: Any, pixel_values: Tensor, feature_layer: int) -> Tensor:
    pixels = pixel_values.to(tower.embeddings.patch_embedding.weight.dtype)
    return tower(pixels, output_hidden_states=True).hidden_states[feature_layer]
