"""FLOPs of the vision tower and projector, which the paper's numbers leave out.

The *strict* convention, that of a FLOP counter: 2 FLOPs per multiply-add of convolutions, linear layers and attention
products; nothing for norms, softmax and activations. Never add it to FLOPs of the paper's convention without saying so.
All layers of the tower count: transformers runs them all, though LLaVA takes the features of the last but one. What a
tower has behind its layers (SigLIP's pooling head) does not; LLaVA and Mipha read nothing of it.
"""

from __future__ import annotations

from adallava.cost.spec import CostError, ModelSpec, VisionSpec


def vision_tower_flops(spec: ModelSpec, *, num_layers: int | None = None) -> int:
    """Return the FLOPs of the vision tower on one image (strict convention).

    num_layers: layers that run; all by default. LLaVA takes the features of the last layer but one, so that a tower
        that stops there saves one layer.
    Raises ``CostError`` when the spec has no vision tower or fewer layers.
    """
    vision = _vision(spec)
    layers = vision.num_layers if num_layers is None else num_layers
    if not 0 <= layers <= vision.num_layers:
        raise CostError(f"num_layers is {num_layers!r}, but the vision tower has {vision.num_layers}.")
    positions, width = vision.num_patches + vision.class_token, vision.hidden_size
    patches = 2 * vision.num_patches * width * vision.num_channels * vision.patch_size**2
    linear = 2 * positions * (4 * width**2 + 2 * width * vision.intermediate_size)
    attention = 4 * positions**2 * width
    return patches + layers * (linear + attention)


def projector_flops(spec: ModelSpec, *, visual_tokens: int | None = None) -> int:
    """Return the FLOPs of LLaVA's two-layer projector on one image (strict convention).

    visual_tokens: tokens that it projects, fewer than there are patches where some were selected before it.
    Raises ``CostError`` when the spec has no vision tower or fewer patches.
    """
    vision = _vision(spec)
    tokens = vision.num_patches if visual_tokens is None else visual_tokens
    if not 0 <= tokens <= vision.num_patches:
        raise CostError(f"visual_tokens is {tokens}, but an image has {vision.num_patches} patches.")
    inner = vision.projector_hidden_size
    return 2 * tokens * (vision.hidden_size * inner + inner * inner)


def _vision(spec: ModelSpec) -> VisionSpec:
    if spec.vision is None:
        raise CostError("the spec has no vision tower sizes. Pass vision=VisionSpec(...) or a config that has them.")
    return spec.vision
