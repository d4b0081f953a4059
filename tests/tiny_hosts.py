"""Tiny configs with the structure of each family, and real transformers processors built without a download."""

from types import SimpleNamespace

import transformers as hf
from tokenizers import AddedToken
from transformers.models.gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import SmolVLMImageProcessorPil, processing_smolvlm

from adallava.hosts.mipha import MiphaConfig
from adallava.mini.build import CHAT_TEMPLATE, build_processor, build_tokenizer

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL = {**TOWER, "image_size": 36, "patch_size": 9}  # 16 patches
TILES = [[36, 72], [72, 36], [72, 72]]
VISIBLE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

# -- decoders ---------------------------------------------------------------------------------------------------------

MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
ALTERNATING = ["sliding_attention", "full_attention"]
DECODERS = {
    "llama": (hf.LlamaConfig, {}),
    "phi": (hf.PhiConfig, {}),
    "qwen2": (hf.Qwen2Config, {}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 16}),
    "mistral": (hf.MistralConfig, {"sliding_window": 32}),
    "gemma": (hf.GemmaConfig, {"head_dim": 16}),
    "gemma2": (hf.Gemma2Config, {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 16}),
    "gemma3": (hf.Gemma3TextConfig, {"head_dim": 16, "query_pre_attn_scalar": 12, "sliding_window": 16}),
    "qwen2_vl": (hf.Qwen2VLConfig.sub_configs["text_config"], MROPE),
    "qwen2_5_vl": (hf.Qwen2_5_VLConfig.sub_configs["text_config"], MROPE),
    "qwen3_vl": (hf.Qwen3VLConfig.sub_configs["text_config"], {**MROPE, "head_dim": 8}),
}


def decoder(kind, kv_heads, tokenizer, layers=6, **more):
    """A decoder of 4 heads, with an MLP that 4 shares do not divide evenly."""
    config_class, own = DECODERS[kind]
    if kind in ("gemma2", "gemma3"):
        own = {**own, "layer_types": (ALTERNATING * layers)[:layers]}
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 50,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": False,
        **token_ids(tokenizer),
    }
    return config_class(**(sizes | own | more)).to_dict()


def token_ids(tokenizer):
    return {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": None, "bos_token_id": tokenizer.bos_token_id}


# -- hosts: text config -> config -------------------------------------------------------------------------------------

IMAGE = {"image_token_id": 4}


def llava(text, config_class=hf.LlavaConfig):
    vision = {**TOWER, "model_type": "clip_vision_model", "image_size": 72, "patch_size": 9}
    return config_class(vision_config=vision, text_config=text, image_seq_length=64, **IMAGE)


def mipha(text):
    vision = {**TOWER, "model_type": "siglip_vision_model", "image_size": 72, "patch_size": 9}
    return MiphaConfig(vision_config=vision, text_config=text, vision_feature_select_strategy="full", **IMAGE)


def llava_next(text):
    vision = {**SMALL, "model_type": "clip_vision_model"}
    return hf.LlavaNextConfig(vision_config=vision, text_config=text, image_grid_pinpoints=TILES, **IMAGE)


def onevision(text):
    vision = {**SMALL, "model_type": "siglip_vision_model", "vision_use_head": False}
    more = {"image_grid_pinpoints": TILES, "video_token_id": len_of(text) - 1}
    return hf.LlavaOnevisionConfig(vision_config=vision, text_config=text, **more, **IMAGE)


def qwen2_vl(text):
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 6}
    return hf.Qwen2VLConfig(vision_config=vision, text_config=text, video_token_id=len_of(text) - 1, **IMAGE)


def qwen2_5_vl(text):
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 6, "window_size": 24, "fullatt_block_indexes": [1]}
    return hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, video_token_id=len_of(text) - 1, **IMAGE)


def qwen3_vl(text):
    """With features for the first five layers, so that skipped layers are among them."""
    vision = {"depth": 5, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 6, "num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1, 2, 3, 4]}
    return hf.Qwen3VLConfig(vision_config=vision, text_config=text, video_token_id=len_of(text) - 1, **IMAGE)


def idefics3(text):
    return hf.Idefics3Config(vision_config=dict(SMALL), text_config=text, scale_factor=2, **IMAGE)


def smolvlm(text):
    return hf.SmolVLMConfig(vision_config=dict(SMALL), text_config=text, scale_factor=2, **IMAGE)


def internvl(text):
    vision = {**TOWER, "image_size": [36, 36], "patch_size": [9, 9]}
    return hf.InternVLConfig(vision_config=vision, text_config=text, image_seq_length=4, **IMAGE)


def paligemma(text):
    vision = {**SMALL, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False}
    return hf.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32, hidden_size=32, **IMAGE)


def gemma3(text):
    vision = {**SMALL, "model_type": "siglip_vision_model", "vision_use_head": False}
    return hf.Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=4, **IMAGE)


def len_of(text):
    return text["vocab_size"]


# -- processors -------------------------------------------------------------------------------------------------------


def tokenizer(**named):
    """The mini model's tokenizer with further special tokens, at the end of its vocabulary."""
    base = build_tokenizer()
    core = base.backend_tokenizer
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in named.values()])
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        **{f"{name}_token": getattr(base, f"{name}_token") for name in ("unk", "pad", "bos", "eos")},
        extra_special_tokens={"image_token": "<image>", **named},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def without_video(processor_class, config_class):
    """The processor without its video half, which needs torchvision; as AutoProcessor finds it for ``config_class``."""
    own = {
        "get_attributes": classmethod(lambda cls: ["image_processor", "tokenizer"]),
        "video_processor": SimpleNamespace(num_frames=1, fps=1),
        "__module__": __name__,
    }
    made = type(f"{processor_class.__name__}ImagesOnly", (processor_class,), own)
    hf.AutoProcessor.register(config_class, made, exist_ok=True)
    return made


processing_smolvlm.num2words = str  # only used for videos
hf.SmolVLMProcessor.__init__.__defaults__ = (None, 169, None)  # so that it can be loaded without a video processor
ONEVISION = without_video(hf.LlavaOnevisionProcessor, hf.LlavaOnevisionConfig)
QWEN2 = without_video(hf.Qwen2VLProcessor, hf.Qwen2VLConfig)
QWEN2_5 = without_video(hf.Qwen2_5_VLProcessor, hf.Qwen2_5_VLConfig)
QWEN3 = without_video(hf.Qwen3VLProcessor, hf.Qwen3VLConfig)
SMOLVLM = without_video(hf.SmolVLMProcessor, hf.SmolVLMConfig)
INTERNVL = without_video(hf.InternVLProcessor, hf.InternVLConfig)
CHAT = {"chat_template": CHAT_TEMPLATE}
SQUARE = {"height": 36, "width": 36}


def mipha_processor():
    made = build_processor()
    made.num_additional_image_tokens, made.vision_feature_select_strategy = 0, "full"
    return made


def next_processor():
    size = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}
    images = LlavaNextImageProcessorPil(image_grid_pinpoints=TILES, **size, **VISIBLE)
    more = {"patch_size": 9, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return hf.LlavaNextProcessor(images, tokenizer(), **more, **CHAT)


def onevision_processor():
    images = LlavaOnevisionImageProcessorPil(size=SQUARE, image_grid_pinpoints=TILES, **VISIBLE)
    more = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    return ONEVISION(images, tokenizer(video_token="<video>"), None, **more, **CHAT)


def qwen_processor(made):
    size = {"shortest_edge": 144, "longest_edge": 72 * 72}
    images = Qwen2VLImageProcessorPil(size=size, patch_size=6, merge_size=2, temporal_patch_size=2, **VISIBLE)
    # Positions are counted image by image, so that something must stand between two of them, as in Qwen's own template.
    template = CHAT_TEMPLATE.replace("<image>", "<image> ,")
    return made(images, tokenizer(video_token="<video>"), None, chat_template=template)


def tiled(image_processor, **more):
    return image_processor(
        size={"longest_edge": 72}, max_image_size={"longest_edge": 36}, do_image_splitting=True, **VISIBLE, **more
    )


def idefics3_processor():
    return hf.Idefics3Processor(tiled(Idefics3ImageProcessorPil), tokenizer(), image_seq_len=4, **CHAT)


def smolvlm_processor():
    return SMOLVLM(tiled(SmolVLMImageProcessorPil), tokenizer(video_token="<video>"), None, image_seq_len=4, **CHAT)


def internvl_processor():
    images = GotOcr2ImageProcessorPil(size=SQUARE, min_patches=1, max_patches=4, **VISIBLE)
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
    words = tokenizer(context_image_token="<image>", **named)
    return INTERNVL(images, words, None, image_seq_length=4, **CHAT)


def paligemma_processor():
    images = SiglipImageProcessorPil(size=SQUARE, **VISIBLE)
    images.image_seq_length = 16
    return hf.PaliGemmaProcessor(images, tokenizer(), **CHAT)


def gemma3_processor():
    images = Gemma3ImageProcessorPil(size=SQUARE, **VISIBLE)
    words = tokenizer(boi_token="<boi>", eoi_token="<eoi>")
    template = CHAT_TEMPLATE.replace("<image>", "<boi>")
    return hf.Gemma3Processor(images, words, chat_template=template, image_seq_length=4)
