"""Train a 2:4 sparse network from scratch on scikit-learn's digits, and check what comes out.

python examples/from_scratch.py            needs scikit-learn; seconds on a CPU
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn

from nm_sparsity import decay_strength, finalize, sparsify, verify

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--pattern", default="2:4")
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
order = torch.randperm(len(images))
train, test = order[:-360], order[-360:]
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

# A decay strength (lambda * sum of the learning rates) of about 6, as in the paper's ImageNet run; the cosine schedule
# halves the sum.
batch, lr = 64, 0.1
steps = args.epochs * (len(train) // batch)
print(sparsify(model, args.pattern, method="sr-ste", decay=6 / (lr * steps / 2), exclude=["4"]))

optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
for _ in range(args.epochs):
    for rows in train[torch.randperm(len(train))].split(batch)[: len(train) // batch]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        schedule.step()


def accuracy() -> float:
    """The part of the test images that the model gets right."""
    with torch.no_grad():
        return float((model(images[test]).argmax(1) == labels[test]).float().mean())


trained = accuracy()
print(f"decay strength {decay_strength(model):.2f}")
finalize(model)
print(verify(model, args.pattern))
assert accuracy() == trained
print(f"test accuracy {trained:.1%}, the same after finalize")
