"""Teachers as people bring them: with several outputs, other sizes, probabilities, or nothing that works."""

from __future__ import annotations

import argparse
import collections
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """10 classes from the mean colours of a 4 x 4 grid, at 32 px."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.preprocessing = {"size": 32, "mean": (0.5,), "std": (0.25,)}
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.head = nn.Linear(48, classes)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(classes, 48, generator=generator) * 2)
            self.head.bias.zero_()

    def forward(self, x: Tensor):
        return self.head(self.pool(x).flatten(1))


def plain():
    return Linear()


def made_on_the_cpu():
    with torch.device("cpu"):
        return Linear()


class Wrapped(Linear):
    """Hands what `give` makes of features and logits on."""

    def __init__(self, give) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: Tensor):
        return self.give(self.pool(x).flatten(1), super().forward(x))


class TrainingMode(Linear):
    """Keeps one layer in training mode, whatever it is told."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor):
        return self.head(self.layer.train()(self.pool(x).flatten(1)))


def dropout_that_stays():
    return TrainingMode(nn.Dropout(0.1))


class OfTheBatch(TrainingMode):
    def forward(self, x: Tensor):
        return self.head(self.layer.train()(self.pool(x)).flatten(1))


def batch_norm_in_training_mode():
    return OfTheBatch(nn.BatchNorm2d(3))


Named = collections.namedtuple("Named", "features logits")


@dataclass
class Answer:
    features: Tensor
    logits: Tensor
    loss: Tensor | None = None


def tuple_of_two():
    return Wrapped(lambda features, logits: (features, logits))


def tuple_of_one():
    return Wrapped(lambda features, logits: (logits,))


def list_of_two():
    return Wrapped(lambda features, logits: [logits, features])


def dict_with_logits():
    return Wrapped(lambda features, logits: {"features": features, "logits": logits})


def dict_without_logits():
    return Wrapped(lambda features, logits: {"features": features, "scores": logits})


def named_tuple():
    return Wrapped(Named)


def a_dataclass():
    return Wrapped(Answer)


def a_text():
    return Wrapped(lambda features, logits: "cat")


def logits_that_are_none():
    return Wrapped(lambda features, logits: {"logits": None})


def a_list_in_logits():
    return Wrapped(lambda features, logits: {"logits": [logits], "other": logits})


def one_dimensional_tail():
    return Wrapped(lambda features, logits: logits[:, :, None, None])


def one_row_for_all():
    return Wrapped(lambda features, logits: logits.mean(dim=0, keepdim=True))


def a_row_less():
    return Wrapped(lambda features, logits: logits[:-1] if len(logits) > 1 else logits)


def features_map():
    return Wrapped(lambda features, logits: features.view(-1, 3, 4, 4))


def percentages():
    return Wrapped(lambda features, logits: 100 * logits.softmax(dim=1))


def best_class():
    return Wrapped(lambda features, logits: logits.argmax(dim=1, keepdim=True))


def probabilities():
    return Wrapped(lambda features, logits: logits.softmax(1))


def half_probabilities():
    return Wrapped(lambda features, logits: logits.softmax(1).to(torch.bfloat16))


def log_probabilities():
    return Wrapped(lambda features, logits: logits.log_softmax(1))


def sigmoid():
    return Wrapped(lambda features, logits: torch.sigmoid(logits))


def features_after_a_relu():
    return Wrapped(lambda features, logits: features.relu())


def another_when_exported():
    return Wrapped(lambda features, logits: logits * (0.5 if torch.compiler.is_exporting() else 1))


def constant():
    return Wrapped(lambda features, logits: logits * 0 + torch.arange(10.0))


def needs_64():
    class Picky(Linear):
        def forward(self, x: Tensor):
            assert x.shape[-1] == 64, f"input is {x.shape[-1]}, the model takes 64"
            return super().forward(x)

    return Picky()


def key_error():
    return Wrapped(lambda features, logits: {}["logits"])


def attribute_error():
    return Wrapped(lambda features, logits: features.no_such_thing)


def parses_arguments():
    argparse.ArgumentParser().parse_args(["--no-such-option"])


def needs_arguments(path):
    return Linear()


def half():
    return Linear().half()


def double():
    return Linear().double()


class Transforms:
    pass


def preprocessing_is_no_dict():
    module = Linear()
    module.preprocessing = Transforms()
    return module


def preprocessing_with_pairs():
    module = Linear()
    module.preprocessing = {"size": (32, 32), "mean": 0.5, "std": [0.25]}
    return module


def preprocessing_not_square():
    module = Linear()
    module.preprocessing = {"size": (32, 48), "mean": 0.5, "std": [0.25]}
    return module


def random_weights():
    module = Linear()
    nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(4), "big")))
    return module
