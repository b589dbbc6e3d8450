"""The code of docs/batches.md, run as it stands there."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ferkd_data as fd

DOCUMENT = Path(__file__).parents[2] / "docs/batches.md"


class TwoHeads(nn.Module):
    """As DeiT's: a head for the ground truth, and one for the teacher."""

    def __init__(self, num_classes):
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(3, num_classes) for _ in range(2)])

    def forward(self, images):
        return tuple(head(images.mean(dim=(2, 3))) for head in self.heads)


@pytest.fixture
def batch(label_set, photos, tmp_path):
    loader = fd.CropLoader(
        fd.open_labels(label_set), images=photos, batch_size=8, crops_per_image=2, size=32, cache_dir=tmp_path
    )
    return next(iter(loader))


def test_every_loss_of_the_document_trains(batch):
    images, targets = batch
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    accuracy = re.search(r"`(\(logits[^`]*mean\(\))`", text)[1].replace("\n", " ")
    losses = []
    for code in blocks:
        model = TwoHeads(10)
        logits = model(fd.normalize(images))[0]
        names = {"F": F, "fd": fd, "model": model, "images": images, "targets": targets, "logits": logits, "alpha": 0.5}
        assert 0 <= eval(accuracy, names) <= 1
        exec(textwrap.dedent(code), names)
        names["loss"].backward()
        assert torch.isfinite(names["loss"]) and any(p.grad is not None for p in model.parameters())
        losses.append(names["loss"])
    assert len(losses) == 3
