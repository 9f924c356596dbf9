"""The FALCON loss in several processes: DistributedDataParallel, BatchNorm over all processes, and the group passed to the loss.

    torchrun --nproc-per-node 2 examples/ddp_loop.py --steps 400

Runs on CPUs with gloo. For GPUs use nccl, one device for each process. Network, views and evaluation are those of
pytorch_loop.py, which lies next to this file.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from pytorch_loop import TRAIN, build, digit_images, judge, random_view
from torch.nn.parallel import DistributedDataParallel

from falcon_fast.models.batchnorm import sync_batchnorm


def main() -> None:
    """Train in all processes; process 0 judges."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together")
    arguments = parser.parse_args()

    dist.init_process_group("gloo")
    rank, world_size, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    assert group is not None
    torch.manual_seed(0)  # the same weights in every process
    network, criterion = build(group)  # the prior's mean assignment is over all processes
    sync_batchnorm(network, group)  # and so are BatchNorm's statistics
    parallel = DistributedDataParallel(network)  # averages the gradients
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, arguments.steps)

    images = digit_images()[0][:TRAIN]
    torch.manual_seed(1 + rank)  # different images and views in every process
    for step in range(1, arguments.steps + 1):
        batch = images[torch.randint(len(images), (arguments.batch_size // world_size,))]
        _, embeddings = parallel(torch.cat([random_view(batch), random_view(batch)]))
        loss, _, _, codes_used = criterion(*embeddings.chunk(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if rank == 0 and (step % 50 == 0 or step == arguments.steps):
            print(f"step {step}: {codes_used} codes in use over {world_size} processes", flush=True)
    # Every process must have the same weights: the sum of all of them says so.
    total = sum(p.detach().double().sum() for p in network.parameters())
    assert isinstance(total, torch.Tensor)
    totals = [torch.zeros_like(total) for _ in range(world_size)]
    dist.all_gather(totals, total)
    assert all(torch.equal(each, total) for each in totals), "the processes have drifted apart"
    if rank == 0:
        print(f"trained: {judge(network, criterion)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
