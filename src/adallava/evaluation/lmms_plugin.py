"""AdaLLaVA as a chat model of lmms-eval, found through the entry point ``lmms_eval.models``.

    lmms-eval --model adallava --model_args pretrained=mini-L,budget=85% --tasks pope --batch_size 8

Beside lmms-eval's own results a side file tells what each sample cost and took, and which plan it ran.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import TokenCounts
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger

from adallava.budget import Budget
from adallava.errors import ConfigError, ProfileError
from adallava.evaluation.answering import Answering
from adallava.evaluation.lmms_chat import DEFAULT_NEW_TOKENS, ChatModel
from adallava.evaluation.modes import NO_MODE, PlanMode
from adallava.evaluation.preflight import check_budgets, check_selections
from adallava.evaluation.samples import SampleFile
from adallava.evaluation.tasks import OnBatch, TaskRun
from adallava.hosts.answer import Answer
from adallava.hosts.model import AdaptiveVLM
from adallava.hosts.prompts import Request
from adallava.selection import describe_selector, parse_selector


class AdaLLaVA(ChatModel[Answer]):
    """One model at one budget."""

    def __init__(
        self,
        pretrained: str | AdaptiveVLM = "mini-L",
        budget: object = "100%",
        mode: str = "learned",
        token_selection: str | None = None,
        seed: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        samples: str | None = None,
        on_batch: OnBatch | None = None,
    ) -> None:
        """Load a model, or take one, to answer at ``budget``.

        pretrained: shipped name, folder or hub id. mode: who decides the plans, see ``PlanMode``; seed: draws random
        ones. samples: the side file, "none" for none; by default a new one, named after model, budget and time.
        on_batch: see ``ChatModel``. Raises what ``from_pretrained`` raises, ``BudgetError``, ``ConfigError``, and
        ``ResultExistsError`` for a side file that exists.
        """
        super().__init__(batch_size, device, max_new_tokens, on_batch)
        self.budget, self.seed = Budget.parse(_unquoted(budget)), seed
        selection, chosen = _unquoted(token_selection), PlanMode.parse(_unquoted(mode))
        self._lent = isinstance(pretrained, AdaptiveVLM)
        if isinstance(pretrained, AdaptiveVLM):
            vlm, label = pretrained, "model"
        else:
            extra = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
            where = str(self.accelerator.device) if self._world_size > 1 else device
            vlm, label = AdaptiveVLM.from_pretrained(pretrained, device=where, dtype=dtype, **extra), pretrained
        if self.budget.unit == "share" and vlm.adaptive_config is not None:
            check_budgets(label, vlm.adaptive_config, [self.budget])
        elif self.budget.unit == "share" and self.budget.fraction != 1:
            raise ConfigError(f"{label} is a base model and runs at 100% only. Leave out the budget.")
        if selection is not None:
            check_selections(label, vlm.model, vlm.adaptive_config, [selection])
        # Passed with each request: a model that was lent keeps its own.
        self.selector = vlm.token_selection if selection is None else parse_selector(selection)
        self.mode = chosen if vlm.adaptive_config is not None else None
        # In a list, because lmms-eval deletes every module that it finds among a model's attributes.
        self._vlm = [vlm]
        self._answering: dict[str, Answering] = {}
        self._look_for_profile()
        about = {
            "model": label,
            "budget": str(self.budget),
            "mode": str(self.mode or NO_MODE),
            "token_selection": describe_selector(self.selector),
        }
        self.samples = None if samples == "none" else SampleFile(self._path(samples, label), about)
        self.run = replace(TaskRun.of(vlm), failures=self.failures)
        # Of the requests since lmms-eval was last told: answers, failures, tokens, seconds, FLOPs as shares.
        self._new = dict.fromkeys(("answers", "failed", "tokens", "seconds", "flops"), 0.0)

    @property
    def vlm(self) -> AdaptiveVLM:
        """The model; gone after an evaluation that lmms-eval loaded it for."""
        return self._vlm[0]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.vlm.device if self._vlm else self.accelerator.device

    def clean(self) -> None:
        """Give the memory back for a judge that runs here; a model that was lent stays."""
        if not self._lent:
            self._vlm.clear()
            self._answering.clear()
            gc.collect()
            torch.cuda.empty_cache()

    def answer(self, requests: Sequence[Request], options: dict[str, Any], task: str) -> list[Answer | Exception]:
        """Answer them together, at the budget."""
        noise = f"{task}/{self.budget}/{self.seed}/{self._rank}"
        answering = self._answering.setdefault(task, Answering(self.vlm, self.mode, noise))
        started = time.perf_counter()
        options = {**options, "token_selection": self.selector}
        answers = answering([replace(request, budget=self.budget) for request in requests], options)
        self._new["seconds"] += time.perf_counter() - started
        return answers

    def result(self, answer: Answer) -> tuple[str, TokenCounts | None]:
        """The text, and tokens of prompt and answer."""
        made = len(self.vlm.processor.tokenizer(answer.text, add_special_tokens=False)["input_ids"])
        self._new["tokens"] += made
        return answer.text, TokenCounts(answer.prompt_tokens, made)

    def took(self, which: dict[str, Any], answer: Answer | Exception, rows: int) -> None:
        """Count what it cost, and tell the side file."""
        self._new["answers" if isinstance(answer, Answer) else "failed"] += 1
        if isinstance(answer, Answer):
            self.run.add_cost(answer)
            self._new["flops"] += answer.cost.frac
        if self.samples is not None:
            self.samples.add(which, answer, rows)

    def finished(self) -> None:
        """Give lmms-eval the numbers beside the score, of all processes together."""
        told = torch.tensor(list(self._new.values()), dtype=torch.float64, device=self.device)
        if self._world_size > 1 and torch.distributed.is_initialized():
            torch.distributed.all_reduce(told)
        answers, failed, tokens, seconds, flops = told.tolist()
        seconds /= self._world_size
        self._new = dict.fromkeys(self._new, 0.0)
        numbers = {"failed_samples": failed, "flops_frac": flops / answers if answers else 0.0}
        log_metrics(
            total_gen_tokens=int(tokens),
            total_elapsed_time=seconds,
            avg_speed=tokens / seconds if seconds else 0.0,
            additional_metrics=numbers,
        )

    def _look_for_profile(self) -> None:
        """Times are foretold where this device is calibrated; a budget in time says itself what is missing."""
        try:
            self.vlm.profiles.get(self.vlm, self.selector, self.budget if self.budget.timed else "in time")
        except ProfileError as error:
            if self.budget.timed:
                raise
            logger.info(f"times are measured, and not foretold: {error}")

    def _path(self, samples: str | None, label: str) -> Path:
        if samples is None:
            name = f"{Path(label).name}-{self.budget}-{datetime.now():%Y%m%d-%H%M%S}".replace("/", "-").replace(" ", "")
            samples = f"adallava-samples-{name}.jsonl"
        path = Path(samples)
        return path.with_name(f"{path.stem}.rank{self._rank}{path.suffix}") if self._world_size > 1 else path


def _unquoted(value: Any) -> Any:
    """An argument without the quotes that keep its commas together on lmms-eval's command line."""
    return value.strip("\"'") if isinstance(value, str) else value
