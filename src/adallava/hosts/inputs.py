"""Model inputs: the slot of the latency token, and positions that a host would otherwise keep for itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adallava.data.conversation import IGNORE_INDEX
from adallava.errors import PromptError

if TYPE_CHECKING:
    from adallava.hosts.state import RequestState

PER_TOKEN = {"attention_mask": 1, "labels": IGNORE_INDEX, "token_type_ids": 0, "mm_token_type_ids": 0}


def moved(inputs: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The tensors of ``inputs`` on a device, those of floating point in ``dtype``."""
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


def insert_latency_slot(inputs: dict[str, Any], slot_id: int) -> tuple[dict[str, Any], Tensor]:
    """Make room for one more token in each row; returns new inputs [B, T + 1] and the slots' positions, int64 [B].

    With labels (training) the slot stands just before the first token of the last answer; without, after the last
    token of the prompt, which with left padding is the last position of every row. The embedding of ``slot_id`` is
    never read, because layer 0 puts the latency token there; it only must not be an image placeholder.
    """
    ids = inputs.get("input_ids")
    tokens = ids if ids is not None else inputs.get("inputs_embeds")
    if tokens is None:
        raise PromptError("neither input_ids nor inputs_embeds was passed. Pass input_ids [B, T].")
    if inputs.get("position_ids") is not None:
        raise PromptError("position_ids were passed for a prompt without its latency token. Leave them out.")
    index = latency_position(tokens.shape[0], tokens.shape[1], inputs.get("attention_mask"), inputs.get("labels"))
    index = index.to(tokens.device)
    new = dict(inputs)
    if ids is not None:
        new["input_ids"] = _insert(ids, index, slot_id)
    else:
        new["inputs_embeds"] = _insert(tokens, index, 0)
    for name, value in PER_TOKEN.items():
        if isinstance(inputs.get(name), Tensor):
            new[name] = _insert(inputs[name], index, value)
    return new, index


def slot_id(config: Any, pad_token_id: int | None) -> int:
    """A token id for the latency token's place: padding where there is one, never an image or video placeholder."""
    placeholders = {getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")}
    if pad_token_id is not None and pad_token_id not in placeholders:
        return pad_token_id
    return next(i for i in range(len(placeholders) + 1) if i not in placeholders)


def embed_images(model: Any, ids: Tensor, images: list[Tensor]) -> Tensor:
    """Embeddings [B, T, D] of ids [B, T], the first image placeholders of row b standing for ``images[b]`` [M, D]."""
    place = ids == model.config.image_token_id
    wanted = torch.tensor([len(tokens) for tokens in images], device=ids.device)
    place = place & (place.cumsum(1) <= wanted[:, None])
    if not torch.equal(place.sum(1), wanted):
        raise PromptError(
            f"the prompts have {place.sum(1).tolist()} image placeholders for {wanted.tolist()} visual tokens. "
            "Select visual tokens and prompts together."
        )
    embeds = model.get_input_embeddings()(ids)
    return embeds.masked_scatter(place[..., None], torch.cat(images).to(embeds))


def rope_positions(model: Any, inputs: dict[str, Any], state: RequestState) -> Tensor:
    """Positions in time, height and width, int64 [3, B, T], of a Qwen-VL request whose caller gave none.

    Tokens after an image continue at another position than their index; transformers keeps the difference
    (``rope_deltas``) on the model, where the next request overwrites it. Here it belongs to the request's state.
    """
    ids, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    tokens = ids if ids is not None else inputs["inputs_embeds"]
    batch, length = tokens.shape[:2]
    past = cache.get_seq_length() if cache is not None else 0
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    vision = {name: inputs[name] for name in names if inputs.get(name) is not None}
    if past == 0 and ids is not None and "mm_token_type_ids" in vision and len(vision) > 1:
        positions, _ = model.get_rope_index(ids, attention_mask=inputs.get("attention_mask"), **vision)
        # Counted from the padded length, so that decoding needs no mask.
        state.rope_deltas = positions.amax((0, 2))[:, None] + 1 - length  # [B, 1]
        return positions
    text = torch.arange(past, past + length, device=tokens.device).expand(batch, -1)
    if state.rope_deltas is not None:
        text = text + state.rope_deltas.to(tokens.device)
    return text.expand(3, -1, -1)


def latency_position(batch: int, tokens: int, mask: Tensor | None, labels: Tensor | None) -> Tensor:
    """Where each row's latency token goes: int64 [B]. A row whose labels have no answer is a prompt."""
    if mask is not None and mask.dim() != 2:
        raise PromptError(f"the attention mask is {list(mask.shape)}, expected [B, T] of zeros and ones.")
    end = torch.full((batch,), tokens) if mask is None else tokens - mask.flip(1).int().argmax(1)
    if labels is None:
        return end
    learned = labels != IGNORE_INDEX
    # The last answer starts at the last learned token whose predecessor is not learned.
    starts = learned & ~torch.nn.functional.pad(learned, (1, 0))[:, :-1]
    return torch.where(starts.any(1), tokens - 1 - starts.flip(1).int().argmax(1), end.to(labels.device))


def _insert(values: Tensor, index: Tensor, new: int) -> Tensor:
    """[B, T, ...] -> [B, T + 1, ...] with ``new`` at ``index`` [B] of each row."""
    batch, tokens = values.shape[:2]
    positions = torch.arange(tokens + 1, device=values.device).expand(batch, -1)
    source = (positions - (positions > index[:, None]).long()).clamp(max=tokens - 1)
    rows = torch.arange(batch, device=values.device)
    out = values[rows[:, None], source]
    out[rows, index] = new
    return out
