"""Recipe files: what is there, what they may say, and how faults are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from padfree.recipes import Recipe, RecipeError, load, names
from padfree.recipes.files import dump, find, write_text
from padfree.recipes.small import FAMILIES
from torch import nn

from padfree import PadfreeError
from padfree.errors import FileError

ROWS = json.loads((Path(__file__).parents[1] / "data" / "paper_rows.json").read_text())
DIGITS = ("digits/ghostnet", "digits/mobilenetv3-large", "digits/resnet20", "digits/shufflenetv2-x1.0")
OTHERS = ("imagenet/mobilenetv3-large-cosine", "digits/mobilenetv2-lgc")
DOCUMENTS = {
    f"{row['table']}/{row['model']}"
    for row in json.loads((Path(__file__).parents[1] / "data" / "document_rows.json").read_text())
}
SMALL = {f"{table}/{family}" for table in ("photos", "mnist5k") for family in FAMILIES}


def test_there_is_a_recipe_for_every_row_and_for_the_bundled_data() -> None:
    wanted = {f"{row['table']}/{row['model']}" for row in ROWS}
    assert len(ROWS) == 54 and len(wanted) == 25
    assert set(names()) == wanted | set(DIGITS) | SMALL | set(OTHERS) | DOCUMENTS


def test_recipes_hold_the_published_and_reference_figures_of_every_row() -> None:
    checked = 0
    for row in ROWS:
        recipe = load(f"{row['table']}/{row['model']}")
        assert recipe.figures is not None
        figures = recipe.figures.rows[row["variant"]]
        assert figures.published.model_dump() == row["published"]
        assert recipe.figures.count == row["count"]
        assert (recipe.model.num_classes, recipe.model.input_side) == (row["num_classes"], row["input_side"])
        for key, value in row["measured"].items():
            assert getattr(figures.reference, key) == value
        checked += 1
    assert checked == 54


@pytest.mark.parametrize("name", names())
def test_a_dumped_recipe_reads_back_equal(name: str, tmp_path: Path) -> None:
    recipe = load(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(dump(recipe))
    assert load(path).model_dump(exclude={"name"}) == recipe.model_dump(exclude={"name"})


@pytest.mark.parametrize(
    ("table", "epochs", "batch", "lr", "nesterov"),
    [
        ("cifar100-first", 200, 128, 0.1, False),
        ("stanford-dogs", 200, 128, 0.1, False),
        ("cifar100-second", 300, 64, 0.03, True),
        ("vegfru-292", 100, 64, 0.1, True),
    ],
)
def test_settings_are_those_of_the_paper(table: str, epochs: int, batch: int, lr: float, nesterov: bool) -> None:
    found = [load(name) for name in names() if name.startswith(f"{table}/")]
    assert found
    for recipe in found:
        assert (recipe.training.epochs, recipe.training.batch_size) == (epochs, batch)
        optimizer = recipe.optimizer
        assert optimizer.name == "sgd" and optimizer.momentum == 0.9
        assert (optimizer.lr, optimizer.nesterov, optimizer.weight_decay) == (lr, nesterov, 1e-4)
        assert recipe.training.orthonormal_weight == (0.1 if recipe.name.endswith("bsconvs") else 0.0)


def test_the_one_recipe_without_a_row_of_its_own() -> None:
    recipe = load("imagenet/mobilenetv3-large-cosine")
    assert recipe.figures is None
    assert (recipe.training.epochs, recipe.training.batch_size) == (150, 256)
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (0.05, 4e-5)
    dropout = [module for module in recipe.build("original").modules() if isinstance(module, nn.Dropout)]
    assert [module.p for module in dropout] == [0.0]


def test_every_fault_of_a_file_is_told_at_once_with_file_and_key(small: Path) -> None:
    text = small.read_text().replace("lr: 0.1", "lr: -1").replace("epochs: 2", "epochs: many, colour: blue")
    small.write_text(text.replace("RandomCrop", "RandomCorp"))
    with pytest.raises(RecipeError) as caught:
        load(small)
    message = str(caught.value)
    assert message.startswith(f"{small}: 4 faults: ")
    assert "optimizer.lr: input should be greater than 0 (it is -1.0)" in message.replace("-1)", "-1.0)")
    assert "training.epochs: " in message and "(it is 'many')" in message
    assert "training.colour: " in message
    assert "data.train: no transform 'RandomCorp'; there are CenterCrop" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1, 2]", "a recipe is a mapping of keys, and this is list"),
        ("a: [", "not YAML"),
        ("about: a\nabout: b\n", "key 'about' is given twice"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
        ("a: 2020-13-45", "not YAML: month must be in 1..12"),
        ("a: !!int abc", "not YAML: invalid literal for int"),
        ("a: !!bool abc", "not YAML: 'abc'"),
        ("a: " + "[" * 3000, "not YAML: maximum recursion depth exceeded"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("model.name=null", "builder small needs model.name"),
        ("model.builder=timm-ghostnet", "builder timm-ghostnet takes no model.name"),
        ("data.dataset=cifar10", "dataset cifar10 needs data.root"),
        ("data.reader=wds/x", "data.reader and dataset: timm go together"),
        (
            "efficientformerv2={blocks: [a], attention: [b]}",
            r"attention lists \['b'\], which blocks does not",
        ),
        ("schedule.name=linear", "schedule.name: no 'linear'; "),
        ("training.epochs=true", r"training.epochs: input should be a valid integer \(it is True\)"),
        ("name=mine", "name: a recipe is named by its file; leave this key out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(section: str, words: str, small: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        load(small, [section])


def test_changes_replace_settings(small: Path) -> None:
    recipe = load(small, ["optimizer.lr=1e-3", "training.epochs=7", "training.clip_norm=1.5"])
    assert (recipe.optimizer.lr, recipe.training.epochs, recipe.training.clip_norm) == (1e-3, 7, 1.5)
    assert load(small).training.epochs == 2


@pytest.mark.parametrize(
    "change",
    ["epochs", "=3", "about.x=1", "training.epochs=[", "training.epoch=3", "about=2020-13-45", "data={a: 1, a: 2}"],
)
def test_a_change_that_is_none_is_refused(change: str, small: Path) -> None:
    with pytest.raises(RecipeError):
        load(small, [change])


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"did you mean 'cifar100-first/resnet20'"):
        find("cifar100-first/resnet2")
    assert issubclass(RecipeError, PadfreeError)


def test_recipes_are_frozen_and_know_their_table() -> None:
    recipe = load("cifar100-first/resnet20")
    assert isinstance(recipe, Recipe) and recipe.table == "cifar100-first"
    with pytest.raises(ValueError, match=r"frozen"):
        recipe.about = "other"  # type: ignore[misc]


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_text(path, "before")
    monkeypatch.setattr(Path, "write_text", _half_written)
    with pytest.raises(FileError, match=rf"cannot write {path}: disk full"):
        write_text(path, "after")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def _half_written(path: Path, text: str, **_: object) -> int:
    path.write_bytes(text[:2].encode())
    raise OSError("disk full")
