"""Three steps of a tiny model of each variant under DeepSpeed's ZeRO-3, in two processes: prints the losses."""

import copy

import deepspeed
import torch
import torch.distributed as dist

from adallava.training.run import ZERO3
from fsdp_worker import BATCH, RATE, STEPS, batch
from tiny import tiny_vlm


def config():
    """The recipes' own settings, with the numbers that transformers fills in for "auto", for plain gradient descent."""
    made = copy.deepcopy(ZERO3)
    made |= {"train_micro_batch_size_per_gpu": BATCH // 2, "train_batch_size": BATCH, "gradient_accumulation_steps": 1}
    made |= {"bf16": {"enabled": False}, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True}
    # No weight is small enough to stay whole, and there is nothing to overlap with on a CPU.
    made["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "overlap_comm": False}
    made["zero_optimization"] |= {"reduce_bucket_size": 10_000, "stage3_prefetch_bucket_size": 10_000}
    return made


def main():
    """Run on this process's half of the rows and print the mean loss of all processes."""
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    inputs = {name: value[2 * rank : 2 * rank + 2] for name, value in batch().items()}
    for variant in "LH":
        vlm = tiny_vlm(variant=variant).train()
        optimizer = torch.optim.SGD(vlm.parameters(), lr=RATE)
        engine, *_ = deepspeed.initialize(model=vlm, optimizer=optimizer, config=config())
        assert all(hasattr(weight, "ds_id") and weight.numel() == 0 for weight in vlm.parameters()), "all are spread"
        losses = []
        for step in range(STEPS):
            loss = engine(**{**inputs, "seeds": inputs["seeds"] + BATCH * step}).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.detach())
        told = torch.stack(losses)
        dist.all_reduce(told)
        if rank == 0:
            print("losses", variant, *(told / 2).tolist(), flush=True)
    dist.barrier()  # who goes first breaks the other's connections
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
