"""A small CNN on Fashion-MNIST with Lightning, on MPI ranks that exchange compressed messages with neighbors.

    mpicomp data fetch fashion_mnist                                      # into $MPICOMP_DATA, or ./data
    mpiexec -n 4 python lightning_fashion_mnist.py                        # a minute and a half on 2 cores
    mpiexec -n 4 python lightning_fashion_mnist.py --resume               # continue after a kill, or with more --epochs

Without mpicomp it would be the same script, without ``strategy=gossip``.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy

from mpicomp.algorithms import Choco
from mpicomp.compression import TopK
from mpicomp.data.images import fashion_mnist
from mpicomp.integrations.lightning import GossipStrategy
from mpicomp.topology import ring


class Clothes(LightningModule):
    """Two convolutions and two dense layers with 52,180 parameters."""

    def __init__(self, lr=0.05):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.2), nn.Linear(1568, 30), nn.ReLU(), nn.Linear(30, 10)),
        )
        self.accuracy = Accuracy(task="multiclass", num_classes=10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = nn.functional.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        scores = self.net(images)
        self.accuracy(scores, labels)
        self.log("val_loss", nn.functional.cross_entropy(scores, labels), sync_dist=True, prog_bar=True)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9, nesterov=True)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


def loader(samples, data, **options):
    images = (samples.inputs.float() * data.scale - data.mean[0]) / data.std[0]
    return DataLoader(TensorDataset(images, samples.labels), batch_size=32, **options)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batches", type=int, help="at most as many an epoch")
    parser.add_argument("--out", default="runs/lightning", help="folder for checkpoints and logs")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    arguments = parser.parse_args()

    gossip = GossipStrategy(Choco(gamma=0.3), topology=ring, compressor=TopK(ratio=0.1))
    seed_everything(0)
    data = fashion_mnist(None)
    out = Path(arguments.out)
    trainer = Trainer(
        strategy=gossip,
        accelerator="cpu",
        max_epochs=arguments.epochs,
        limit_train_batches=arguments.batches,
        logger=CSVLogger(out, name="logs"),
        callbacks=[ModelCheckpoint(out, monitor="val_accuracy", mode="max", save_last=True)],
    )
    trainer.fit(
        Clothes(),
        loader(data.train, data, shuffle=True),  # all samples on every rank: Lightning deals them out
        loader(data.test, data),
        ckpt_path=out / "last.ckpt" if arguments.resume else None,
    )
    trainer.test(ckpt_path="best", dataloaders=loader(data.test, data))
    trainer.print(f"rank 0 has sent {gossip.gossip.bytes_sent / 1e6:.1f} MB in messages of training")


if __name__ == "__main__":
    main()
