"""What comes along with the weights: tokenizer, image processor and prompt template, as one ``LlavaProcessor``.

LLaVA splits a prompt at the word ``<image>`` and tokenizes the pieces one by one; transformers has a token for it. The
same token ids must come out, and whether they do depends on how a tokenizer treats the start of a piece, so it is
tried here and the template follows.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaConfig, LlavaProcessor, PhiConfig
from transformers.models.clip import CLIPImageProcessorPil
from transformers.models.llava import LlavaImageProcessorPil
from transformers.models.siglip import SiglipImageProcessorPil

from adallava.errors import CheckpointError
from adallava.hosts.convert_files import file_of
from adallava.hosts.convert_towers import Tower

IMAGE_TOKEN = "<image>"
SENTENCEPIECE = "tokenizer.model"
_FILES = ("tokenizer.json", SENTENCEPIECE, "vocab.json")
_DECODER_CONFIGS = {"llama": LlamaConfig, "phi": PhiConfig}

# vicuna_v1 of LLaVA and "phi" of Mipha are the same but for the token that ends an answer. A message ends in a space
# if the user's, in that token if the assistant's; images stand where the message has them.
_TEMPLATE = """\
{%- if messages[0].role == 'system' -%}
{%- set system, messages = messages[0].content, messages[1:] -%}
{%- else -%}
{%- set system = SYSTEM -%}
{%- endif -%}
{%- if system is string -%}{{- system + ' ' -}}
{%- else -%}{%- for part in system -%}{{- part.text + ' ' -}}{%- endfor -%}{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ['user', 'assistant'] -%}
{{- raise_exception("after the first message the roles are user and assistant, not " + message.role) -}}
{%- endif -%}
{{- message.role.upper() + ': ' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{{- IMAGE if part.type == 'image' else part.text -}}
{%- endfor -%}
{%- endif -%}
{{- END if message.role == 'assistant' else ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


def has_tokenizer(source: str) -> bool:
    """Whether a folder or hub repository has files of a tokenizer."""
    return any(file_of(source, name) is not None for name in _FILES)


def load_tokenizer(source: str, decoder: str) -> tuple[Any, bool] | None:
    """The tokenizer with ``<image>`` in it, and whether that was added; None for a checkpoint without tokenizer.

    decoder: "llama" or "phi". Raises ``CheckpointError`` for tokenizer files that cannot be read.
    """
    files = [name for name in _FILES if file_of(source, name) is not None]
    if not files:
        return None
    if files == [SENTENCEPIECE]:
        lacking = [m for m in ("sentencepiece", "google.protobuf") if not _installed(m)]
        if lacking:
            raise CheckpointError(
                f"{source} has its tokenizer as {SENTENCEPIECE} only, and reading that needs packages that are not "
                "installed: pip install sentencepiece protobuf"
            )
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(source, config=_DECODER_CONFIGS[decoder]())
    except Exception as error:  # the tokenizers library raises plain Exception for a damaged file
        raise CheckpointError(f"the tokenizer of {source} cannot be read ({error}). Copy it again.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    # Answers to prompts of several lengths are decoded together: the padding must be in front.
    tokenizer.padding_side = "left"
    added = IMAGE_TOKEN not in tokenizer.get_vocab()
    if added:
        token = AddedToken(IMAGE_TOKEN, special=True, normalized=False)
        tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer, added


def build_processor(tokenizer: Any, tower: Tower, raw: dict[str, Any], select_strategy: str) -> LlavaProcessor:
    """A ``LlavaProcessor`` that prepares prompts and images as the released code does for this config."""
    processor = LlavaProcessor(
        image_processor=_image_processor(tower, raw),
        tokenizer=tokenizer,
        patch_size=tower.config["patch_size"],
        vision_feature_select_strategy=select_strategy,
        num_additional_image_tokens=int(tower.has_cls),
        image_token=IMAGE_TOKEN,
    )
    processor.chat_template = chat_template(tokenizer)
    return processor


def chat_template(tokenizer: Any) -> str:
    """LLaVA's prompt for this tokenizer, as a Jinja template."""
    image = f"{IMAGE_TOKEN}{_image_separator(tokenizer)}"
    names = (("SYSTEM", _SYSTEM), ("IMAGE", image), ("END", tokenizer.eos_token or ""))
    return "".join(f"{{%- set {name} = {_quoted(value)} -%}}\n" for name, value in names) + _TEMPLATE


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def _image_separator(tokenizer: Any) -> str:
    """The text after ``<image>`` that gives the ids of a line break that starts a piece of its own.

    SentencePiece puts a space before such a piece. Some fast tokenizers do so after a special token too, others not,
    and then the space must be written.
    """

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    apart = [*ids("x "), tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), *ids("\nx")]
    return next((text for text in ("\n", " \n") if ids(f"x {IMAGE_TOKEN}{text}x") == apart), "\n")


def _image_processor(tower: Tower, raw: dict[str, Any]) -> Any:
    if raw.get("image_aspect_ratio") == "pad":
        return LlavaImageProcessorPil(do_pad=True, **tower.images)
    if tower.has_cls:
        return CLIPImageProcessorPil(**tower.images)
    return SiglipImageProcessorPil(**{k: v for k, v in tower.images.items() if k != "do_center_crop"})


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False
