"""Train a 2:4 classifier of digits with Lightning, and load a checkpoint of it as a dense model.

python examples/lightning_trainer.py [OUT [EPOCHS]]    needs nm-sparsity[integrations] and scikit-learn; seconds
"""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, random_split

from nm_sparsity import verify
from nm_sparsity.core.integrations.lightning import NMSparsity

out, epochs = sys.argv[1] if len(sys.argv) > 1 else "runs/digits", int(sys.argv[2]) if len(sys.argv) > 2 else 20


class Classifier(L.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
        self.head = nn.Linear(256, 10)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return cross_entropy(self.head(self.net(batch[0])), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("accuracy", (self.head(self.net(batch[0])).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


L.seed_everything(0)
digits = load_digits()
images = TensorDataset(torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target))
train, test = random_split(images, [0.8, 0.2])

# A decay strength (lambda * sum of the learning rates) of about 6, as in the paper's ImageNet run.
decay = 6 / (0.1 * epochs * len(train) / 64)
keep = ModelCheckpoint(out, filename="digits", enable_version_counter=False)
trainer = L.Trainer(max_epochs=epochs, callbacks=[NMSparsity("2:4", decay=decay, exclude=["head"]), keep], logger=False)
trainer.fit(Classifier(), DataLoader(train, 64, shuffle=True), DataLoader(test, 360))

print(f"accuracy: {trainer.callback_metrics['accuracy']:.3f}")
print(verify(Path(out) / "digits.ckpt", "2:4"))
dense = Classifier.load_from_checkpoint(Path(out) / "digits.ckpt")  # the sparse weights, in plain layers
print(f"zeros of the first layer: {(dense.net[0].weight == 0).float().mean():.2f}")
