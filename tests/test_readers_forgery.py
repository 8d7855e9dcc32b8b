"""Lists of real and forged videos: labels and masks as they are, and nothing outside the folders that were named."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from facebook_nb.files import UserError, write_image
from facebook_nb.readers import forgery as R

PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
FIVE = torch.tensor([[[10.0, 20], [22, 20], [42, 20], [54, 20], [32, 50]]])


def detect(picture):
    return SimpleNamespace(points=FIVE)


def frames(place, folder, n=3):
    for k in range(n):
        write_image(place / folder / f"{k}.png", PICTURE)
    return tuple(sorted((place / folder).glob("*.png")))


def bench(place, label, folder, n=3):
    frames(place, folder, n)
    entry = {"label": label, "frames": [f"{folder}/{k}.png" for k in range(n)]}
    (place / "list.json").write_text(json.dumps({"X": {label: {"test": {"c23": {"v": entry}}}}}))
    return R.read_deepfakebench(place / "list.json", "test")


def test_labels_are_words_not_parts_of_words(tmp_path):
    for label, forged in (("FF-real", 0), ("DFDC_Real", 0), ("real", 0), ("whichisreal", 1), ("SurrealSwap", 1)):
        assert [v.label for v in bench(tmp_path, label, "a/frames").videos] == [forged], label


def test_a_picture_is_never_its_own_mask(tmp_path):
    place = tmp_path / "frames" / "set"                     # the word in a folder above is not the data set's
    found = bench(place, "FF-DF", "faces/v")
    assert found.videos[0].masks is None and "1 forged videos without a mask" in str(found)
    frames(place, "x/masks/v", 2)
    assert bench(place, "FF-DF", "x/frames/v").videos[0].masks is None      # one of three lacks
    masks = frames(place, "x/masks/v")
    assert bench(place, "FF-DF", "x/frames/v").videos[0].masks == masks


def test_masks_that_do_not_fit_are_that_videos_error(tmp_path):
    seen, masks = frames(tmp_path, "frames/v"), frames(tmp_path, "masks/v")
    videos = R.ForgeryList("X", [R.FaceVideo("X/few", "X", seen, masks[:2])])
    write_image(tmp_path / "other/1.png", PICTURE[:32])
    videos.add(R.FaceVideo("X/small", "X", seen, (masks[0], tmp_path / "other/1.png", masks[2])))
    videos.add(R.FaceVideo("X/good", "X", seen, masks))
    skipped = R.crop_all(videos, tmp_path / "out", "test", 3, 32, detect)
    assert [s.split(": ")[-1] for s in skipped] == [
        "2 masks for 3 frames; add those that lack", "a mask has 64×32 pixels, its picture 64×64"]
    back = R.read_deepfakebench(tmp_path / "out/test.json", "test").with_masks()
    assert [len(v.masks) for v in back.videos] == [3]


@pytest.mark.parametrize("name", ["../../victim", "/victim", "a/../../../victim/frames", "link/victim", ""])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    """Neither read from a list nor, when links are followed, cut into the run's folder."""
    (tmp_path / "victim/masks").mkdir(parents=True)
    (tmp_path / "victim/masks/precious.txt").write_text("x")
    root = tmp_path / "data/dfdc"
    root.mkdir(parents=True)
    (root / "dataset.json").write_text(json.dumps({name + ".mp4": {"label": "real", "set": "test"}}))
    if name and "link" not in name:
        with pytest.raises(UserError, match="dataset.json.*leads out"):
            R.read_forgeries(root)
    out = tmp_path / "run/faces"
    out.mkdir(parents=True)
    for kind in ("frames", "masks"):
        (out / "test" / kind).mkdir(parents=True)
        (out / "test" / kind / "link").symlink_to(tmp_path)
    videos = R.ForgeryList("X", [R.FaceVideo(name, "X", frames(tmp_path, "a"))])
    assert "leads out" in R.crop_all(videos, out, "test", 2, 32, detect)[0]
    assert (tmp_path / "victim/masks/precious.txt").exists() and not list((tmp_path / "victim").rglob("*.png"))


def test_lists_of_another_form_get_one_line(tmp_path):
    for text in ("[]", "null", '"x"', '{"a.mp4": {"label": "fake?", "set": "test"}}', '{"a.mp4": 1}', "[" * 99999):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(UserError, match="dataset.json: ") as caught:
            R.read_dfdc_preview(tmp_path)
        assert "\n" not in str(caught.value)
    for text in ('{"FF": null}', '{"FF": {"a": 1}}', "{}"):
        (tmp_path / "dataset.json").write_text(text)
        with pytest.raises(UserError, match="dataset.json: "):
            R.read_deepfakebench(tmp_path / "dataset.json", "test")
    (tmp_path / "List_of_testing_videos.txt").write_bytes("\ufeff1 a.mp4\n".encode())
    assert R.read_celebdf(tmp_path).missing == ["a"]
    (tmp_path / "List_of_testing_videos.txt").write_bytes(b"1 \xfc.mp4\n")
    with pytest.raises(UserError, match="line 1 is not UTF-8"):
        R.read_celebdf(tmp_path)
