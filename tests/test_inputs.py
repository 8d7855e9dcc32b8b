"""What `apply` is given: each input has its row, whatever it is called and whatever is wrong with it."""
import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from facebook_nb.files import UserError, write_image
from facebook_nb.inputs import Item, apply_each, as_picture, is_grey

COLOUR = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def mean(item):
    return {"mean": round(float(item.picture().mean()), 2), "stem": item.stem}


def test_one_input_or_several_of_any_kind(tmp_path):
    write_image(tmp_path / "a.png", COLOUR)
    tensor = torch.from_numpy(COLOUR).permute(2, 0, 1)
    kinds = [str(tmp_path / "a.png"), tmp_path / "a.png", COLOUR, Image.fromarray(COLOUR), tensor, tensor / 255]
    rows = apply_each(kinds, mean)
    assert {row["mean"] for row in rows} == {round(float(COLOUR.mean()), 2)} and len({row["stem"] for row in rows}) == 6
    for one in kinds:
        assert [r["mean"] for r in apply_each(one, mean)] == [rows[0]["mean"]]
    assert list(rows[0])[:2] == ["input", "weights"]


def test_odd_names_and_files_cost_nobody_else_his_result(tmp_path):
    place = tmp_path / "p"
    write_image(place / "a.png", COLOUR)
    names = (b"M\xfcller.png", b"n" * 246 + b".png", b"\x1b[2J.png", b"img [copy].png", b"-rf.png")
    for name in names:
        with open(os.path.join(os.fsencode(place), name), "wb") as file:
            file.write((place / "a.png").read_bytes())
    os.mkfifo(place / "pipe.png")
    (place / "IMG_1.HEIC").touch()
    with open(place / "huge.jpg", "wb") as file:
        file.truncate(40 << 30)
    (place / "zero.png").symlink_to("/dev/zero")

    def judge(item):
        write_image(item.folder / f"{item.stem}.png", item.picture())
        return {}

    rows = apply_each(place, judge, tmp_path / "out")
    bad = {r["input"].rsplit("/", 1)[1]: r["error"].split(": ", 1)[1] for r in rows if "error" in r}
    assert len(rows) == 10 and set(bad) == {"pipe.png", "IMG_1.HEIC", "huge.jpg", "zero.png"}
    assert "HEIC" in bad["IMG_1.HEIC"] and "MB" in bad["huge.jpg"]
    assert "not a file" in bad["pipe.png"] and "not a file" in bad["zero.png"]
    assert json.loads((tmp_path / "out/results.json").read_text()) == rows
    assert "\x1b" not in (tmp_path / "out/results.json").read_text() + str(rows)
    assert len(list((tmp_path / "out").glob("*.png"))) == 6


def test_results_are_there_before_the_work_ends(tmp_path):
    def judge(item):
        if item.value == tmp_path / "1":
            assert len(json.loads((tmp_path / "out/results.json").read_text())) == 1
            raise MemoryError("no more\nof it")
        if item.value == tmp_path / "2":
            raise KeyboardInterrupt
        return {"scores": {"a": 1.0}, "nothing": None}

    with pytest.raises(KeyboardInterrupt):
        apply_each([tmp_path / str(k) for k in range(3)], judge, tmp_path / "out", weights="mine")
    rows = json.loads((tmp_path / "out/results.json").read_text())
    assert [set(r) - {"input"} for r in rows] == [{"weights", "scores", "nothing"}, {"weights", "error"}]
    assert rows[1]["error"].endswith("failed (MemoryError: no more)")
    with open(tmp_path / "out/results.csv", newline="") as file:
        assert [r["scores"] for r in csv.DictReader(file)] == ['{"a": 1.0}', ""]


def test_the_folder_of_results_is_tried_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--out-dir"):
        apply_each([COLOUR], lambda item: pytest.fail("worked"), tmp_path / "file/out")


def test_folders_are_searched_and_the_rest_is_told(tmp_path, capsys):
    write_image(tmp_path / "a/b/1.png", COLOUR)
    for name in ("a/notes.txt", "a/.hidden.png", "films/x.doc", "films/y.HEIC"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    write_image(tmp_path / "a/out/x.png", COLOUR)       # of an earlier call
    rows = apply_each([tmp_path / "a", tmp_path / "films"], mean, tmp_path / "a/out")
    assert len(rows) == 2 and ".heic 1" in rows[1]["error"] and ".doc 1" in rows[1]["error"]
    assert ".txt 1" in capsys.readouterr().err


@pytest.mark.parametrize("x", [np.zeros((5, 5, 2)), np.zeros((0, 5, 3)), np.full((4, 5), np.inf), np.array(["a"]),
                               np.zeros((2, 4, 5, 3)), torch.full((3, 4, 5), -1.0), np.full((4, 5), 10 ** 6)])
def test_arrays_that_are_no_pictures(x):
    with pytest.raises(UserError, match="mine: "):
        as_picture(x, "mine")


def test_grey_is_told_from_colour(tmp_path):
    grey = np.repeat(COLOUR[..., :1], 3, 2)
    write_image(tmp_path / "g.jpg", grey)
    assert is_grey(grey) and is_grey(grey[..., 0]) and is_grey(Item(tmp_path / "g.jpg").picture())
    assert not is_grey(COLOUR) and not is_grey(np.full((9, 9, 3), (200, 190, 180), np.uint8))


def test_a_npy_file_that_holds_no_array_of_numbers(tmp_path):
    """One line of ours, whatever numpy says of it."""
    whole = io.BytesIO()
    np.save(whole, np.zeros((4, 8, 8, 3), np.uint8))
    whole = whole.getvalue()
    damaged = {"text": b"no film", "none": b"", "cut": whole[:40], "short": whole[:-9],
               "header": whole[:12] + b"{{(" + whole[15:]}
    for name, content in damaged.items():
        (tmp_path / f"{name}.npy").write_bytes(content)
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    for name in (*damaged, "objects"):
        with pytest.raises(UserError) as told:
            Item(tmp_path / f"{name}.npy").film()
        assert str(told.value) == (f"{tmp_path}/{name}.npy: holds no array of numbers; write the frames (T, H, W, 3) "
                                   "anew with numpy.save")
    (tmp_path / "good.npy").write_bytes(whole)
    for name in ("good", "missing"):            # the second is for the reader to tell
        assert Item(tmp_path / f"{name}.npy").film() == tmp_path / f"{name}.npy"


LARGE = """
import importlib, json, resource, sys
import av, cv2, dlib, matplotlib.pyplot, torch, PIL.Image
torch.set_num_threads(1)
peak, found = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, {}
modules = [importlib.import_module("facebook_nb." + name) for name in ("lap", "cmr")]
libraries = peak()
for module, name in zip(modules, ("photo.jpg", "film.mp4")):
    row, = module.apply(name, out_dir="out")
    found[module.__name__] = [row.get("face"), row.get("label"), row.get("error"), peak() - libraries]
print(json.dumps(found))
"""


def test_a_photo_of_48_megapixels_and_a_film_in_4k_fit(tmp_path):
    """Megabytes above the interpreter with its libraries; a chapter of faces, one of films."""
    av = pytest.importorskip("av")
    pytest.importorskip("dlib")
    from matplotlib import cbook

    face = Image.open(cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")
    face.resize((6000, 8000)).save(tmp_path / "photo.jpg")
    frame = np.asarray(face.resize((3840, 2160)))
    with av.open(str(tmp_path / "film.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 3840, 2160, "yuv420p"
        for k in range(25):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(frame, 40 * k, 1), format="rgb24")))
        file.mux(stream.encode())
    done = subprocess.run([sys.executable, "-c", LARGE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lap, cmr = json.loads(done.stdout.splitlines()[-1]).values()
    assert lap[0] == "found" and lap[-1] < 600, lap
    assert cmr[1] and cmr[-1] < 800, cmr
