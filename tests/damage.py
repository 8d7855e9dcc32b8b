"""Good inputs of every kind that the book reads, and seeded ways of damaging them.

    python -m tests.damage [--count 200] [--seed 0]

Each damaged input must end in a UserError that names the file, or be read all the same (a changed pixel is no error);
anything else, and anything left on the disk, is a defect. `make test` runs the 200 of seed 0 (test_robustness.py).
"""
import argparse
import csv
import io
import json
import pickle
import random
import re
import shutil
import tarfile
import tempfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from facebook_nb.experiment import RunFolder, Settings
from facebook_nb.files import UserError, progress, read_image, read_json, read_weights, write_weights
from facebook_nb.inputs import Item, apply_each, shown
from facebook_nb.readers import faces, fewshot, forgery, photosets, spoof, video
from facebook_nb.training import Recipe, fit

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)


def encoded(suffix: str, image=PIXELS[0]) -> bytes:
    import cv2

    return cv2.imencode(suffix, image)[1].tobytes()


def stored(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)
    return buffer.getvalue()


def tarred(*members: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def film(path: Path, codec: str = "libx264") -> None:
    import av

    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options={"bf": "2", "g": "8"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for k in range(20):
            frame = np.full((64, 64, 3), 10 * k, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def table(rows, delimiter=",") -> bytes:
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter).writerows(rows)
    return text.getvalue().encode()


def cinema(path: Path):
    clip = video.VideoFile(path)
    clip.read(range(len(clip)))
    return sum(len(c) for c in clip.chunks())


@dataclass(frozen=True)
class Run(Settings):
    out_dir: Path | None = None
    devices: int | None = None
    steps: int = 3


def work() -> dict:
    return {"x": np.arange(100.0), "y": 1.0}


def run_again(path: Path):
    """A step whose file is damaged is told, or done again; its numbers are never others."""
    folder = path.parent if path.parent.name == "run" else path.parent.parent
    found = RunFolder(Run(out_dir=folder)).step("s", work)
    assert (found["x"] == work()["x"]).all() and found["y"] == 1, "other numbers"


def squared(net, batch, step):
    return net(batch).square().mean()


def go_on(path: Path) -> dict:
    """A training whose checkpoint is damaged goes on from the one before; its weights are never others."""
    torch.manual_seed(0)
    net, x = torch.nn.Linear(4, 1), torch.randn(16, 4)
    fit(net, squared, x, torch.optim.SGD(net.parameters(), 0.1), Recipe(steps=6, batch_size=4, checkpoint_every=2),
        folder=path.parents[1], device="cpu")
    shutil.rmtree(path.parents[1] / "logs", ignore_errors=True)         # each start has one of its own
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def gone_on(path: Path):
    calm = go_on(path.parents[2] / "calm/checkpoints/x")
    shutil.rmtree(path.parents[2] / "calm")
    found = go_on(path)
    assert all(torch.equal(calm[name], found[name]) for name in calm), "other weights"


def applied(path: Path):
    """What `apply` says of a file of an odd name, beside a good one."""
    rows = apply_each(path.parent, lambda item: {"mean": float(item.picture().mean())}, path.parent.parent / "applied")
    shutil.rmtree(path.parent.parent / "applied")
    assert len(rows) == 2 and sum("error" in row for row in rows) <= 1, rows
    assert all(c.isprintable() for row in rows for c in row["input"])
    for row in rows:
        if "error" in row:
            assert "failed (" not in row["error"], row["error"]
            raise UserError(row["error"])


def unpack(path: Path):
    """Whole, or nothing: the folder is there only when everything is in it."""
    target = path.parent / "unpacked"
    try:
        faces.extract(path, target)
        assert any(p.is_file() for p in target.rglob("*"))
    except UserError:
        assert not target.exists(), "half unpacked"
        raise
    finally:
        shutil.rmtree(target, ignore_errors=True)


def goods(place: Path) -> dict:
    """kind → (file to be damaged, what reads it). Writes the good files below `place`."""
    png, jpg = encoded(".png"), encoded(".jpg")
    write_weights(place / "w.safetensors", {"a.weight": torch.ones(8, 8), "b": torch.arange(5)})
    films = {"film.mp4": "libx264", "film.avi": "mpeg4", "film.ts": "mpeg2video", "film.mkv": "libx264",
             "film.mpg": "mpeg1video", "film.mov": "mpeg4"}
    for name, codec in films.items():
        film(place / name, codec)
    RunFolder(Run(out_dir=place / "run")).step("s", work)
    step, = (place / "run/steps").glob("s*.npz")
    go_on(place / "training/checkpoints/x")
    checkpoint = max((place / "training/checkpoints").iterdir()).relative_to(place)
    odd = (b"M\xfcller.png".decode(errors="surrogateescape"), "\x1b[2J.png", "n" * 200 + ".png")
    for k in range(len(odd)):
        (place / f"odd{k}").mkdir()
        (place / f"odd{k}/good.png").write_bytes(png)
    (place / "spoof").mkdir()
    for name in ("celeba/img_align_celeba/a.jpg", "celeba/img_align_celeba/b.jpg", "spoof/a.jpg"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(jpg)
    lists = place / "lists"
    for name in ("A/A_0001", "A/A_0002", "B/B_0001"):
        path = lists / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpg)
    made = {
        "a.png": (png, read_image), "a.jpg": (jpg, read_image), "a.webp": (encoded(".webp"), read_image),
        "a.bmp": (encoded(".bmp"), read_image), "a.tiff": (encoded(".tiff"), read_image),
        **{name: ((place / name).read_bytes(), cinema) for name in films},
        "run/config.json": ((place / "run/config.json").read_bytes(), run_again),
        f"run/steps/{step.name}": (step.read_bytes(), run_again),
        str(checkpoint): ((place / checkpoint).read_bytes(), gone_on),
        **{f"odd{k}/{name}": (png, applied) for k, name in enumerate(odd)},
        "spoof/list.txt": (b"# live=1\na.jpg 1\na.jpg 0\n", spoof.read_list),
        "celeba/identity_CelebA.txt": (b"a.jpg 1\nb.jpg 1\n", lambda p: photosets.celeba_sets(p.parent, 2, split=None)),
        "dfdc/dataset.json": (json.dumps({"m/a.mp4": {"label": "fake", "set": "test"}}).encode(),
                              lambda p: forgery.read_dfdc_preview(p.parent)),
        "bench.json": (json.dumps({"X": {"FF-DF": {"test": {"c23": {"v": {"frames": ["a/frames/0.png"]}}}}}}).encode(),
                       lambda p: forgery.read_deepfakebench(p, "test")),
        "celebdf/List_of_testing_videos.txt": (b"1 a/b.mp4\n0 c/d.mp4\n", lambda p: forgery.read_celebdf(p.parent)),
        "bfw.csv": (b"p1,p2,label,att1,att2,fold\na/1.jpg,a/2.jpg,1,x,x,1\n", faces.read_bfw),
        "frames.npy": (None, lambda p: video.FrameArray(Item(p).film()).read([0, 1])),
        "w.safetensors": ((place / "w.safetensors").read_bytes(), read_weights),
        "w.pt": (saved({"a": torch.ones(9, 9)}), read_weights),
        "w.pth": (saved({"state_dict": {"module.a": torch.ones(9)}}), read_weights),
        "faces.zip": (stored(("A/a.png", png), ("B/b.png", png)), unpack),
        "faces.tar.gz": (tarred(("A/a.png", png), ("B/b.png", png)), unpack),
        "images_background.zip": (
            stored(*((f"images_background/{a}/character01/{i}.png", png) for a in ("Greek", "Latin")
                     for i in range(3))),
            fewshot.read_omniglot_zip),
        "pairs.bin": (pickle.dumps(([png, png, jpg, jpg], [True, False])), faces.read_bin),
        "cache.pkl": (pickle.dumps({"data": PIXELS, "labels": [0, 0, 1, 1]}), fewshot.read_pickle),
        "settings.json": (json.dumps({"a": [1, 2, {"b": None}]}).encode(), read_json),
        "lists/pairs.txt": (b"1\t1\nA\t1\t2\nA\t1\tB\t1\n", faces.read_pairs),
        "lists/scores.txt": (b"A/A_0001.jpg 0.5\nB/B_0001.jpg 0.25\n", faces.read_scores),
        "lists/faces.txt": (b"A/A_0001.jpg\t0\nA/A_0002.jpg\t0\nB/B_0001.jpg\t1\n", faces.read_list),
        "clips.txt": (b"film.mp4 20 0\nfilm.mp4 20 1\n", lambda p: video.read_list(p, p.parent)),
        "sth/something-something-v2-train.json": (
            json.dumps([{"id": "1", "template": "Moving [something] up"}]).encode(),
            lambda p: video.read_something(p.parent, "train")),
        "sth/something-something-v2-labels.json": (
            json.dumps({"Moving something up": "0"}).encode(), lambda p: video.read_something(p.parent, "train")),
        "sv1/something-something-v1-train.csv": (b"1;Moving up\n2;Moving down\n",
                                                 lambda p: video.read_something(p.parent, "train")),
        "kin/train.csv": (
            table([("label", "youtube_id", "time_start", "time_end", "split"), ("high jump", "abc", 1, 11, "train")]),
            lambda p: video.read_kinetics(p.parent, "train")),
    }
    (place / "sv1").mkdir()
    (place / "sv1" / "something-something-v1-labels.csv").write_text("Moving up\nMoving down\n")
    np.save(place / "frames.npy", PIXELS)
    for name, (data, _) in made.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if data is not None:
            path.write_bytes(data)
    return {name: reader for name, (_, reader) in made.items()}


def cut(data, chance):
    return data[:chance.randrange(len(data))]


def scribble(data, chance):
    at, n = chance.randrange(len(data)), chance.randint(1, max(1, len(data) // 4))
    return data[:at] + chance.randbytes(n) + data[at + n:]


def flip(data, chance):
    data = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def lose(data, chance):
    at = chance.randrange(len(data))
    return data[:at] + data[at + chance.randint(1, max(1, len(data) // 3)):]


def repeat(data, chance):
    at = chance.randrange(len(data))
    return data[at:] + data[:at]


def replace(data, chance):
    return chance.choice([b"", b"\0" * len(data), b"<html>404 Not Found</html>\n", b"null", b"[]", b"{}", b"\xff\xfe\0",
                          b"a,b\n1\n"])


def shift(data, chance):
    """One line of a text loses or gains a column; other data lose their first bytes."""
    lines = data.split(b"\n")
    if len(lines) < 2 or b"\0" in data:
        return data[chance.randint(1, 16):]
    k = chance.randrange(len(lines))
    lines[k] = chance.choice([b"", lines[k] + b"\tx;y,z 1", lines[k][:len(lines[k]) // 2], b"nan nan nan", b"-1 -1 -1"])
    return b"\n".join(lines)


def recode(data, chance):
    """A text as other programs save it."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return data[::-1]
    at = chance.randrange(len(text))
    return chance.choice([data.decode().encode("utf-8-sig"), text.encode("utf-16"), text.encode("utf-32"),
                          (text[:at] + "ü" + text[at:]).encode("latin-1"), text.replace("\n", "\r\n").encode()])


def lead_out(data, chance):
    """A name in a text climbs out of its folder, or is none."""
    if b"\0" in data:
        return data[len(data) // 2:]
    at = chance.choice([0, *(m.end() for m in re.finditer(rb'[\n\t," /]', data))])
    name = chance.choice([b"../../../", b"/etc/", b"C:\\", b"x" * 5000, "²".encode(), b"\\..\\", b"inf", b"9" * 30])
    return data[:at] + name + data[at:]


WAYS = (cut, scribble, flip, lose, repeat, replace, shift, recode, lead_out)


def torment(count: int, seed: int, place: Path) -> tuple[int, int, list[str]]:
    """Damage `count` inputs; returns (refused clearly, read all the same, defects)."""
    readers = goods(place)
    for name, reader in readers.items():
        reader(place / name)                            # each is good to begin with
    files = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    refused, read, defects = 0, 0, []
    chance = random.Random(seed)
    for k in progress(range(count), label="damaged inputs"):
        name, way = list(readers)[k % len(readers)], chance.choice(WAYS)
        path = place / name
        path.write_bytes(way(files[path], chance))
        what = f"{name}, {way.__name__} (input {k})"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                readers[name](path)
            read += 1
        except UserError as error:
            refused += 1
            if shown(path.name) not in str(error) and path.parent.name not in str(error) or "\n" in str(error):
                defects.append(f"{what}: the message does not name the file in one line: {error}")
        except Exception as error:
            defects.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        path.write_bytes(files[path])
        if left := {p for p in place.rglob("*") if p.is_file()} ^ set(files):
            defects.append(f"{what}: left {sorted(map(str, left))}")
            break
    return refused, read, defects


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        refused, read, defects = torment(options.count, options.seed, Path(place))
    print(f"{options.count} damaged inputs: {refused} refused clearly, {read} read all the same, "
          f"{len(defects)} defects", *defects, sep="\n")
    raise SystemExit(bool(defects))


if __name__ == "__main__":
    main()
