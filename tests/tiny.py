"""Tiny random hosts: the list of rows that drives the invariant matrix."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

import tiny_hosts as hosts
from adallava.hosts.model import AdaptiveVLM
from adallava.mini.build import build_processor


@dataclass(frozen=True)
class Host:
    """A host: how its config is made of a text config, its decoder and key/value heads (of 4), its processor."""

    config: Callable[[dict], Any]
    decoder: str
    kv_heads: int
    processor: Callable[[], Any] = build_processor


HOSTS = {
    "llava": Host(hosts.llava, "llama", 4),
    "llava-gqa": Host(hosts.llava, "llama", 2),
    "llava-phi": Host(hosts.llava, "phi", 4),
    "llava-qwen2": Host(hosts.llava, "qwen2", 2),
    "llava-mistral": Host(hosts.llava, "mistral", 2),
    "mipha": Host(hosts.mipha, "phi", 4, hosts.mipha_processor),
    "llava-next": Host(hosts.llava_next, "mistral", 2, hosts.next_processor),
    "onevision": Host(hosts.onevision, "qwen2", 2, hosts.onevision_processor),
    "qwen2-vl": Host(hosts.qwen2_vl, "qwen2_vl", 2, functools.partial(hosts.qwen_processor, hosts.QWEN2)),
    "qwen2.5-vl": Host(hosts.qwen2_5_vl, "qwen2_5_vl", 2, functools.partial(hosts.qwen_processor, hosts.QWEN2_5)),
    "qwen3-vl": Host(hosts.qwen3_vl, "qwen3_vl", 2, functools.partial(hosts.qwen_processor, hosts.QWEN3)),
    "smolvlm": Host(hosts.smolvlm, "llama", 2, hosts.smolvlm_processor),
    "idefics3": Host(hosts.idefics3, "llama", 2, hosts.idefics3_processor),
    "internvl": Host(hosts.internvl, "qwen3", 2, hosts.internvl_processor),
    "paligemma": Host(hosts.paligemma, "gemma", 1, hosts.paligemma_processor),
    "paligemma2": Host(hosts.paligemma, "gemma2", 2, hosts.paligemma_processor),
    "gemma3": Host(hosts.gemma3, "gemma3", 2, hosts.gemma3_processor),
}
ROWS = [(host, variant) for host in HOSTS for variant in ("L", "H")]


@functools.cache
def processor(host="llava"):
    return HOSTS[host].processor()


def tiny_config(host="llava", layers=6, **text):
    row, tokenizer = HOSTS[host], processor(host).tokenizer
    config = row.config(hosts.decoder(row.decoder, row.kv_heads, tokenizer, layers, **text))
    config.tie_word_embeddings = False
    for name, value in hosts.token_ids(tokenizer).items():
        setattr(config, name, value)
    return config


def tiny_base(host="llava", layers=6, seed=0, **text):
    """A random host with 4 heads, an MLP that 4 shares do not divide evenly, and weights far from zero."""
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(tiny_config(host, layers, **text)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ("language_model.layers" in name or "text_model.layers" in name) and weight.dim() == 2:
                weight.normal_(0, 1.2 / weight.shape[1] ** 0.5)
            elif "vision" not in name and weight.dim() == 1:
                weight.add_(torch.randn_like(weight), alpha=0.2)
        model.lm_head.weight.normal_(0, 0.3)
        model.get_input_embeddings().weight.normal_(0, 1)
    return model


def heads_per_switch(host, variant):
    return max(2, 4 // HOSTS[host].kv_heads) if variant == "H" else None


def tiny_vlm(host="llava", variant="L", layers=6, **text):
    """A tiny adaptive model whose scheduler's choice depends on its input."""
    model = tiny_base(host, layers, **text)
    vlm = AdaptiveVLM.adapt(model, processor(host), variant=variant, heads_per_switch=heads_per_switch(host, variant))
    with torch.no_grad():
        vlm.scheduler.head.weight.normal_(0, 0.3)
    return vlm.eval()


def placeholders(host):
    """Ids of tokens that stand for images and the like, which a random model would say."""
    tokenizer = processor(host).tokenizer
    return sorted({4, *range(len(build_processor().tokenizer), len(tokenizer))})
