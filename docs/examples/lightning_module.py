"""A module of Lightning trained by fastopt's AdamW: only the import of the optimizer is another.

    pip install lightning
    python docs/examples/lightning_module.py

What Lightning does around an optimizer stays as it is: the schedule, ``gradient_clip_val``, precision
"bf16-mixed", checkpoints. Training is stopped in the middle here and goes on from the checkpoint, with a new
module, a new optimizer and a new trainer; it ends where the training that was never stopped ends.
"""

import tempfile

import lightning
import torch

from fastopt.torch import AdamW  # was: from torch.optim import AdamW


class Classifier(lightning.LightningModule):
    """Three layers; losses: the loss of each step."""

    def __init__(self, optimizer=AdamW, steps=1_000, width=128, lr=3e-3):
        super().__init__()
        self.make_optimizer, self.steps, self.lr = optimizer, steps, lr
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(20, width), torch.nn.ReLU(),
            torch.nn.Linear(width, width), torch.nn.ReLU(),
            torch.nn.Linear(width, 5),
        )  # fmt: skip
        self.losses = []

    def training_step(self, batch, number):
        loss = torch.nn.functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = self.make_optimizer(self.parameters(), lr=self.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.steps, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_batches(samples, batch):
    """Samples in five classes, which a network drawn at random tells apart."""
    torch.manual_seed(1)
    x = torch.randn(samples, 20)
    truth = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.Tanh(), torch.nn.Linear(30, 5))
    with torch.no_grad():
        classes = truth(x).argmax(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, classes), batch_size=batch)


def fit(module, batches, epochs, folder, precision, checkpoint=None):
    """Train up to so many epochs; returns the trainer."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        gradient_clip_val=1.0,
        precision=precision,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, batches, ckpt_path=checkpoint)
    return trainer


def main(
    optimizer: type[torch.optim.Optimizer] = AdamW,
    samples: int = 10_000,
    batch: int = 100,
    epochs: int = 6,
    width: int = 128,
    precision: str = "bf16-mixed",
):
    """Train at once, and with a stop in the middle; returns the losses of both."""
    batches = make_batches(samples, batch)
    steps = epochs * len(batches)

    def module():
        torch.manual_seed(0)
        return Classifier(optimizer, steps, width)

    whole, first, second = module(), module(), module()
    with tempfile.TemporaryDirectory() as folder:
        fit(whole, batches, epochs, folder, precision)
        fit(first, batches, epochs // 2, folder, precision).save_checkpoint(f"{folder}/middle.ckpt")
        fit(second, batches, epochs, folder, precision, f"{folder}/middle.ckpt")
    resumed = first.losses + second.losses
    print(f"{'step':>6}{'at once':>10}{'resumed':>10}")
    for k in range(0, steps, max(1, steps // 10)):
        print(f"{k:6}{whole.losses[k]:10.5f}{resumed[k]:10.5f}")
    return whole.losses, resumed


if __name__ == "__main__":
    main()
