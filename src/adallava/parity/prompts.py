"""Recorded prompts as model inputs: the released code marks an image by the id -200 and cuts it in later."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

IMAGE_ID = -200


def expand(ids: Sequence[int], image_id: int, image_tokens: int) -> list[int]:
    """Recorded ids -> ids with a run of ``image_tokens`` placeholders for each image."""
    return [new for token in ids for new in ([image_id] * image_tokens if token == IMAGE_ID else [token])]


def prompt_inputs(model: Any, ids: Sequence[int], pixels: Tensor | None, features: Tensor | None) -> dict[str, Any]:
    """Inputs of a LLaVA host for one recorded prompt, B = 1.

    pixels: [n, 3, height, width]. features: [n, N, D], projected image features, used where no pixels were recorded.
    """
    images = sum(token == IMAGE_ID for token in ids)
    source = pixels if pixels is not None else features
    if images and source is None:
        raise KeyError("the recording has an image in its prompt, but neither pixel_values nor image_features")
    image_id = model.config.image_token_id
    tokens = image_token_count(model) if features is None else features.shape[1]
    input_ids = torch.tensor([expand(ids, image_id, tokens)])
    # Said explicitly: generate() would take a placeholder whose id is that of padding for padding.
    mask = {"attention_mask": torch.ones_like(input_ids)}
    if image_id not in ids and (not images or pixels is not None):
        return mask | {"input_ids": input_ids} | ({"pixel_values": pixels} if images else {})
    # Prompts recorded from random ids may say the placeholder's id as a word: places count then, not ids.
    embeds = model.get_input_embeddings()(input_ids)
    if not images:
        return mask | {"inputs_embeds": embeds}
    if features is None:
        features = torch.stack(list(model.get_image_features(pixels).pooler_output))
    places = torch.tensor([new == IMAGE_ID for new in expand(ids, IMAGE_ID, tokens)])
    return mask | {"inputs_embeds": embeds.masked_scatter(places[None, :, None], features.to(embeds))}


def image_token_count(model: Any) -> int:
    """Visual tokens of one image."""
    vision = model.config.vision_config
    return (vision.image_size // vision.patch_size) ** 2


def greedy(model: Any, steps: int, **inputs: Any) -> tuple[list[int], Tensor]:
    """Greedy decoding of exactly ``steps`` tokens, as in the recordings: ids, and logits [steps, V] they come from."""
    out = model.generate(
        **inputs,
        max_new_tokens=steps,
        min_new_tokens=steps,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences[0, -steps:].tolist(), torch.cat(out.logits)
