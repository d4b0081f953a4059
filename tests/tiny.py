"""Tiny random hosts: the list of rows that drives the invariant matrix."""

import functools

import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from adallava.hosts.model import AdaptiveVLM
from adallava.mini.build import build_processor

IMAGE_TOKENS = 64
HOSTS = {"llava": 4, "llava-gqa": 2}  # key/value heads of 4
ROWS = [(host, variant) for host in HOSTS for variant in ("L", "H")]


@functools.cache
def processor():
    return build_processor()


def tiny_base(host="llava", layers=6, seed=0, **text):
    """A random LLaVA with 4 heads of 8, an MLP that 4 shares do not divide evenly, and weights far from zero."""
    torch.manual_seed(seed)
    tokenizer = processor().tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": None, "bos_token_id": tokenizer.bos_token_id}
    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 72,
            "patch_size": 9,
        },
        text_config=LlamaConfig(
            hidden_size=32,
            intermediate_size=50,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=HOSTS[host],
            vocab_size=len(tokenizer),
            tie_word_embeddings=False,
            **(ids | text),
        ).to_dict(),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
        **ids,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "language_model.layers" in name and weight.dim() == 2:
                weight.normal_(0, 1.2 / weight.shape[1] ** 0.5)
        model.lm_head.weight.normal_(0, 0.3)
        model.get_input_embeddings().weight.normal_(0, 1)
    return model


def tiny_vlm(host="llava", variant="L", layers=6, **text):
    """A tiny adaptive model whose scheduler's choice depends on its input."""
    model = tiny_base(host, layers, **text)
    vlm = AdaptiveVLM.adapt(model, processor(), variant=variant, heads_per_switch=2 if variant == "H" else None)
    with torch.no_grad():
        vlm.scheduler.head.weight.normal_(0, 0.3)
    return vlm.eval()
