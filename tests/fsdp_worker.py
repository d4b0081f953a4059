"""Three steps of a tiny model of each variant, its weights spread over two processes by FSDP2: prints the losses."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from adallava.hosts.arch import decoder_layers
from tiny import tiny_vlm

BATCH, STEPS, RATE = 4, 3, 0.05


def batch():
    """Four rows of random words with their answers at the end."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(7, 40, (BATCH, 12), generator=generator)
    labels = ids.clone()
    labels[:, :9] = -100
    return {"input_ids": ids, "labels": labels, "seeds": torch.arange(BATCH)}


def train(vlm, rows):
    """Losses of a few steps of plain gradient descent on some rows."""
    losses = []
    inputs = {name: value[rows] for name, value in batch().items()}
    for step in range(STEPS):
        loss = vlm(**{**inputs, "seeds": inputs["seeds"] + BATCH * step}).loss
        loss.backward()
        with torch.no_grad():
            for weight in vlm.parameters():
                if weight.grad is not None:
                    weight -= RATE * weight.grad
                    weight.grad = None
        losses.append(loss.detach())
    return losses


def main():
    """Run on this process's half of the rows and print the mean loss of all processes."""
    dist.init_process_group("gloo")
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for variant in "LH":
        vlm = tiny_vlm(variant=variant).train()
        for layer in decoder_layers(vlm.model):
            fully_shard(layer, mesh=mesh)
        fully_shard(vlm, mesh=mesh)
        assert all(isinstance(weight, DTensor) for weight in vlm.parameters()), "every weight is spread"
        losses = torch.stack(train(vlm, slice(2 * rank, 2 * rank + 2)))
        dist.all_reduce(losses)
        if rank == 0:
            print("losses", variant, *(losses / 2).tolist(), flush=True)
    dist.barrier()  # who goes first breaks the other's connections
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
