"""What a recipe file may say, validated by pydantic; unknown keys are faults.

A recipe is read top to bottom: the source model, how it is converted, the data, the optimiser, the
schedule, the training run, and the figures that the paper published. Settings: the paper, "Training
settings".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from .figures import Figures
from .sections import Arguments, NonNegativeInt, PositiveInt, Section
from .transforms import TRANSFORMS

Builder = Literal[
    "bsconv", "bsconv-mobilenetv3", "torchvision", "timm", "timm-ghostnet", "networks", "parc-mobilenetv2", "small"
]
NAMED_BUILDERS = ("bsconv", "torchvision", "timm", "networks", "small")
BUNDLED = ("digits", "mnist5k", "photos")  # data sets that come inside packages, and need no folder


class ModelSpec(Section):
    """The source model.

    Attributes:
        builder: who makes it.
        name: the model's name there (bsconv, torchvision, timm, networks and small).
        arguments: further keyword arguments of the builder.
        strides: modules whose stride is set after building, by path (small inputs).
        num_classes: logits, at least 2.
        input_side: pixels of the square input.
    """

    builder: Builder
    name: str | None = None
    arguments: Arguments = Field(default_factory=dict)
    strides: dict[str, PositiveInt] = Field(default_factory=dict)
    num_classes: Annotated[int, Field(strict=True, ge=2)]
    input_side: PositiveInt

    @model_validator(mode="after")
    def _name_where_needed(self) -> ModelSpec:
        if (self.builder in NAMED_BUILDERS) != (self.name is not None):
            verb = "needs" if self.name is None else "takes no"
            raise ValueError(f"builder {self.builder} {verb} model.name")
        return self


class ConversionSpec(Section):
    """Options of `padfree.convert`, and rules beyond its own four (`parc`, from this package)."""

    merge: Literal["activation", "norm", "conv"] = "activation"
    pool: Literal["3x3", "kernel"] = "3x3"
    projection: Literal["depthwise", "dense"] = "depthwise"
    stem_residual: bool = False
    extra_rules: tuple[Literal["parc"], ...] = ()


class EfficientFormerSpec(Section):
    """The comparison: blocks replaced by EfficientFormerV2's downsampling, by path; which attend."""

    blocks: tuple[str, ...]
    attention: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _attention_is_a_subset(self) -> EfficientFormerSpec:
        if extra := sorted(set(self.attention) - set(self.blocks)):
            raise ValueError(f"attention lists {extra}, which blocks does not")
        return self


class DataSpec(Section):
    """The data set and what is done to its images.

    Attributes:
        dataset: which loader.
        root: its folder (digits, mnist5k and photos need none).
        download: fetch it there first (CIFAR, Stanford Dogs, and those of timm's readers that can).
        reader: for `timm`: the reader and name, such as `hfids/user/name` or `wds/name`.
        train_split, eval_split: split names (folder: sub-folders; timm: splits).
        train_samples, eval_samples: images per pass of a stream, where its reader cannot tell; crops of photos.
        crop_side: of photos: pixels of a crop, by default the network's input_side.
        grey: of photos: without colours, as three equal channels.
        train, eval: transforms in order, each a name of torchvision.transforms.v2 and its arguments.
        check_images: read every image file once before the first epoch, and refuse those that are damaged.
        skip_corrupt: go on without the damaged ones instead.
        drop_last: leave out the last, smaller batch of an epoch.
        workers: loading processes per training process.
    """

    dataset: Literal["digits", "mnist5k", "photos", "cifar10", "cifar100", "stanford-dogs", "folder", "timm"]
    root: str | None = None
    download: bool = False
    reader: str | None = None
    train_split: str = "train"
    eval_split: str = "val"
    train_samples: PositiveInt | None = None
    eval_samples: PositiveInt | None = None
    crop_side: PositiveInt | None = None
    grey: bool = False
    train: Annotated[tuple[dict[str, Arguments], ...], Field(min_length=1)]
    eval: Annotated[tuple[dict[str, Arguments], ...], Field(min_length=1)]
    check_images: bool = True
    skip_corrupt: bool = False
    drop_last: bool = False
    workers: NonNegativeInt = 0

    @field_validator("train", "eval")
    @classmethod
    def _known_transforms(cls, steps: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for step in steps:
            if len(step) != 1:
                raise ValueError(f"each step is one name with its arguments, not {sorted(step)}")
            if (name := next(iter(step))) not in TRANSFORMS:
                raise ValueError(f"no transform {name!r}; there are {', '.join(TRANSFORMS)}")
        return steps

    @model_validator(mode="after")
    def _source_is_complete(self) -> DataSpec:
        if self.dataset not in BUNDLED and self.root is None and self.reader is None:
            raise ValueError(f"dataset {self.dataset} needs data.root, the folder it lies in")
        if (self.dataset == "timm") != (self.reader is not None):
            raise ValueError("data.reader and dataset: timm go together")
        if self.dataset != "photos" and (self.crop_side is not None or self.grey):
            raise ValueError("data.crop_side and data.grey are settings of dataset photos alone")
        if self.dataset not in ("photos", "timm") and (self.train_samples or self.eval_samples):
            raise ValueError("data.train_samples and data.eval_samples are settings of datasets photos and timm")
        if self.skip_corrupt and not self.check_images:
            raise ValueError("data.skip_corrupt needs data.check_images, which finds them")
        return self


class SGDSpec(Section):
    """torch.optim.SGD."""

    name: Literal["sgd"]
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> SGDSpec:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum over 0; set nesterov: false")
        return self


class AdamWSpec(Section):
    """torch.optim.AdamW."""

    name: Literal["adamw"]
    lr: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)] = 0.01


class StepSpec(Section):
    """The learning rate times `gamma` after each of the listed epochs."""

    name: Literal["step"]
    milestones: tuple[PositiveInt, ...]
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1


class CosineSpec(Section):
    """Half a cosine from the learning rate to `final_fraction` of it, per epoch.

    Attributes:
        final_fraction: what of the learning rate is left at the end.
        offset: the moment of an epoch that its rate is that of: 0 its beginning, 1 its end.
    """

    name: Literal["cosine"]
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    offset: Annotated[float, Field(ge=0, le=1)] = 0.0


class TrainingSpec(Section):
    """The run.

    Attributes:
        epochs: passes over the training data.
        batch_size: images per optimiser step, all processes together.
        orthonormal_weight: weight of the BSConv-S loss (0.1 in the paper, 0 leaves it out).
        condense_before: epochs (from 1, in order) before which learned group convolutions go through a condensing
            stage; an epoch named twice has two.
        lasso_weight: weight of their group lasso (0 leaves it out).
        label_smoothing: of the cross entropy.
        clip_norm: largest gradient norm (none: no clipping).
        ema_decay: decay of the averaged weights that are evaluated then (none: no averaging).
    """

    epochs: PositiveInt
    batch_size: PositiveInt
    orthonormal_weight: Annotated[float, Field(ge=0)] = 0.0
    condense_before: tuple[PositiveInt, ...] = ()
    lasso_weight: Annotated[float, Field(ge=0)] = 0.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None

    @field_validator("condense_before")
    @classmethod
    def _in_order(cls, epochs: tuple[int, ...]) -> tuple[int, ...]:
        if list(epochs) != sorted(epochs):
            raise ValueError(f"stages come in the order of their epochs, not {list(epochs)}")
        return epochs


class StartSpec(Section):
    """Fine-tuning from a trained original (start.py); the learning rate is this section's, step by step.

    Attributes:
        checkpoint: a run folder of variant original, a checkpoint in one, or a file of weights.
        init: of the new layers: "preserve" keeps what the network does, "fresh" are torch's initial values.
        calibrate: fit the converted network to unlabelled training images before it is trained.
        batches: of 64 images, for that.
        lr: highest learning rate; by default a tenth of the optimizer's for one epoch, a third of it for more.
        warmup_steps: optimiser steps until it is reached; from there on half a cosine leads to 0.
    """

    checkpoint: str
    init: Literal["preserve", "fresh"] = "preserve"
    calibrate: bool = False
    batches: PositiveInt = 20
    lr: Annotated[float, Field(gt=0)] | None = None
    warmup_steps: NonNegativeInt = 8

    @model_validator(mode="after")
    def _calibration_keeps(self) -> StartSpec:
        if self.calibrate and self.init == "fresh":
            raise ValueError("start.calibrate goes on from start.init: preserve")
        return self


class RecipeData(Section):
    """What a recipe file says; `padfree.recipes.Recipe` adds what can be made of it.

    Attributes:
        name: `<table>/<model>`, or the path of the file.
    """

    name: str
    about: str
    model: ModelSpec
    conversion: ConversionSpec = ConversionSpec()
    efficientformerv2: EfficientFormerSpec | None = None
    data: DataSpec
    optimizer: Annotated[SGDSpec | AdamWSpec, Field(discriminator="name")]
    schedule: Annotated[StepSpec | CosineSpec, Field(discriminator="name")]
    training: TrainingSpec
    start: StartSpec | None = None
    figures: Figures | None = None
