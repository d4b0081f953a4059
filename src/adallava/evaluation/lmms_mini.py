"""The mini benchmark as tasks of lmms-eval: for its other models, and to see that ours give the same there.

A folder gets one task per family, its questions and pictures in a parquet file. lmms-eval reads it with
``--include_path FOLDER``, and ``adallava sweep`` with ``--tasks-folder``.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from adallava.errors import ResultExistsError, UnknownNameError, did_you_mean
from adallava.mini.questions import FAMILIES, Question, benchmark
from adallava.mini.scenes import to_image
from adallava.mini.scoring import score

PREFIX = "adallava_mini_"
METRIC = "adallava_score"
# Room for the longest right answer with any tokenizer.
_NEW_TOKENS = {"description": 192}
_OTHER_NEW_TOKENS = 48
_TASK = """task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_visual: !function functions.doc_to_visual
doc_to_text: !function functions.doc_to_text
doc_to_target: answer
process_results: !function functions.process_results
generation_kwargs:
  max_new_tokens: {tokens}
  do_sample: false
  temperature: 0
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
metadata:
  - version: 1.0
  - seed: {seed}
"""
_FUNCTIONS = '''"""What lmms-eval calls for the tasks of this folder."""

from adallava.evaluation.lmms_mini import doc_to_text, doc_to_visual, process_results

__all__ = ["doc_to_text", "doc_to_visual", "process_results"]
'''


def export(folder: Path, families: Sequence[str], seed: int, limit: int) -> list[str]:
    """Write tasks with ``limit`` questions each into ``folder`` and return their names.

    Raises ``UnknownNameError`` for a family, ``ResultExistsError`` for a task that is there already.
    """
    from datasets import Dataset, Features, Value, disable_progress_bars
    from datasets import Image as ImageFeature

    for family in families:
        if family not in FAMILIES:
            known = did_you_mean(family, FAMILIES)
            raise UnknownNameError(f"there is no family {family!r}; known: {', '.join(FAMILIES)}.{known}")
        if (folder / f"{PREFIX}{family}.yaml").exists():
            raise ResultExistsError(f"{folder} has the task {PREFIX}{family} already. Choose another folder.")
    disable_progress_bars()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "functions.py").write_text(_FUNCTIONS, encoding="utf-8")
    text = Value("string")
    columns = {"id": Value("int32"), "image": ImageFeature(), "question": text, "answer": text, "family": text}
    for family in families:
        name, data = PREFIX + family, folder.resolve() / f"{PREFIX}{family}.parquet"
        documents = [
            {
                "id": number,
                "image": {"bytes": _png(to_image(item.scene)), "path": None},
                "question": item.question.text,
                "answer": item.question.answer,
                "family": family,
            }
            for number, item in enumerate(benchmark(family, seed, limit))
        ]
        Dataset.from_list(documents, features=Features(columns)).to_parquet(str(data))
        tokens = _NEW_TOKENS.get(family, _OTHER_NEW_TOKENS)
        task = _TASK.format(name=name, data=data, tokens=tokens, metric=METRIC, seed=seed)
        (folder / f"{name}.yaml").write_text(task, encoding="utf-8")
    return [PREFIX + family for family in families]


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# -- what lmms-eval calls ---------------------------------------------------------------------------------------------


def doc_to_visual(document: dict[str, Any]) -> list[Image.Image]:
    """The picture of a question."""
    return [document["image"].convert("RGB")]


def doc_to_text(document: dict[str, Any], lmms_eval_specific_kwargs: dict[str, Any] | None = None) -> str:
    """The question as the mini models know it."""
    return str(document["question"])


def process_results(document: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The score of an answer, in [0, 1]."""
    question = Question(document["family"], document["question"], document["answer"])
    return {METRIC: score(question, results[0])}
