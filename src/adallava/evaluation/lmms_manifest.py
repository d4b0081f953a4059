"""What the entry point ``lmms_eval.models`` names: our models in lmms-eval. Nothing of it is imported here yet.

lmms-eval reads this while it is being imported itself, so a module that imports it would be found half made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> tuple[ModelManifest, ...]:
    """The chat models ``adallava`` and ``adallava_baseline``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    here = __name__.rpartition(".")[0]
    return (
        ModelManifest("adallava", chat_class_path=f"{here}.lmms_plugin.AdaLLaVA"),
        ModelManifest("adallava_baseline", chat_class_path=f"{here}.lmms_baseline.Baseline"),
    )
