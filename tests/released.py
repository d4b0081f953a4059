"""Checkpoints in the released layouts for the tests: full key lists of the real ones, and small ones with files."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

GOLDEN = Path(__file__).parent / "golden"
CLIP_L = "openai/clip-vit-large-patch14-336"


def llama_names(hidden, inter, layers, vocab, inv_freq=False):
    """Names and shapes of a Llama decoder in LLaVA's layout."""
    out = {
        "model.embed_tokens.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
    }
    for i in range(layers):
        layer = f"model.layers.{i}."
        out |= {f"{layer}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        out |= {f"{layer}mlp.{p}_proj.weight": (inter, hidden) for p in ("gate", "up")}
        out |= {f"{layer}mlp.down_proj.weight": (hidden, inter)}
        out |= {f"{layer}{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
        if inv_freq:
            out[f"{layer}self_attn.rotary_emb.inv_freq"] = (64,)
    return out


def phi_names(hidden, inter, layers, vocab):
    """Names and shapes of a Phi decoder in Mipha's layout."""
    out = {"model.embed_tokens.weight": (vocab, hidden), "lm_head.weight": (vocab, hidden), "lm_head.bias": (vocab,)}
    out |= {f"model.final_layernorm.{w}": (hidden,) for w in ("weight", "bias")}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense"):
            out |= {f"{layer}{name}.weight": (hidden, hidden), f"{layer}{name}.bias": (hidden,)}
        out |= {f"{layer}mlp.fc1.weight": (inter, hidden), f"{layer}mlp.fc1.bias": (inter,)}
        out |= {f"{layer}mlp.fc2.weight": (hidden, inter), f"{layer}mlp.fc2.bias": (hidden,)}
        out |= {f"{layer}input_layernorm.{w}": (hidden,) for w in ("weight", "bias")}
    return out


def _encoder_names(root, hidden, inter, layers):
    out = {}
    for i in range(layers):
        layer = f"{root}encoder.layers.{i}."
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            out |= {f"{layer}self_attn.{name}.weight": (hidden, hidden), f"{layer}self_attn.{name}.bias": (hidden,)}
        for name in ("layer_norm1", "layer_norm2"):
            out |= {f"{layer}{name}.weight": (hidden,), f"{layer}{name}.bias": (hidden,)}
        out |= {f"{layer}mlp.fc1.weight": (inter, hidden), f"{layer}mlp.fc1.bias": (inter,)}
        out |= {f"{layer}mlp.fc2.weight": (hidden, inter), f"{layer}mlp.fc2.bias": (hidden,)}
    return out


def clip_names(root="model.vision_tower.vision_tower.vision_model.", hidden=1024, inter=4096, layers=24, positions=577):
    """Names and shapes of a CLIP tower with patches of 14 pixels."""
    out = {
        f"{root}embeddings.class_embedding": (hidden,),
        f"{root}embeddings.patch_embedding.weight": (hidden, 3, 14, 14),
        f"{root}embeddings.position_embedding.weight": (positions, hidden),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        out |= {f"{root}{name}.weight": (hidden,), f"{root}{name}.bias": (hidden,)}
    return out | _encoder_names(root, hidden, inter, layers)


def siglip_names(root="model.vision_tower.vision_model.", hidden=1152, inter=4304, layers=27, patches=729):
    """Names and shapes of a SigLIP tower with its pooling head."""
    out = {
        f"{root}embeddings.patch_embedding.weight": (hidden, 3, 14, 14),
        f"{root}embeddings.patch_embedding.bias": (hidden,),
        f"{root}embeddings.position_embedding.weight": (patches, hidden),
        f"{root}head.probe": (1, 1, hidden),
        f"{root}head.attention.in_proj_weight": (3 * hidden, hidden),
        f"{root}head.attention.in_proj_bias": (3 * hidden,),
        f"{root}head.attention.out_proj.weight": (hidden, hidden),
        f"{root}head.attention.out_proj.bias": (hidden,),
        f"{root}head.mlp.fc1.weight": (inter, hidden),
        f"{root}head.mlp.fc1.bias": (inter,),
        f"{root}head.mlp.fc2.weight": (hidden, inter),
        f"{root}head.mlp.fc2.bias": (hidden,),
    }
    for name in ("post_layernorm", "head.layernorm"):
        out |= {f"{root}{name}.weight": (hidden,), f"{root}{name}.bias": (hidden,)}
    return out | _encoder_names(root, hidden, inter, layers)


def projector_names(hidden, vision):
    """Names and shapes of mlp2x_gelu."""
    shapes = {"0.weight": (hidden, vision), "0.bias": (hidden,), "2.weight": (hidden, hidden), "2.bias": (hidden,)}
    return {f"model.mm_projector.{name}": shape for name, shape in shapes.items()}


def scheduler_names(hidden, logits):
    """Names and shapes of AdaLLaVA's scheduler."""
    net = "scheduler.scheduler_up_proj.net."
    out = {f"{net}0.weight": (256,), f"{net}0.bias": (256,), f"{net}1.weight": (hidden, 256), f"{net}1.bias": (hidden,)}
    out |= {f"{net}3.weight": (hidden, hidden), f"{net}3.bias": (hidden,)}
    return out | {"scheduler.mlp_head.weight": (logits, hidden), "scheduler.mlp_head.bias": (logits,)}


def llava_config(hidden, inter, layers, heads, vocab=32000, **more):
    """config.json of LLaVA-1.5 in its original layout."""
    return {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 1024,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": CLIP_L,
        **more,
    }


def ada_config(variant, **more):
    """The fields that AdaLLaVA adds."""
    fields = {"model_type": "ada_llava_llama", "architectures": ["AdaLlavaLlamaForCausalLM"], "scheduler_type": variant}
    return fields | {"num_prefix_layers": 16, "scheduler_rank": 8, "token_selecting": "none"} | more


def copy_golden(name, folder):
    """A copy of a recorded checkpoint that can be changed; its tower's config stays beside it."""
    shutil.copytree(GOLDEN / name / "checkpoint", folder / "checkpoint")
    if (GOLDEN / name / "clip").is_dir():
        shutil.copytree(GOLDEN / name / "clip", folder / "clip")
    return folder / "checkpoint"


def edit_config(folder, **changes):
    """Change fields of a config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(folder, edit, name="model.safetensors"):
    """Change a file of tensors in place."""
    weights = load_file(folder / name)
    edit(weights)
    save_file(weights, folder / name, metadata={"format": "pt"})


def reshard(folder, shards, binary=False):
    """Split ``model.safetensors`` into several files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, ending = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    where, names = {}, sorted(weights)
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{ending}"
        part = {name: weights[name] for name in names[number::shards]}
        where |= dict.fromkeys(part, file)
        if binary:
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file)
    index = folder / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


def byte_tokenizer(folder):
    """A byte-level tokenizer of 257 tokens, of the kind that Phi has."""
    core = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token=end, eos_token=end, unk_token=end).save_pretrained(folder)


def llama_tokenizer(folder, legacy=False, size=512):
    """A character-level Llama tokenizer of exactly ``size`` tokens, as the released checkpoints bring one."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    pieces += [c for c in map(chr, range(33, 127)) if c not in pieces]
    pieces += [f"filler{i}" for i in range(size - len(pieces))]
    tokenizer = LlamaTokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], legacy=legacy, add_bos_token=True
    )
    tokenizer.save_pretrained(folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "add_bos_token": True, "add_eos_token": False}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "padding_side": "right"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def same_weights(a, b):
    """Assert that two folders hold the same tensors under the same names, bit by bit."""
    a, b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def read(folder, name="config.json"):
    """A JSON file of a folder."""
    return json.loads((folder / name).read_text())
