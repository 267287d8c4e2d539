"""Weights that others wrote: where they may lie in a file, and what is refused with which advice."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from padfree.errors import FileError
from padfree.files.checkpoint import load_weights, read_checkpoint


@pytest.mark.parametrize("prefix", ["", "module."])
def test_prefixes_of_parallel_training_are_stripped(prefix: str, tmp_path: Path) -> None:
    state = nn.Linear(2, 3).state_dict()
    prefixed = {prefix + key: value for key, value in state.items()}
    save_file(prefixed, tmp_path / "a.safetensors")
    torch.save(prefixed, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        torch.testing.assert_close(read_checkpoint(tmp_path / name), dict(state))


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema"])
def test_averaged_weights_are_read_where_there_are_no_others(key: str, tmp_path: Path) -> None:
    averaged, trained = nn.Linear(2, 3).state_dict(), nn.Linear(2, 3).state_dict()
    torch.save({key: averaged, "epoch": 3}, tmp_path / "a.pt")
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.pt"), dict(averaged))
    torch.save({key: averaged, "state_dict": trained}, tmp_path / "a.pt")
    torch.testing.assert_close(read_checkpoint(tmp_path / "a.pt"), dict(trained))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"model": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1)}, "argparse.Namespace"),
        (nn.Linear(2, 3), "torch.nn.modules.linear.Linear"),
        ({"a": print}, "print"),
    ],
)
def test_what_reading_would_run_is_named_and_not_recommended(content: Any, named: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(FileError) as caught:
        read_checkpoint(tmp_path / "a.pt")
    assert f"holds more than tensors ({named}), which weights_only reading refuses" in str(caught.value)
    assert 'save {"state_dict": model.state_dict()} alone, or safetensors' in str(caught.value)
    assert "False" not in str(caught.value) and "\x1b" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for content in (b"", b"hello", b"just some text\n" * 10, pickle.dumps({"a": 1}, protocol=4)):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"a\.pt is neither safetensors nor a torch file$"):
            read_checkpoint(path)
    torch.save(nn.Linear(20, 30).state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(FileError, match="is damaged, truncated, or holds more than tensors; save"):
        read_checkpoint(path)
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    with pytest.raises(FileError, match="is TorchScript; save"):
        read_checkpoint(path)
    for wrong in (None, 3, b"a.pt"):
        with pytest.raises(FileError, match="is not the path of a file"):
            read_checkpoint(wrong)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda tensor: tensor.to_sparse(), "sparse"),
        (lambda tensor: tensor.to("meta"), "on the meta device"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantized"),
    ],
)
def test_tensors_of_other_kinds_are_named(change: Any, kind: str, tmp_path: Path) -> None:
    state = nn.Linear(2, 3).state_dict()
    torch.save({**state, "bias": change(state["bias"])}, tmp_path / "a.pt")
    with pytest.raises(FileError, match=f"`bias` is {kind}, not a plain tensor"):
        read_checkpoint(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_weights_do_not_lose_their_imaginary_part(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    state = {**model.state_dict(), "bias": torch.ones(3, dtype=torch.complex64)}
    with pytest.raises(FileError, match=r"do not fit Linear: keys 1 complex \(bias\)"):
        load_weights(model, state, tmp_path / "a.pt")
    load_weights(model.to(torch.complex64), state, tmp_path / "a.pt")
    assert torch.equal(model.bias, state["bias"])
