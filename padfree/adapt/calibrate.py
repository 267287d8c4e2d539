"""`calibrate`: from a trained network's weights to those of its padding-free form, by looking at unlabelled images.

    converted = padfree.convert(model)
    print(padfree.calibrate(converted, batches, original=model))

Input to output, each step on the network as the steps before it left it:

    identity     norms of new layers take the statistics of what they read            statistics
    tail         a hybrid stem's tail becomes an identity, where its activation is none   tail
    rescale      a ReLU's map is scaled down, so that its pool counts for less        rescale
    merge        a strided convolution takes over what it can of a pool added to it   merge
    absorb       the 1x1 convolution behind a sum takes back what the pool adds       absorb
    imitate      the layers of the last map imitate the original's                    imitate
    recalibrate  all batch norms' statistics anew                                     statistics
    classifier   the last linear layer is solved for the original's outputs           classifier

All but the tail's fit are forward passes and closed forms. What makes the network worse on a held-back fifth of the
images is undone: `imitate`, `recalibrate` and `classifier` by the outputs, where the original is there to compare them
with, the other steps by the places that they mend (`judged.py`). Where the outputs end worse than they began, steps
are taken back, the last one first.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from padfree.adapt.absorb import absorb_by_point
from padfree.adapt.checks import check_images, check_networks, check_outputs, chosen_steps
from padfree.adapt.classifier import solvable, solve_classifier
from padfree.adapt.images import divided, measured
from padfree.adapt.imitate import imitate
from padfree.adapt.judged import Judged, Step, restore, values
from padfree.adapt.merge import absorb_by_conv
from padfree.adapt.places import Places
from padfree.adapt.report import Calibration
from padfree.adapt.rescale import rescale
from padfree.adapt.statistics import calibrate_identities, recalibrate
from padfree.adapt.tail import fit_tails
from padfree.adapt.work import Work, outputs
from padfree.errors import PadfreeError
from padfree.record.batches import image_batches
from padfree.record.copies import bare_copy, kept_generators
from padfree.record.inputs import like_of
from padfree.record.recording import record
from padfree.record.trees import first_line
from padfree.types import PlanData

STEPS: dict[str, Step] = {
    "identity": calibrate_identities,
    "tail": fit_tails,
    "rescale": rescale,
    "merge": absorb_by_conv,
    "absorb": absorb_by_point,
    "imitate": imitate,
    "recalibrate": recalibrate,
    "classifier": solve_classifier,
}
_FROM_ORIGINAL = ("imitate", "classifier")  # what takes the original network
_ONCE = ("tail", "rescale", "merge", "absorb")  # what takes the network as the conversion left it
_MARK = "padfree_calibrated"
_TO_SCALE = 32  # held-back images; with fewer a scale for each output fits whatever comes
_ENOUGH = "some hundred unlabelled images, such as 20 batches of 64"
_DONE = "done before, and places converted since are left, too; to do it again, convert the original anew"


def calibrate(
    converted: nn.Module,
    batches: Iterable[Tensor],
    *,
    original: nn.Module | None = None,
    steps: Iterable[str] | None = None,
    progress: bool = True,
) -> Calibration:
    """Fit a converted trained network to what it computed before, in place, by forward passes over images.

    No labels and no training (but of a stem's tail alone). Parameters stay the same objects; modes, gradients, hooks
    and random generators are as before.

    Args:
        converted: a trained network that `padfree.convert` made of `original` with `init="preserve"` (its default for
            trained networks), not fused.
        batches: a list of tensors (N, C, H, W), or a loader that yields them: images as the network takes them,
            without labels, some hundred (20 batches of 64 are enough). They are kept in memory meanwhile.
        original: the network before conversion; with it the last map and the classifier are fitted too, `imitate`,
            `recalibrate` and `classifier` are judged by the outputs, and these end no worse than they began.
        steps: names of the steps to do, of those listed above; default: all.
        progress: tell on a terminal what is being done.

    Returns:
        what was done, with each step's relative errors before and after on the held-back images.

    Raises:
        PadfreeError: an argument is wrong, or the images or outputs are all the same; the network is as before.
    """
    chosen = chosen_steps(steps, tuple(STEPS), _FROM_ORIGINAL, original is not None)
    check_networks(converted, original)
    started = time.perf_counter()
    exact = torch.autocast(like_of(converted).device.type, enabled=False)  # it would go on with casts of old weights
    with torch.inference_mode(False), torch.no_grad(), kept_generators(), exact:
        images = image_batches(batches, converted, labels=False, together=2, advice=_ENOUGH)
        train, held = divided(images)
        if sum(map(len, held)) < 2:
            raise PadfreeError(
                f"{sum(map(len, images))} images are too few: two must be held back to measure on; pass some hundred"
            )
        work = _work(converted, original, train, held)
        marked: tuple[str, ...] = converted.__dict__.get(_MARK, ())
        work.done = marked
        with _restoring(work.model):
            judged = Judged(work, STEPS)
            mends = original is not None and sum(map(len, measured(held))) >= _TO_SCALE and solvable(work)
            for index, name in enumerate(chosen):
                _tell(progress, f"calibrate {index + 1}/{len(chosen)}: {name}")
                if name in marked:
                    judged.leave(name, _DONE)
                else:
                    judged.do(name, repaired="classifier" in chosen[index + 1 :] and mends)
            judged.settle()
            _tell(progress, "")
    done = judged.report
    kept = (step.name for step in done if step.kept and step.places and step.name in _ONCE)
    converted.__dict__[_MARK] = tuple(dict.fromkeys((*marked, *kept)))
    counts = sum(map(len, train)), sum(map(len, held))
    seconds = time.perf_counter() - started
    return Calibration(
        type(converted).__name__, *counts, judged.first, judged.errors[0], done, seconds, _notes(work, original)
    )


def _work(converted: nn.Module, original: nn.Module | None, train: list[Tensor], held: list[Tensor]) -> Work:
    size = tuple(train[0].shape[1:])
    try:
        recording = record(converted, size)
    except PadfreeError as error:
        raise PadfreeError(f"the batches do not fit: {error}") from error
    before = None if original is None else bare_copy(original, original.parameters())
    work = Work(_shared(converted), before, train, held, Places(recording))
    work.absorbs = _absorbs(converted.__dict__.get("padfree_plan"))
    try:
        found = [outputs(work.model, images) for images in measured(work.held)]
    except Exception as error:  # the model's own code
        raise PadfreeError(f"the batches do not fit: {type(error).__name__}: {first_line(error)}") from error
    if not all(bool(tensor.isfinite().all()) for batch in found for tensor in batch):
        raise PadfreeError(f"the outputs of {type(converted).__name__} on these images are not finite")
    check_images(held)
    _check_replay(work)
    if work.original is not None:
        work.expected = _expected(type(converted).__name__, work.original, measured(work.held), found)
    return work


def _check_replay(work: Work) -> None:
    """Refuse a network whose forward bakes numbers of its images into what was written down of it."""
    stream = work.stream()
    for index, images in ((0, work.train[0]), (work.first_held, work.held[0])):
        for mine, true in zip(stream.outputs(index), outputs(work.model, images), strict=True):
            if not torch.allclose(mine, true, rtol=1e-2, atol=1e-3 * float(true.abs().max())):
                raise PadfreeError(
                    f"what {type(work.model).__name__} computes depends on numbers that its forward reads off the "
                    "images (.item(), float()), which calibration cannot follow; compute with tensors there"
                )


def _shared(model: nn.Module) -> nn.Module:
    """A copy in eval mode without hooks, whose tensors are the model's own."""
    return bare_copy(model, [*model.parameters(), *model.buffers()])


def _expected(name: str, original: nn.Module, held: list[Tensor], found: list[list[Tensor]]) -> list[list[Tensor]]:
    """The original's outputs, of batches of which `found` are the converted network's; none if sides differ."""
    try:
        expected = [outputs(original, images) for images in held]
    except Exception as error:  # the model's own code
        raise PadfreeError(
            f"original does not run on the batches: {type(error).__name__}: {first_line(error)}"
        ) from error
    check_outputs(name, expected, found)
    mine, theirs = ([[tensor.shape for tensor in batch] for batch in batches] for batches in (found, expected))
    return expected if mine == theirs else []


def _absorbs(plan: PlanData | None) -> bool:
    """Whether the stem's tail took a max-pool in, as the plans say that made it."""
    steps = [] if plan is None else plan.steps()
    return any(getattr(match.detail, "absorbs", False) for step in steps for match in step.matches)


def _notes(work: Work, original: nn.Module | None) -> tuple[str, ...]:
    if original is None:
        return ("without original= the last map and the classifier are not fitted, and steps are judged one by one",)
    if not work.expected:
        return ("the outputs are maps of other sizes than the original's: steps are judged one by one",)
    return ()


# -- state ------------------------------------------------------------------------------------------


@contextmanager
def _restoring(model: nn.Module) -> Iterator[None]:
    """Give the network its values back where the block fails."""
    kept = values(model)
    try:
        yield
    except BaseException:
        restore(kept)
        raise


def _tell(progress: bool, text: str) -> None:
    if progress and sys.stderr is not None and sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
