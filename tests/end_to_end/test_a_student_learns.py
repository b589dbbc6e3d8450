"""A small student trained on real photos with real teachers' labels: loss falls, and it comes to agree with them."""

from __future__ import annotations

import torch
from torch import nn

import ferkd_data as fd
from ferkd_data.demo import write_demo

CROPS, USED, SIZE = 24, 16, 48


def student(num_classes):
    def block(before, after):
        return [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]

    layers = [*block(3, 24), *block(24, 48), *block(48, 96), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(384, num_classes))


def test_a_student_learns(tmp_path):
    demo = write_demo(tmp_path)
    fd.build(demo.photos, tmp_path / "labels", teachers=demo.teachers[:1], classes=demo.classes, crops=CROPS)
    labels = fd.open_labels(tmp_path / "labels", crops=USED)

    def make(labels, **changes):
        settings = {"batch_size": 40, "crops_per_image": 4, "size": SIZE, "cache_dir": tmp_path / "cache"}
        return fd.CropLoader(labels, images=demo.photos, **(settings | changes))

    torch.manual_seed(0)
    model = student(1000)
    optimiser = torch.optim.AdamW(model.parameters(), lr=4e-3)
    loader = make(labels, selfmix=fd.SelfMix(prob=0.3))
    losses = []
    for epoch in range(60):
        loader.set_epoch(epoch)
        for images, targets in loader:
            loss = fd.kl_div(model(fd.normalize(images)), targets)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])

    # Crops that training never drew: those after the first USED of every image.
    model.eval()
    held_out = make(fd.open_labels(tmp_path / "labels"), calibration="fkd", order="sequential")
    held_out.set_epoch(USED // 4)
    agree = total = 0
    with torch.no_grad():
        for epoch in range(USED // 4, CROPS // 4):
            held_out.set_epoch(epoch)
            for images, targets in held_out:
                named = model(fd.normalize(images)).argmax(dim=1)
                agree += int((named == targets.dense().argmax(dim=1)).sum())
                total += len(images)
    assert total == 20 * (CROPS - USED)
    assert agree / total > 0.3
