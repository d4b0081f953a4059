"""Models with random weights and real shapes, to measure time without a download: time does not depend on weights."""

from __future__ import annotations

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil

from adallava.errors import ConfigError, did_you_mean
from adallava.hosts.model import AdaptiveVLM

# Layers, width, neurons, heads, words; then of the tower: layers, width, neurons, heads, patches per side.
SHAPES = {
    "tiny": ((4, 64, 160, 4, 256), (2, 32, 64, 4, 6)),
    "small": ((8, 512, 1376, 8, 4096), (4, 256, 1024, 4, 24)),
    "mid": ((16, 1024, 2752, 16, 4096), (4, 256, 1024, 4, 24)),
    "large": ((24, 2048, 5504, 16, 4096), (4, 256, 1024, 4, 24)),
    "llava-1.5-7b": ((32, 4096, 11008, 32, 32064), (24, 1024, 4096, 16, 24)),
}
_PATCH = 14
_SPECIAL = ("<pad>", "<unk>", "</s>")
_TEMPLATE = """\
{%- for message in messages -%}{%- for part in message.content -%}
{{- ' <image>' if part.type == 'image' else ' ' + part.text -}}
{%- endfor -%}{%- endfor -%}"""


def random_llava(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A LLaVA with a Llama decoder, a CLIP tower and random weights; ``ConfigError`` lists the names there are."""
    if name not in SHAPES:
        raise ConfigError(f"there is no model {name!r}; known: {', '.join(SHAPES)}.{did_you_mean(name, SHAPES)}")
    (layers, width, neurons, heads, words), (deep, wide, inner, looking, side) = SHAPES[name]
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=neurons,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        vocab_size=words,
        max_position_embeddings=8192,
    )
    vision = CLIPVisionConfig(
        hidden_size=wide,
        intermediate_size=inner,
        num_hidden_layers=deep,
        num_attention_heads=looking,
        image_size=side * _PATCH,
        patch_size=_PATCH,
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=words - 1, image_seq_length=side**2
    )
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    return model.to(dtype).eval()


def random_processor(model: LlavaForConditionalGeneration) -> LlavaProcessor:
    """A processor for such a model, to whose tokenizer every word is one token, and the same one."""
    size = model.config.vision_config.image_size
    ids = {**{word: index for index, word in enumerate(_SPECIAL)}, "<image>": model.config.image_token_id}
    core = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ids])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    )


def model_named(name: str, device: str) -> AdaptiveVLM:
    """A checkpoint, or one of ``SHAPES`` as variant L with random weights, in bfloat16 unless on a CPU."""
    if name not in SHAPES:
        return AdaptiveVLM.from_pretrained(name, device=device)
    base = random_llava(name, torch.device(device), torch.float32 if device == "cpu" else torch.bfloat16)
    return AdaptiveVLM.adapt(base, random_processor(base), variant="L").eval()


def random_prompt(model: LlavaForConditionalGeneration, text_tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """One image and ``text_tokens`` words of noise, as model inputs of batch 1."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    words = torch.randint(config.text_config.vocab_size - 1, (1, text_tokens), generator=generator)
    image = torch.full((1, config.image_seq_length), config.image_token_id)
    ids = torch.cat((words[:, :5], image, words[:, 5:]), 1)
    size = config.vision_config.image_size
    pixels = torch.rand(1, 3, size, size, generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(model.dtype)}
    return {name: value.to(model.device) for name, value in inputs.items()}
