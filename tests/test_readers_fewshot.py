"""Few-shot data sets in the layouts in which they go round."""
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from facebook_nb.files import UserError, write_image
from facebook_nb.readers import fewshot
from tests.conftest import data_folder


def picture(value, side=84):
    return np.full((side, side, 3), value, np.uint8)


def phases(folder, labels=(7, 7, 3, 9), side=84):
    data = np.stack([picture(10 * i, side) for i in range(len(labels))])
    for name in ("train_phase_train", "val", "test"):
        path = folder / f"miniImageNet_category_split_{name}.pickle"
        path.write_bytes(pickle.dumps({"data": data, "labels": list(labels)}, protocol=2))


def test_pickles_of_phases_are_numbered_anew(tmp_path):
    phases(tmp_path)
    splits = fewshot.read_splits(tmp_path, "miniimagenet")
    assert list(splits) == ["train", "val", "test"]
    assert splits["train"].labels.tolist() == [1, 1, 0, 2] and splits["train"].classes == ["3", "7", "9"]
    assert splits["test"].load([3, 1]).flatten(1).float().mean(1).tolist() == [30, 10]


def test_cache_pickles(tmp_path):
    data = np.stack([picture(v) for v in (1, 2, 3)])
    for phase in fewshot.PHASES:
        found = {"image_data": data, "class_dict": {"b": [0, 2], "a": [1]}}
        (tmp_path / f"mini-imagenet-cache-{phase}.pkl").write_bytes(pickle.dumps(found))
    split = fewshot.read_splits(tmp_path, "miniimagenet", size=42)["val"]
    assert split.classes == ["a", "b"] and split.labels.tolist() == [1, 0, 1]
    assert tuple(split.load([0]).shape) == (1, 3, 42, 42)


@pytest.mark.parametrize("payload", [eval, np.load, pickle.loads])
def test_a_pickle_that_wants_more_is_refused(tmp_path, payload):
    class Evil:
        def __reduce__(self):
            return payload, ("print('ran')",)

    path = tmp_path / "miniImageNet_category_split_train_phase_train.pickle"
    path.write_bytes(pickle.dumps({"data": np.zeros(3), "labels": Evil()}))
    with pytest.raises(UserError, match="refused.*asks for"):
        fewshot.read_pickle(path)
    found = fewshot.check_splits(tmp_path)
    assert not found.usable and "refused" in str(found)


@pytest.mark.parametrize("found, message", [
    ({"data": np.zeros((2, 4, 4, 3), np.uint8)}, "no 'labels'"),
    ({"data": np.zeros((2, 4, 4, 3)), "labels": [0, 1]}, "float64"),
    ({"data": np.zeros((2, 4, 4, 3), np.uint8), "labels": [0]}, "2 pictures, 1 labels"),
    ([1, 2], "no mapping"),
])
def test_damaged_pickles_say_what_is_wrong(tmp_path, found, message):
    (tmp_path / "miniImageNet_category_split_train_phase_train.pickle").write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match=message):
        fewshot.read_splits(tmp_path, "miniimagenet")


@pytest.mark.parametrize("classes", [{"a": [0, 99]}, {"a": ["x"]}, [1], {"a": 0}, {"a": [0]}, {"a": [-9]}])
def test_classes_that_do_not_fit_the_pictures(tmp_path, classes):
    for phase in fewshot.PHASES:
        found = {"image_data": np.zeros((2, 84, 84, 3), np.uint8), "class_dict": classes}
        (tmp_path / f"mini-imagenet-cache-{phase}.pkl").write_bytes(pickle.dumps(found))
    with pytest.raises(UserError, match="cache-train.pkl: "):
        fewshot.read_splits(tmp_path, "miniimagenet")


def test_a_small_zip_of_large_pictures_is_refused(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("1", (7000, 7000)).save(buffer, "PNG")
    path = tmp_path / "images_background.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("images_background/A/character01/1.png", buffer.getvalue())
    with pytest.raises(UserError, match="images_background.zip.*7000×7000 pixels, over the limit"):
        fewshot.read_omniglot_zip(path)
    omniglot_zip(path, ["A/character01", "A/character02", "B/character01"])
    monkeypatch.setattr(fewshot, "INK_BYTES", 105 * 105 * 2)
    with pytest.raises(UserError, match="images_background.zip: unpacks to more"):
        fewshot.read_omniglot_zip(path)


def test_old_numpy_names_are_understood(tmp_path):
    data = pickle.dumps({"data": np.arange(4)}, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    (tmp_path / "x.pickle").write_bytes(data)
    assert fewshot.read_pickle(tmp_path / "x.pickle")["data"].tolist() == [0, 1, 2, 3]


def lists(folder, rows="filename,label\na.jpg,n02\nb.jpg,n01\n"):
    (folder / "images").mkdir(exist_ok=True)
    for k, name in enumerate(("a.jpg", "b.jpg")):
        write_image(folder / "images" / name, picture(100 * k, 120))
    for phase in fewshot.PHASES:
        (folder / f"{phase}.csv").write_text(rows)


def test_lists_with_pictures(tmp_path):
    lists(tmp_path)
    split = fewshot.read_splits(tmp_path, "miniimagenet")["test"]
    assert split.classes == ["n01", "n02"] and split.labels.tolist() == [1, 0]
    x = split.load([1, 0])
    assert tuple(x.shape) == (2, 3, 84, 84) and (x[0].float() - 100).abs().max() < 3


@pytest.mark.parametrize("rows, message", [
    ("filename,label\nc.jpg,n01\na.jpg,n02\n", "1 pictures of train.csv are missing, c.jpg"),
    ("filename,label\n../a.jpg,n01\na.jpg,n02\n", "not the name of a picture"),
    ("name,label\na.jpg,n01\n", "not filename,label"),
    ("filename,label\na.jpg,n01\n", "1 classes"),
])
def test_lists_that_are_wrong(tmp_path, rows, message):
    lists(tmp_path, rows)
    with pytest.raises(UserError, match=message):
        fewshot.read_splits(tmp_path, "miniimagenet")


def test_class_folders_under_a_root_of_several(tmp_path):
    for phase in fewshot.PHASES:
        for name in ("x", "y"):
            folder = tmp_path / "tieredImageNet" / phase / name
            folder.mkdir(parents=True)
            write_image(folder / "0.png", picture(9, 84))
    assert fewshot.find_data(tmp_path, "miniimagenet") is None
    splits = fewshot.read_splits(tmp_path, "tieredimagenet")
    assert splits["train"].classes == ["x", "y"]
    (tmp_path / "tieredImageNet" / "train" / "x" / "0.png").write_bytes(b"not a picture")
    found = fewshot.check_splits(tmp_path)
    assert not found.usable and "not a readable image" in str(found)


def test_cifar_as_released(tmp_path):
    for k, name in enumerate(("bee", "apple", "cup")):
        (tmp_path / "data" / name).mkdir(parents=True)
        write_image(tmp_path / "data" / name / "0.png", picture(50 * k, 32))
    splits = tmp_path / "splits" / "bertinetto"
    splits.mkdir(parents=True)
    for phase in fewshot.PHASES:
        (splits / f"{phase}.txt").write_text("bee\ncup\n")
    split = fewshot.read_splits(tmp_path, "cifar-fs", size=32)["train"]
    assert split.classes == ["bee", "cup"] and split.load([1]).float().mean() == 100


def omniglot_zip(path, names):
    with zipfile.ZipFile(path, "w") as file:
        for name in names:
            out = io.BytesIO()
            Image.fromarray(np.full((105, 105), 255, np.uint8)).convert("1").save(out, "png")
            file.writestr(f"images_background/{name}/0001_01.png", out.getvalue())


def test_omniglot_tests_on_alphabets_that_training_lacks(tmp_path):
    omniglot_zip(tmp_path / "images_background_small1.zip", ["Greek/character01", "Korean/character02"])
    omniglot_zip(tmp_path / "images_background_small2.zip", ["Greek/character01", "Tagalog/character01"])
    splits = fewshot.read_splits(tmp_path, "omniglot", size=32)
    assert splits["train"].classes == ["Greek/character01", "Korean/character02"]
    assert splits["test"].classes == ["Tagalog/character01"] and splits["test"].labels.tolist() == [0]
    assert splits["test"].load([0]).max() == 0          # white paper is no ink
    (tmp_path / "images_background_small2.zip").write_bytes(b"PK broken")
    with pytest.raises(UserError, match="zip"):
        fewshot.read_splits(tmp_path, "omniglot")


def test_nothing_there_names_the_layouts(tmp_path):
    found = fewshot.check_splits(tmp_path)
    assert not found.usable and "train.csv" in str(found) and "pickles" in str(found)
    with pytest.raises(UserError, match="one of miniimagenet"):
        fewshot.find_data(tmp_path, "imagenet")


def test_real_omniglot():
    folder = data_folder("omniglot")
    splits = fewshot.read_splits(folder.parent, "omniglot", size=32)
    assert len(splits["train"].classes) == 136 and len(splits["test"].classes) == 106
    assert np.bincount(splits["test"].labels).tolist() == [20] * 106
    ink = splits["train"].images.float().mean() / 255
    assert 0.02 < ink < 0.15
    assert torch.equal(splits["train"].images[:, 0], splits["train"].images[:, 2])
