"""The FALCON loss in a Lightning module.

    pip install lightning
    python examples/lightning_loop.py --steps 400

Network, views and evaluation are those of pytorch_loop.py, which lies next to this file.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from pytorch_loop import TRAIN, build, digit_images, judge, random_view
from torch.utils.data import DataLoader, TensorDataset


class Falcon(lightning.LightningModule):
    """Backbone, projector and loss. The dictionary is part of the loss and not of the checkpoint: its seed stands for it."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        # Over several processes the prior should be over all of them: pass build(group=torch.distributed.group.WORLD) in setup().
        self.network, self.criterion = build()

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        _, embeddings = self.network(torch.cat([random_view(batch[0]), random_view(batch[0])]))
        out = self.criterion(*embeddings.chunk(2))
        self.log_dict({"prior": out.prior, "invariance": out.invariance, "codes": out.codes_used.float()})
        return out.loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    """Train and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()

    lightning.seed_everything(0)
    images = TensorDataset(digit_images()[0][:TRAIN])
    loader = DataLoader(images, batch_size=arguments.batch_size, shuffle=True, drop_last=True)
    module = Falcon(arguments.steps)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    lightning.Trainer(max_steps=arguments.steps, accelerator="cpu", devices=1, **quiet).fit(module, loader)  # type: ignore[arg-type]
    print(f"trained: {judge(module.network, module.criterion)}")


if __name__ == "__main__":
    main()
