"""What is said about wrong settings: the key as it was typed, what was probably meant, and no library's words."""

from __future__ import annotations

import pytest
from padfree.recipes import RecipeError, load


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("optimizer.lrr=0.1", "optimizer.lrr: did you mean optimizer.lr?"),
        ("optimiser.lr=0.1", "optimiser.lr: did you mean optimizer.lr?"),
        ("lr=0.1", "lr: did you mean optimizer.lr?"),
        ("epochs=3", "epochs: did you mean training.epochs?"),
        ("optimizer.epochs=3", "optimizer.epochs: did you mean training.epochs?"),
        ("training.epoch=3", "training.epoch: did you mean training.epochs?"),
        ("data.skip_corupt=true", "data.skip_corupt: did you mean data.skip_corrupt?"),
        ("optimizer={name: sgd, lr: 1, lrr: 1}", "optimizer.lrr: did you mean optimizer.lr?"),
        (
            "optimizer={name: adamw, lr: 1, momentum: 0.9}",
            "optimizer.momentum: no such setting; there are ",
        ),
        ("colour=blue", "colour: no such setting; there are about, model, "),
        ("optimizer.name=adam", "optimizer.name: no 'adam'; did you mean adamw?"),
        ("schedule.name=exponential", "schedule.name: no 'exponential'; there are step, cosine"),
        ("optimizer={lr: 1}", "optimizer.name: is not there"),
        ("optimizer={name: sgd}", "optimizer.lr: field required"),
        ("conversion.merge=norms", "conversion.merge: no 'norms'; did you mean norm?"),
        ("data.dataset=cifar", "data.dataset: no 'cifar'; did you mean cifar10?"),
        ("optimizer.lr=.inf", "optimizer.lr: input should be a finite number (it is inf)"),
        ("optimizer.lr=-.inf", "optimizer.lr: input should be a finite number (it is -inf)"),
        ("optimizer.lr=.nan", "optimizer.lr: input should be a finite number (it is nan)"),
        ("optimizer.lr=nan", "optimizer.lr: input should be a finite number"),
        ("optimizer.lr=1e999", "optimizer.lr: input should be a finite number"),
        ("training.clip_norm=.inf", "training.clip_norm: input should be a finite number"),
        ("training.epochs=.inf", "training.epochs: input should be a valid integer"),
        ("model.arguments.x=.inf", "model.arguments: input should be finite numbers, and inf is among them"),
        ("model.arguments={a: [{b: .nan}]}", "model.arguments: input should be finite numbers, and nan is among them"),
        ("data.train=[{Resize: {size: .inf}}]", "data.train.0.Resize: input should be finite numbers"),
    ],
)
def test_a_wrong_change_is_told_by_its_key(change: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load("digits/resnet20", [change])
    message = str(caught.value)
    assert message.startswith(f"digits/resnet20 with {change}: 1 fault: {words}")
    assert "/library/" not in message and "site-packages" not in message and ".sgd." not in message


def test_settings_that_are_repeated_many_times_over_are_looked_at_once() -> None:
    layers = ["a0: &a0 [1, 1]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 60))]
    with pytest.raises(RecipeError, match=r"model\.arguments: input should be finite numbers"):
        load("digits/resnet20", ["model.arguments={" + ", ".join([*layers, "end: .inf"]) + "}"])
