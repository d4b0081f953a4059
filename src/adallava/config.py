"""What makes one model adaptive: ``AdaptiveConfig``, the contents of ``adaptive_config.json``.

It holds the sizes of the host's decoder and how it is cut into switches, and from these derives every count that
budgets, plans and the scheduler need. It is plain data without torch or transformers, so that budgets and costs can
be computed where no model is at hand.

Words: the first ``prefix_layers`` layers always run; the layers after them are the *tail*. A *switch* is the unit
that can be off: one tail layer (variant "L"), or ``heads_per_switch`` attention heads of one tail layer with the same
share of its MLP neurons (variant "H"). A *gate column* ("group") is the finest piece a plan can name: one key/value
head with the query heads that share it, because a grouped-query group cannot be split.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adallava.errors import ConfigError, did_you_mean

FORMAT_VERSION = 1
VARIANTS = ("L", "H")
TOKEN_SELECTIONS = ("none", "prumerge", "prumerge+", "fastv", "random", "uniform")
DEFAULT_HEADS_PER_SWITCH = 8


@dataclass(frozen=True)
class AdaptiveConfig:
    """How one decoder is cut into switches; raises ``ConfigError`` for values that contradict each other."""

    variant: str
    """What a switch is: "L" one layer, "H" a group of attention heads with its share of MLP neurons."""
    num_layers: int
    """Decoder layers of the host (N)."""
    num_heads: int
    """Attention (query) heads per layer (H)."""
    num_kv_heads: int
    """Key/value heads per layer; equals num_heads without grouped-query attention."""
    hidden_size: int
    """Width of the residual stream (D)."""
    prefix_layers: int
    """Layers at the start that always run (P); at least 1 and fewer than num_layers."""
    heads_per_switch: int = DEFAULT_HEADS_PER_SWITCH
    """Variant H: attention heads per switch ("scheduler_rank" in released checkpoints). Ignored for variant L."""
    tau: float = 5.0
    """Gumbel-Softmax temperature of training; it smooths the gradient and does not change what is drawn."""
    latency_dim: int = 256
    """Number of sin/cos features that encode the budget; even."""
    token_selection: str = "none"
    """Visual token selection: a name with its settings, if any, such as "prumerge+" or "fastv:layer=3,ratio=0.75"."""
    base_model: str | None = None
    """Name or folder of the base model, for a folder that holds the adaptive parts only."""
    format_version: int = FORMAT_VERSION
    """Version of this file format."""

    def __post_init__(self) -> None:
        """Check every field; raise ``ConfigError`` naming the value, what was expected and the remedy."""
        _check_version(self.format_version)
        if self.variant not in VARIANTS:
            raise ConfigError(f"variant is {self.variant!r}, expected one of {', '.join(map(repr, VARIANTS))}.")
        for name in ("num_layers", "num_heads", "num_kv_heads", "hidden_size", "prefix_layers", "latency_dim"):
            _check_positive_int(name, getattr(self, name))
        self._check_layers_and_heads()
        if self.variant == "H":
            self._check_heads_per_switch()
        self._check_rest()

    def _check_layers_and_heads(self) -> None:
        if self.prefix_layers >= self.num_layers:
            raise ConfigError(
                f"prefix_layers is {self.prefix_layers} and num_layers is {self.num_layers}: no layer is left to "
                f"switch off. Choose prefix_layers from 1 to {self.num_layers - 1} "
                f"(half, {max(1, self.num_layers // 2)}, is usual)."
            )
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}. "
                "Take both from the host's config (num_attention_heads and num_key_value_heads)."
            )

    def _check_heads_per_switch(self) -> None:
        _check_positive_int("heads_per_switch", self.heads_per_switch)
        valid = valid_heads_per_switch(self.num_heads, self.num_kv_heads)
        if self.heads_per_switch not in valid:
            group = self.num_heads // self.num_kv_heads
            raise ConfigError(
                f"heads_per_switch is {self.heads_per_switch}, but it must divide num_heads ({self.num_heads}) and be "
                f"a multiple of the {group} query heads that share a key/value head, because such a group is never "
                f"split. Choose one of {', '.join(map(str, valid))}."
            )

    def _check_rest(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float):
            raise ConfigError(f"tau is {self.tau!r}, expected a number above 0 (the paper uses 5.0).")
        if not (math.isfinite(self.tau) and self.tau > 0):
            raise ConfigError(f"tau is {self.tau!r}, expected a finite number above 0 (the paper uses 5.0).")
        object.__setattr__(self, "tau", float(self.tau))
        if self.latency_dim % 2:
            raise ConfigError(f"latency_dim is {self.latency_dim}, expected an even number: half sines, half cosines.")
        chosen = str(self.token_selection).partition(":")[0]
        if chosen not in TOKEN_SELECTIONS:
            raise ConfigError(
                f"token_selection is {self.token_selection!r}, expected one of "
                f"{', '.join(map(repr, TOKEN_SELECTIONS))}.{did_you_mean(chosen, TOKEN_SELECTIONS)}"
            )
        if self.base_model is not None and not isinstance(self.base_model, str):
            raise ConfigError(f"base_model is {self.base_model!r}, expected a name or folder as text, or None.")

    # -- counts -----------------------------------------------------------------------------------------------------

    @property
    def tail_layers(self) -> int:
        """Layers after the prefix, N - P."""
        return self.num_layers - self.prefix_layers

    @property
    def groups(self) -> int:
        """Gate columns per layer (G): the key/value heads, for both variants."""
        return self.num_kv_heads

    @property
    def groups_per_switch(self) -> int:
        """Gate columns that one switch covers: all of them for L."""
        if self.variant == "L":
            return self.groups
        return self.heads_per_switch * self.num_kv_heads // self.num_heads

    @property
    def switches_per_layer(self) -> int:
        """Switches in one layer: 1 for L."""
        return self.groups // self.groups_per_switch

    @property
    def total_switches(self) -> int:
        """Switches of the whole decoder, the prefix included: N for L, N * num_heads / heads_per_switch for H."""
        return self.num_layers * self.switches_per_layer

    @property
    def prefix_switches(self) -> int:
        """Switches that always run."""
        return self.prefix_layers * self.switches_per_layer

    @property
    def max_k(self) -> int:
        """Switches that can be off, which is the largest k."""
        return self.total_switches - self.prefix_switches

    @property
    def num_logits(self) -> int:
        """Outputs of the scheduler's head: N - P for L; (N - P) * 2 * G for H, laid out [layer][G attn | G MLP]."""
        return self.tail_layers if self.variant == "L" else self.tail_layers * 2 * self.groups

    # -- reading and writing ----------------------------------------------------------------------------------------

    @classmethod
    def from_model_config(
        cls,
        text_config: Any,
        *,
        variant: str,
        prefix_layers: int | None = None,
        heads_per_switch: int | None = None,
        **fields: Any,
    ) -> AdaptiveConfig:
        """Build the config for a host from its text config.

        text_config: anything with Hugging Face's ``num_hidden_layers``, ``num_attention_heads``, ``hidden_size`` and,
            if it has grouped-query attention, ``num_key_value_heads`` (as ``LlavaConfig.text_config``).
        prefix_layers: half of the layers when None, as in the paper.
        heads_per_switch: ``default_heads_per_switch`` of the host when None.
        fields: further fields of ``AdaptiveConfig``.
        """
        sizes: dict[str, Any] = {}
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            sizes[name] = getattr(text_config, name, None)
            if sizes[name] is None:
                raise ConfigError(
                    f"{type(text_config).__name__} has no {name}; expected the config of the language model. "
                    "Pass config.text_config (or config.get_text_config()) of a vision-language model."
                )
        heads = sizes["num_attention_heads"]
        kv_heads = getattr(text_config, "num_key_value_heads", None) or heads
        return cls(
            variant=variant,
            num_layers=sizes["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            hidden_size=sizes["hidden_size"],
            prefix_layers=max(1, sizes["num_hidden_layers"] // 2) if prefix_layers is None else prefix_layers,
            heads_per_switch=default_heads_per_switch(heads, kv_heads)
            if heads_per_switch is None
            else heads_per_switch,
            **fields,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> AdaptiveConfig:
        """Inverse of ``to_dict``; raise ``ConfigError`` for unknown or missing keys, or another format version."""
        if not isinstance(data, dict):
            raise ConfigError(f"expected a JSON object with the fields of AdaptiveConfig, got {type(data).__name__}.")
        # The version comes first: a file of another format also has other keys, and the version explains them.
        _check_version(data.get("format_version", FORMAT_VERSION))
        known = {field.name: field for field in dataclasses.fields(cls)}
        for key in data:
            if key not in known:
                raise ConfigError(
                    f"unknown key {key!r} in an adaptive config.{did_you_mean(key, known)} "
                    f"Remove it or use one of: {', '.join(known)}."
                )
        required = [name for name, field in known.items() if field.default is dataclasses.MISSING]
        if missing := [name for name in required if name not in data]:
            raise ConfigError(f"an adaptive config lacks {', '.join(missing)}. Add what is missing.")
        return cls(**data)

    def to_json_file(self, path: str | Path) -> None:
        """Write the config as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> AdaptiveConfig:
        """Read a config that ``to_json_file`` wrote; a ``ConfigError`` names the file."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is not JSON ({error}). Write it again with to_json_file.") from error
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error


def valid_heads_per_switch(num_heads: int, num_kv_heads: int) -> list[int]:
    """Return the sizes a switch may have, ascending: whole key/value groups that divide the layer evenly."""
    group = num_heads // num_kv_heads
    return [group * n for n in range(1, num_kv_heads + 1) if num_kv_heads % n == 0]


def default_heads_per_switch(num_heads: int, num_kv_heads: int) -> int:
    """Return 8, the paper's choice, where a layer then has two switches or more; otherwise aim at four switches."""
    valid = valid_heads_per_switch(num_heads, num_kv_heads)
    if DEFAULT_HEADS_PER_SWITCH in valid and num_heads >= 2 * DEFAULT_HEADS_PER_SWITCH:
        return DEFAULT_HEADS_PER_SWITCH
    return max((size for size in valid if num_heads // size >= 4), default=valid[0])


def _check_version(version: object) -> None:
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"format_version is {version!r}, but this adallava reads format_version {FORMAT_VERSION}. "
            "Install the adallava that wrote the file, or write the file again with this one."
        )


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        reason = ""
        if name == "prefix_layers":
            reason = " Layer 0 always runs: masks and positions come from its cache."
        raise ConfigError(f"{name} is {value!r}, expected a whole number of 1 or more.{reason}")
