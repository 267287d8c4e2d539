"""Train a recipe; the same file runs on a CPU, a GPU, several GPUs, or several machines.

    padfree-recipes train digits/resnet20 --variant padfree
    accelerate launch --num_processes 4 -m padfree.recipes.cli train cifar100-first/resnet20
    torchrun --nproc-per-node 8 -m padfree.recipes.cli train imagenet/mobilenetv3-large --mixed-precision bf16

Everything of a run lies in one folder (see checkpoints.py); `--resume` goes on after the last whole
epoch. All randomness of an epoch is a function of the seed and the epoch, so on one CPU process a
resumed run ends bit-equal to one that was never stopped.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from padfree.cli.status import Status, Tell
from padfree.errors import PadfreeError
from padfree.layers.learned_groups import lasso

from .checkpoints import (
    Epoch,
    Progress,
    checkpoints,
    last_whole,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from .condensing import begin_epoch, check_stages
from .console import note
from .evaluate import Scores, evaluate
from .files import write_text
from .loaders import eval_loader, set_epoch, train_loader
from .locks import locked
from .losses import orthonormal_loss
from .models import check_images
from .progress import ProgressBar
from .recipe import Recipe
from .run_folder import open_run
from .schedules import make_optimizer, make_schedule, recompute
from .start import peak, rate, started

CHECK_EVERY = 10  # steps between looks at the loss, which make a GPU wait
SEEDS = 2**31  # below it, a seed plus a process's number is one for every library


class TrainingError(PadfreeError):
    """Training cannot go on."""


@dataclass(frozen=True)
class Run:
    """What to train and how.

    Attributes:
        recipe: the experiment.
        variant: which of its networks.
        seed: of the initial values, the order of the images and their augmentation; 0 .. 2^31 - 1.
        folder: of the run; by default runs/<recipe>/<variant>-seed<seed>.
        resume: go on from the folder's last checkpoint, if it has one.
        mixed_precision: "no", "bf16" or "fp16".
        cpu: leave accelerators alone.
        quiet: no progress.
    """

    recipe: Recipe
    variant: str = "padfree"
    seed: int = 0
    folder: Path | None = None
    resume: bool = False
    mixed_precision: str = "no"
    cpu: bool = False
    quiet: bool = False

    @property
    def path(self) -> Path:
        """The run folder."""
        name = self.recipe.name.removesuffix(".yaml").lstrip("/.")
        return self.folder or Path("runs") / name / f"{self.variant}-seed{self.seed}"


def train(run: Run) -> Progress:
    """Train a recipe's network to its last epoch.

    Raises:
        PadfreeError: recipe, data or folder are not right, or the loss is no longer finite.
    """
    if not 0 <= run.seed < SEEDS:
        raise TrainingError(f"--seed is {run.seed}; give 0 to {SEEDS - 1}")
    recipe = run.recipe
    accelerator = _accelerator(run)
    with Status(shown=accelerator.is_main_process and not run.quiet) as tell:
        network = _network(run, accelerator, tell)
        check_images(network, recipe.model)
        check_stages(network, recipe.training, shown=accelerator.is_main_process)
        batches = train_loader(accelerator, recipe, tell), eval_loader(accelerator, recipe, tell)
    with locked(run.path) if accelerator.is_main_process else contextlib.nullcontext():
        _open(run, accelerator, network)
        return _epochs(run, accelerator, network, *batches)


def ending(run: Run, progress: Progress) -> str:
    """The line that a run ends with: its best and its last accuracy, where it lies, and what to type next."""
    best, last = progress.best, progress.epochs[-1]
    assert best is not None
    figures = f"best {best.test_top1:.2f} % (epoch {best.epoch}), last {last.test_top1:.2f} % (epoch {last.epoch})"
    command = shlex.join(["padfree-recipes", "evaluate", str(run.path)])
    return f"{figures} in {run.path}; next: {command}"


def _network(run: Run, accelerator: Any, tell: Tell) -> nn.Module:
    """What to train; a run that goes on finds all its weights in its checkpoint."""
    tell(f"building {run.recipe.name} {run.variant}")
    if run.recipe.start is None or (run.resume and checkpoints(run.path)):
        return run.recipe.build(run.variant, seed=run.seed)
    return started(run.recipe, run.variant, run.seed, accelerator, run.quiet)


def _epochs(run: Run, accelerator: Any, network: nn.Module, train_batches: Any, test_batches: Any) -> Progress:
    from accelerate.utils import set_seed

    recipe, folder = run.recipe, run.path
    average = None
    if recipe.training.ema_decay is not None:
        averaging: Callable[[float], Any] = get_ema_multi_avg_fn
        average = AveragedModel(network, multi_avg_fn=averaging(recipe.training.ema_decay), use_buffers=True).to(
            accelerator.device
        )
        accelerator.register_for_checkpointing(average)
    optimizer = make_optimizer(recipe, network)
    schedule = make_schedule(recipe, optimizer)
    model, optimizer, schedule = accelerator.prepare(network, optimizer, schedule)

    evaluated = average.module if average is not None else accelerator.unwrap_model(model)
    progress = read_progress(folder)
    if progress.done:
        load_checkpoint(accelerator, evaluated, folder)
        recompute(recipe, optimizer, schedule.scheduler, shown=accelerator.is_main_process)
        if recipe.start is not None and progress.done < recipe.training.epochs and accelerator.is_main_process:
            note(f"the fine-tuning rate is that of {recipe.training.epochs} epochs: at most {peak(recipe):g}")
    epochs = recipe.training.epochs
    with ProgressBar(folder.name, epochs, progress.done, train_batches, accelerator, shown=not run.quiet) as bar:
        for number in range(progress.done + 1, epochs + 1):
            set_seed(epoch_seed(run.seed, number), device_specific=True)
            set_epoch(train_batches, number)
            begin_epoch(accelerator.unwrap_model(model), average, recipe.training, number)
            step = Step(recipe, accelerator, model, optimizer, average, bar, folder, number)
            scores, seconds = step.epoch(train_batches)
            rate = optimizer.param_groups[0]["lr"]
            schedule.step()
            bar.testing()
            tested = evaluate(evaluated, test_batches, recipe, accelerator.device)
            progress = _log(accelerator, progress, number, rate, scores, tested, seconds)
            step.check(torch.tensor(progress.epochs[-1].test_loss, device=accelerator.device), "after its last step")
            now = progress.epochs[-1]
            bar.tested(now.train_loss, now.test_top1, now.images_per_s)
            save_checkpoint(accelerator, evaluated, folder, progress)
    accelerator.end_training()
    return progress


def epoch_seed(seed: int, number: int) -> int:
    """The seed of an epoch, in the range of seeds."""
    return (seed + 1_000_003 * number) % SEEDS


@dataclass(frozen=True)
class Step:
    """One epoch's objects."""

    recipe: Recipe
    accelerator: Any
    model: nn.Module
    optimizer: Any
    average: AveragedModel | None
    bar: ProgressBar
    folder: Path
    number: int

    def epoch(self, batches: Any) -> tuple[Scores, float]:
        """Train on every batch once; the training scores of all processes, and the seconds it took."""
        self.model.train()
        scores = Scores(self.recipe.model.num_classes, self.accelerator.device)
        total = torch.zeros((), device=self.accelerator.device)
        self.bar.epoch(self.number)
        start, index = time.perf_counter(), 0
        for index, (images, targets) in enumerate(batches, 1):
            # a stream's loader is not Accelerate's, so its batches are still on the CPU
            images, targets = images.to(self.accelerator.device), targets.to(self.accelerator.device)
            if self.recipe.start is not None:
                self.set_rate(index - 1, len(batches))
            loss, logits = self.losses(images, targets)
            self.accelerator.backward(loss)
            if self.recipe.training.clip_norm is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.training.clip_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.average is not None:
                self.average.update_parameters(self.accelerator.unwrap_model(self.model))
            scores.update(logits.detach(), targets, loss.detach())
            total += loss.detach()
            self.bar.advance(len(images))
            if index % CHECK_EVERY == 0:
                self.check(total, f"by step {index}")
                right = (logits.argmax(1) == targets).float().mean()
                self.bar.trained(float(total) / index, 100 * float(right))
        if index == 0:
            raise TrainingError(f"epoch {self.number} gave no training images; look at data.train_samples")
        self.check(total, f"by step {index}")
        return scores, time.perf_counter() - start

    def set_rate(self, index: int, steps: int) -> None:
        """Set the learning rate of a step of this epoch, where fine-tuning has it change from step to step."""
        value = rate(self.recipe, (self.number - 1) * steps + index, self.recipe.training.epochs * steps)
        for group in self.optimizer.param_groups:
            group["lr"] = value

    def losses(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to minimise, and the logits (N, classes)."""
        settings = self.recipe.training
        logits = self.model(images)
        loss = cross_entropy(logits, targets, label_smoothing=settings.label_smoothing)
        if settings.orthonormal_weight:
            own = self.accelerator.unwrap_model(self.model)
            loss = loss + orthonormal_loss(own, settings.orthonormal_weight)
        if settings.lasso_weight:
            loss = loss + settings.lasso_weight * lasso(self.accelerator.unwrap_model(self.model))
        return loss, logits

    def check(self, total: Tensor, when: str) -> None:
        """Stop, in all processes alike, once a loss was not finite."""
        if torch.isfinite(self.accelerator.reduce(total.clone(), "sum")):
            return
        saved, _, _ = last_whole(self.folder)
        kept = f"the last good checkpoint is {saved}" if saved else "no epoch was finished"
        raise TrainingError(
            f"the loss is no longer finite in epoch {self.number}, {when} "
            f"(learning rate {self.optimizer.param_groups[0]['lr']:g}); {kept}; lower optimizer.lr or set "
            f"training.clip_norm"
        )


def _accelerator(run: Run) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration

    # several runs in one process (`compare`) may ask for several precisions
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    accelerator = Accelerator(
        cpu=run.cpu,
        mixed_precision=run.mixed_precision,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=run.seed),
        log_with="tensorboard",
        project_config=ProjectConfiguration(project_dir=str(run.path), logging_dir=str(run.path)),
    )
    if run.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise TrainingError("--mixed-precision fp16 needs an accelerator; on a CPU take bf16 or no")
    return accelerator


def _open(run: Run, accelerator: Any, network: nn.Module) -> None:
    about = {
        "variant": run.variant,
        "seed": run.seed,
        "processes": accelerator.num_processes,
        "mixed_precision": run.mixed_precision,
    }
    if accelerator.is_main_process:
        open_run(run.path, run.recipe, about, run.resume)
        plan = getattr(network, "padfree_plan", None)  # converted networks carry theirs
        if plan is not None and not checkpoints(run.path):  # a run that goes on keeps what it began with
            write_text(run.path / "plan.json", json.dumps(plan.to_dict(), indent=1) + "\n")
    accelerator.wait_for_everyone()
    accelerator.init_trackers("tensorboard")


def _log(
    accelerator: Any,
    progress: Progress,
    number: int,
    rate: float,
    trained: Scores,
    tested: Scores,
    seconds: float,
) -> Progress:
    train_loss, train_top1, train_images = trained.compute()
    test_loss, test_top1, test_images = tested.compute()
    epoch = Epoch(
        epoch=number,
        lr=rate,
        train_loss=train_loss,
        train_top1=train_top1,
        train_images=train_images,
        test_loss=test_loss,
        test_top1=test_top1,
        test_images=test_images,
        images_per_s=round(train_images / seconds, 2),
        seconds=round(seconds, 3),
    )
    shown = {key: getattr(epoch, key) for key in Epoch.__dataclass_fields__ if key != "epoch"}
    accelerator.log(shown, step=number)
    return Progress((*progress.epochs, epoch))
