"""Training runs in a process of its own, for tests that kill it or run two side by side: DATA IMAGES RECIPE..."""

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from adallava.training.recipes import load_recipe
from adallava.training.run import DataPaths, part_together, train_recipe


class KillAt(TrainerCallback):
    """Kills the process with no chance to clean up, in the middle of a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    data, images, *recipes = map(Path, sys.argv[1:])
    callbacks = [KillAt()] if "KILL_AT" in os.environ else []
    for path in recipes:
        train_recipe(load_recipe(str(path)), DataPaths(data, images), path.with_suffix(""), callbacks)
    part_together()
