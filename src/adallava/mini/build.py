"""The mini model's parts: word tokenizer, processor, and LLaVA and CLIP configurations, all small.

Everything here is an ordinary Hugging Face object; only the sizes are unusual. The tokenizer knows exactly the words
that the questions and answers use.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil

from adallava.mini.questions import vocabulary
from adallava.mini.scenes import IMAGE_SIZE

PATCH_SIZE = 9
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
SPECIAL = ("<unk>", "<pad>", "<s>", "</s>", "<image>", "USER:", "ASSISTANT:")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role not in ['user', 'assistant'] -%}
{{- raise_exception("the mini model knows the roles user and assistant, not " + message.role) -}}
{%- endif -%}
{{- message.role.upper() + ':' -}}
{%- if message.content is string -%}
{{- ' ' + message.content -}}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}{{- ' <image>' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- ' ' + part.text -}}{%- endfor -%}
{%- endif -%}
{{- '</s>' if message.role == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over ``vocabulary()``: case is ignored, question and other marks are words."""
    words = [*SPECIAL, *vocabulary()]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[?,.]"), "isolated")]
    )
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", words.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_processor() -> LlavaProcessor:
    """Image processor (72 pixels, centre crop, values in [-1, 1]), tokenizer and chat template in one."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def _vision_config() -> dict[str, Any]:
    return CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    ).to_dict()


def _token_ids(tokenizer: Any) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def clip_config(tokenizer: Any) -> CLIPConfig:
    """The contrastive pair of the first stage: the vision tower and a text encoder that is thrown away later."""
    text = CLIPTextConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        projection_dim=128,
        **_token_ids(tokenizer),
    )
    return CLIPConfig(text_config=text.to_dict(), vision_config=_vision_config(), projection_dim=128)


def llava_config(tokenizer: Any, layers: int = 12) -> LlavaConfig:
    """The mini LLaVA: 5-layer CLIP tower, 64 visual tokens, a Llama decoder of ``layers`` narrow layers of width 128.

    A layer reads and writes half of the residual stream's width at most: with whole-width layers half of them do all
    that these questions ask for, and nothing is left to choose (docs/LOG.md).
    """
    text = LlamaConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        # transformers' 0.02 is for wide models; at this width training starts far too slowly (docs/LOG.md).
        initializer_range=0.06,
        **_token_ids(tokenizer),
    )
    return LlavaConfig(
        vision_config=_vision_config(),
        text_config=text.to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
