"""Readers of face data: good files of every format, broken ones, hostile ones, and ORL where it is at hand.

The RecordIO, .bin, pair-list and table files are written here, after the formats' descriptions.
"""
import io
import os
import pickle
import struct
import tarfile
import types
import zipfile
import zlib

import cv2
import numpy as np
import pytest
import torch

from facebook_nb.files import UserError, write_image
from facebook_nb.readers import faces as R

from .conftest import data_folder


def png(shade=0, side=8):
    return cv2.imencode(".png", np.full((side, side, 3), shade, np.uint8))[1].tobytes()


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png() if data is None else data)


@pytest.fixture
def tree(tmp_path):
    """Two people with two pictures each, of shade 10, 20, 30, 40."""
    for k, name in enumerate(("ada/1.png", "ada/2.png", "bob/1.png", "bob/2.png")):
        put(tmp_path / "tree" / name, png(10 * (k + 1)))
    return tmp_path / "tree"


def problems(report):
    return {kind: count for kind, (count, _) in report.problems.items()}


# ---------------------------------------------------------------- folders

def test_tree_gives_sorted_people_and_images(tree):
    faces = R.read_faces(tree)
    assert faces.people == ["ada", "bob"] and faces.labels.tolist() == [0, 0, 1, 1]
    assert [faces.name(i) for i in range(4)] == ["ada/1.png", "ada/2.png", "bob/1.png", "bob/2.png"]
    assert [int(image[0, 0, 0]) for image, _ in faces] == [10, 20, 30, 40]      # iteration ends by itself
    assert faces.load(1, size=4, grey=True).shape == (4, 4) and faces.load(0).shape == (8, 8, 3)
    assert faces.load(-1)[0, 0, 0] == 40
    assert not faces.report.problems and faces.report.usable


def test_deep_trees_links_and_strays(tree, tmp_path):
    put(tree / "Asian" / "m.01" / "m.01_0001.JPG", cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    put(tree / "ada" / "notes.txt", b"x")
    put(tree / "ada" / ".hidden.png")
    put(tree / "stray.png")
    put(tree / "README", b"x")
    (tree / "carol").mkdir()
    (tree / "loop").symlink_to(tree, target_is_directory=True)
    put(tmp_path / "elsewhere" / "1.png")
    (tree / "dora").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    faces = R.read_faces(tree)
    assert faces.people == ["Asian/m.01", "ada", "bob", "dora"] and len(faces) == 6
    assert problems(faces.report) == {
        "file of another kind": 1, "image outside a person folder": 1, "empty person folder": 1,
        "folder reached twice": 1}
    assert "carol" in str(faces.report) and len(str(faces.report).splitlines()) == 5


@pytest.mark.parametrize("make, words", [
    (lambda p: p / "nowhere", "no such file or folder"),
    (lambda p: p, "no images in folders; expected PERSON/IMAGE"),
    (lambda p: put(p / "1.png") or p, "expected PERSON/IMAGE"),
    (lambda p: put(p / "x.zip") or p / "x.zip", "an archive; unpack it first"),
    (lambda p: put(p / "x.doc") or p / "x.doc", "expected a folder of people"),
])
def test_places_without_faces_say_what_was_expected(tmp_path, make, words):
    with pytest.raises(UserError, match=words):
        R.read_faces(make(tmp_path))


def test_damaged_images_are_named_once_and_never_half_read(tree):
    jpeg = cv2.imencode(".jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))[1].tobytes()
    put(tree / "bob" / "3.jpg", jpeg[: len(jpeg) // 2])
    put(tree / "bob" / "4.png", b"")
    head = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)                 # says it is huge
    put(tree / "bob" / "5.png", png()[:12] + head + struct.pack(">I", zlib.crc32(head)) + png()[33:])
    put(tree / "bob" / "6.png", b"not a picture")
    report = R.check(tree)
    assert report.opened == 8 and report.sizes == {(8, 8): 4} and problems(report) == {"unreadable image": 4}
    names = report.problems["unreadable image"][1]
    assert len(names) == 3 and "cut off" in names[0] and "empty" in names[1] and "over the limit" in names[2]
    assert report.usable and "8×8 (4)" in str(report)
    faces = R.read_faces(tree)
    with pytest.raises(UserError, match="3.jpg"):
        list(faces.images())
    (index, images, labels), = faces.images(skip_bad=True)
    assert index.tolist() == [0, 1, 2, 3] and images.shape == (4, 8, 8, 3) and labels.tolist() == [0, 0, 1, 1]
    assert problems(faces.report) == {"unreadable image": 4}


def test_nothing_usable_is_said(tmp_path):
    put(tmp_path / "ada" / "1.png", b"")
    assert not R.check(tmp_path).usable


def test_batches_need_one_size(tree):
    put(tree / "ada" / "0.png", png(0, 16))
    faces = R.read_faces(tree)
    with pytest.raises(UserError, match="differ in size; give images.size=112."):
        list(faces.images())
    batches = list(faces.images(size=5, grey=True, batch=2))
    assert [images.shape for _, images, _ in batches] == [(2, 5, 5), (2, 5, 5), (1, 5, 5)]
    assert batches[2][0].tolist() == [4] and batches[2][1].dtype == np.uint8


def test_selections_keep_people_and_go_through_a_dataloader(tree):
    faces = R.read_faces(tree)
    part = faces.select(faces.labels == 1).select(np.array([1]))
    assert len(part) == 1 and part.load(0)[0, 0, 0] == 40 and part.people[part.labels[0]] == "bob"
    assert part.name(0) == "bob/2.png" and len(faces) == 4
    faces.size, faces.grey = 6, True
    loader = torch.utils.data.DataLoader(faces, batch_size=4, num_workers=1)
    (images, labels), = loader
    assert images.shape == (4, 6, 6) and images.dtype == torch.uint8 and labels.tolist() == [0, 0, 1, 1]
    assert images[:, 0, 0].tolist() == [10, 20, 30, 40]


def test_orl():
    root = data_folder("orl_faces")
    report = R.check(root, sample=None)
    assert (report.people, report.images, report.opened) == (40, 400, 400)
    assert report.sizes == {(92, 112): 400} and report.usable and not problems(report)
    faces = R.read_faces(root)
    assert np.bincount(faces.labels).tolist() == [10] * 40 and faces.people[0] == "s1"
    batches = list(faces.images(size=64, grey=True, batch=150))
    assert [len(index) for index, _, _ in batches] == [150, 150, 100] and batches[0][1].std() > 20


# ---------------------------------------------------------------- RecordIO

MAGIC = struct.pack("<I", 0xCED7230A)


def packed(labels, payload=b"", number=0):
    """Header and payload as MXNet packs them; several labels stand behind the header."""
    if len(labels) == 1:
        return struct.pack("<IfQQ", 0, labels[0], number, 0) + payload
    return struct.pack("<IfQQ", len(labels), 0, number, 0) + np.array(labels, "<f4").tobytes() + payload


def framed(body):
    """One record; split where the magic number stands at a multiple of four, which is then left out."""
    parts, start = [], 0
    for at in range(0, len(body) - 3, 4):
        if body[at : at + 4] == MAGIC:
            parts, start = [*parts, body[start:at]], at + 4
    parts.append(body[start:])
    flags = [0] if len(parts) == 1 else [1, *[2] * (len(parts) - 2), 3]
    return b"".join(MAGIC + struct.pack("<I", k << 29 | len(p)) + p + b"\0" * (-len(p) % 4)
                    for k, p in zip(flags, parts))


def write_records(path, bodies, keys=None, order=None):
    offsets, at = [], 0
    with path.open("wb") as file:
        for body in bodies:
            offsets.append(at)
            at += file.write(framed(body))
    lines = [f"{k}\t{o}\n" for k, o in zip(range(len(bodies)) if keys is None else keys, offsets)]
    path.with_suffix(".idx").write_text("".join(lines if order is None else [lines[k] for k in order]))


def training_set(path, counts, classes=None, ranges=None, order=None):
    """insightface's layout: record 0, the images, a record a person."""
    classes = range(len(counts)) if classes is None else classes
    n, ends = sum(counts), np.cumsum([0, *counts]) + 1
    images = [packed([k], png(shade), 1 + shade) for shade, k in enumerate(np.repeat(list(classes), counts))]
    ranges = list(zip(ends[:-1], ends[1:])) if ranges is None else ranges
    write_records(path, [packed([n + 1, n + 1 + len(counts)]), *images, *[packed(r) for r in ranges]], order=order)


def test_training_set_is_read_at_random(tmp_path):
    training_set(tmp_path / "train.rec", [3, 2, 4], order=np.random.default_rng(0).permutation(13))
    faces = R.read_faces(tmp_path)
    assert faces.labels.tolist() == [0] * 3 + [1] * 2 + [2] * 4 and faces.people == ["0", "1", "2"]
    assert [int(faces.load(i)[0, 0, 0]) for i in (8, 0, 5)] == [8, 0, 5]
    assert faces.name(8).endswith("train.rec, record 9") and faces.report.images == 9
    assert R.check(tmp_path).sizes == {(8, 8): 9} and "RecordIO" in str(faces.report)
    (images, labels), = torch.utils.data.DataLoader(faces, batch_size=9, num_workers=1)
    assert images[:, 0, 0, 0].tolist() == list(range(9)) and labels.tolist() == faces.labels.tolist()


def test_labels_of_a_good_set_take_few_headers(tmp_path, monkeypatch):
    training_set(tmp_path / "train.rec", [30] * 5)
    seen, whole = [], R._header_labels
    monkeypatch.setattr(R, "_header_labels", lambda r, where: seen.append(len(where)) or whole(r, where))
    assert R.read_faces(tmp_path).labels.tolist() == np.repeat(range(5), 30).tolist() and seen == [32]


@pytest.mark.parametrize("ranges", [[(1, 4), (4, 6)], [(1, 3), (3, 6)], [(2, 4), (4, 6)], [(1, 4), (5, 6)]])
def test_labels_come_from_the_headers_where_the_ranges_are_wrong(tmp_path, ranges):
    training_set(tmp_path / "train.rec", [3, 2], classes=[7, 40], ranges=ranges)
    faces = R.read_faces(tmp_path / "train.rec")
    assert faces.labels.tolist() == [0, 0, 0, 1, 1] and faces.people == ["7", "40"]


def test_records_without_people_and_with_several_labels(tmp_path):
    write_records(tmp_path / "a.rec", [packed([4, 9], png(1)), packed([2, 9], png(2)), packed([4], png(3))],
                  keys=[5, 3, 11])
    faces = R.read_faces(tmp_path / "a.idx")
    assert [int(image[0, 0, 0]) for image, _ in faces] == [2, 1, 3] and faces.labels.tolist() == [0, 1, 1]
    write_records(tmp_path / "b.rec", [packed([0], png(1)), packed([1], png(2))])       # key 0 is an image here
    assert len(R.read_faces(tmp_path / "b.rec")) == 2
    with pytest.raises(UserError, match="several of a.rec, b.rec; name one"):
        R.read_faces(tmp_path)


@pytest.mark.parametrize("payload", [MAGIC, b"abcd" + MAGIC, MAGIC * 3 + b"z", b"ab" + MAGIC + b"cd", b"x" * 5, b""])
def test_a_payload_that_holds_the_magic_number_comes_back_whole(tmp_path, payload):
    write_records(tmp_path / "a.rec", [packed([1], payload), packed([2], b"next")])
    records = R.Records(tmp_path / "a.rec")
    assert records[0] == payload and records[1] == b"next"


def test_labels_of_many_records_are_read_in_blocks(tmp_path):
    classes = np.random.default_rng(0).integers(0, 50, 70_000)
    write_records(tmp_path / "a.rec", [packed([k], b"1234") for k in classes])
    assert np.array_equal(R.read_records(tmp_path / "a.rec").labels, classes)


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(how(data))


@pytest.mark.parametrize("file, how, words", [
    ("train.idx", lambda d: b"", "train.idx: missing or empty"),
    ("train.rec", lambda d: b"", "train.rec: missing or empty"),
    ("train.idx", lambda d: d + b"7\n", "not lines of key, tab, offset"),
    ("train.idx", lambda d: b"one\ttwo\n", "not lines of key, tab, offset"),
    ("train.idx", lambda d: b"1\n2\n", "not lines of key, tab, offset"),
    ("train.idx", lambda d: d.replace(b"\t0\n", b"\t-8\n"), "points beyond"),
    ("train.rec", lambda d: d[: len(d) // 2], "points beyond"),
    ("train.idx", lambda d: d.replace(b"0\t0\n", b""), None),
    ("train.rec", lambda d: b"\0" + d[1:], "record 0: damaged"),
])
def test_damaged_record_files_are_named(tmp_path, file, how, words):
    training_set(tmp_path / "train.rec", [3, 2])
    damage(tmp_path / file, how)
    if words is None:                                         # without record 0 all records count as images
        assert problems(R.check(tmp_path))["unreadable image"] == 2
        return
    with pytest.raises(UserError, match=words):
        R.read_faces(tmp_path / "train.rec")


def test_a_record_cut_off_inside_is_named_when_opened(tmp_path):
    write_records(tmp_path / "a.rec", [packed([1], png(1)), packed([1], png(2))])
    damage(tmp_path / "a.rec", lambda d: d[:-20])
    faces = R.read_faces(tmp_path / "a.rec")
    assert faces.load(0)[0, 0, 0] == 1
    with pytest.raises(UserError, match="record 1: damaged"):
        faces.load(1)
    assert problems(R.check(tmp_path / "a.rec")) == {"unreadable image": 1}


# ---------------------------------------------------------------- .bin

class Python2(pickle._Pickler):
    """Writes text and bytes with the string opcodes of Python 2."""

    dispatch = dict(pickle._Pickler.dispatch)

    def old(self, data):
        data = data.encode("latin1") if isinstance(data, str) else data
        self.write(b"T" + struct.pack("<i", len(data)) + data)

    dispatch[str] = dispatch[bytes] = old


def python2(value):
    out = io.BytesIO()
    Python2(out, 2).dump(value)
    return out.getvalue().replace(b"numpy._core.", b"numpy.core.")


IMAGES, SAME = [png(k) for k in (1, 2, 3, 4)], [True, False]
ARRAYS = [np.frombuffer(image, np.uint8) for image in IMAGES]


@pytest.mark.parametrize("data", [
    *[pickle.dumps((IMAGES, SAME), protocol) for protocol in range(6)],
    *[pickle.dumps((ARRAYS, SAME), protocol) for protocol in range(6)],
    pickle.dumps((IMAGES, np.array(SAME)), 2), pickle.dumps((IMAGES, [np.bool_(k) for k in SAME]), 4),
    pickle.dumps([IMAGES, [1, 0]], 2), pickle.dumps((np.array(IMAGES, object), SAME), 2),
    pickle.dumps(([np.full((8, 8, 3), k, np.uint8) for k in (1, 2, 3, 4)], SAME), 5),
    python2((IMAGES, SAME)), python2((ARRAYS, SAME)), python2((ARRAYS, np.array(SAME))),
    pickle.dumps((IMAGES, SAME), 2).replace(b"numpy._core", b"numpy.core"),
])
def test_verification_sets_of_every_protocol(tmp_path, data):
    (tmp_path / "lfw.bin").write_bytes(data)
    pairs = R.read_bin(tmp_path / "lfw.bin")
    assert pairs.same.tolist() == SAME and pairs.same.dtype == bool and pairs.pairs.tolist() == [[0, 1], [2, 3]]
    assert [int(image[0, 0, 0]) for image, _ in R.read_faces(tmp_path / "lfw.bin")] == [1, 2, 3, 4]
    assert R.check(tmp_path / "lfw.bin").sizes == {(8, 8): 4} and "2 pairs" in str(pairs.faces.report)


class Call:
    def __init__(self, function, *args):
        self.how = function, args

    def __reduce__(self):
        return self.how


def hostile():
    yield pickle.dumps(Call(os.system, "echo hacked > hacked"))
    yield pickle.dumps(([Call(eval, "open('hacked', 'w')")], [True]))
    yield pickle.dumps(Call(getattr, "x", "format"))
    yield pickle.dumps(Call(np.save, "hacked", [1]))
    yield pickle.dumps(Call(os.mkdir, "hacked"), 0)
    yield b"\x80\x04\x8c\x05numpy\x8c\x12ndarray.__class__.x\x93."
    yield b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93."
    yield b"\x80\x04\x8c\x05numpy\x8c\x07ndarrayX\x93."
    yield b"cnumpy\nndarray\n(I999999999999\ntR."                # a call of the class would take the memory
    yield b"cbuiltins\nbytes\n(I99999999999\ntR."
    yield b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR."
    yield b"Phacked\n."
    yield b"\x82\x01."


@pytest.mark.parametrize("data", list(hostile()))
def test_a_pickle_that_does_anything_else_is_refused(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.bin").write_bytes(data)
    with pytest.raises(UserError, match="evil.bin: "):
        R.read_bin(tmp_path / "evil.bin")
    assert os.listdir(tmp_path) == ["evil.bin"]


@pytest.mark.parametrize("data, words", [
    (b"", "refused, damaged"),
    (pickle.dumps((IMAGES, SAME))[:-30], "evil.bin: "),
    (b"hello", "evil.bin: "),
    (pickle.dumps((IMAGES[:3], SAME)), "3 images for 2 pairs"),
    (pickle.dumps(([], [])), "0 images for 0 pairs"),
    (pickle.dumps((IMAGES, SAME, 1)), "not images and booleans"),
    (pickle.dumps(([1, 2, 3, 4], SAME)), "a int among the images"),
    (pickle.dumps({"a": 1}), "not images and booleans"),
])
def test_damaged_verification_sets_are_named(tmp_path, data, words):
    (tmp_path / "evil.bin").write_bytes(data)
    with pytest.raises(UserError, match=words):
        R.read_bin(tmp_path / "evil.bin")


def test_a_missing_verification_set_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        R.read_bin(tmp_path / "lfw.bin")


# ---------------------------------------------------------------- lists

def test_two_column_lists(tree):
    lines = "ada/2.png\t10\nbob/1.png\t9\n\nada/1.png\t10\nbob/1.png\t3\n"
    (tree / "train.label").write_text("\ufeff" + lines)
    faces = R.read_faces(tree / "train.label")
    assert faces.people == ["9", "10"] and faces.labels.tolist() == [1, 0, 1]      # numbers sort as numbers
    assert [int(image[0, 0, 0]) for image, _ in faces] == [20, 30, 10]
    assert "bob/1.png (line 5)" in str(faces.report) and problems(faces.report) == {"path listed twice": 1}
    (tree / "sub").mkdir()
    (tree / "sub" / "names.txt").write_text("a b/1.png\tbob\nc.png\tada\n")             # blanks stay in a path
    faces = R.read_list(tree / "sub" / "names.txt", root=tree)
    assert faces.people == ["ada", "bob"] and faces.store[0] == tree / "a b" / "1.png"
    assert problems(R.check(tree / "sub" / "names.txt")) == {"missing image": 2}
    assert not R.check(tree / "sub" / "names.txt").usable


def test_score_lists(tmp_path):
    (tmp_path / "labels.txt").write_text("/data/a/1.jpg\t73.25\n/data/b/2.jpg\t1e-3\n/data/a/1.jpg\t70\n")
    paths, scores, report = R.read_scores(tmp_path / "labels.txt")
    assert paths == ["/data/a/1.jpg", "/data/b/2.jpg"] and scores.tolist() == [73.25, 0.001]
    assert problems(report) == {"path listed twice": 1}


@pytest.mark.parametrize("read, text, words", [
    (R.read_list, "a.png\n", "line 1: 1 columns; expected PATH, tab, LABEL"),
    (R.read_list, "a.png\t1\nb.png\t1\t2\n", "line 2: 3 columns"),
    (R.read_list, "\n\n", "no lines"),
    (R.read_list, "a.png\t1\n../b.png\t1\n", "line 2: '../b.png' leads out"),
    (R.read_list, "/etc/a.png\t1\n", "line 1: '/etc/a.png' leads out"),
    (R.read_pairs, "../a 1 2\n", "leads out"),
    (R.read_bfw, "p1,p2,label,att1,att2,fold\na,/b,1,x,x,1\n", "leads out"),
    (R.read_bfw, "p1,p2,label,att1,att2,fold\na,b,1,x,x,inf\n", "a row lacks a number"),
    (R.read_scores, "a.png\tgood\n", "line 1: 'good' is no number"),
    (R.read_pairs, "10\t300\nA 1\n", "line 2: expected NAME i j or NAME i NAME j"),
    (R.read_pairs, "A one 2\n", "line 1: expected NAME i j"),
    (R.read_pairs, "10\t300\n", "no pairs"),
    (R.read_bfw, "p1,p2,label\na,b,1\n", "no column att1, att2, fold"),
    (R.read_bfw, "", "no column p1"),
    (R.read_bfw, "p1,p2,label,att1,att2,fold\na,b,1,x,x,1\na,b\n", "cut off, or a row lacks .* line 2"),
    (R.read_bfw, "p1,p2,label,att1,att2,fold\na,b,yes,x,x,1\n", "a row lacks a number"),
    (R.read_bfw, "p1,p2,label,att1,att2,fold\n", "cut off"),
])
def test_a_damaged_list_names_its_line(tmp_path, read, text, words):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read(tmp_path / "list.csv")
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "nowhere.csv")


def test_lists_that_are_no_text(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UserError, match="UTF-16; save it as UTF-8"):
        R.read_list(tmp_path / "list.txt")


# ---------------------------------------------------------------- pairs

def test_lfw_pairs_keep_their_order(tmp_path):
    for name, k in (("Ada_L", 1), ("Ada_L", 2), ("Bob", 1)):
        put(tmp_path / "lfw" / name / f"{name}_{k:04d}.jpg", cv2.imencode(".jpg", np.zeros((8, 8, 3)))[1].tobytes())
    (tmp_path / "pairs.txt").write_text("1\t1\nAda_L\t1\t2\nAda_L\t2\tBob\t1\nBob\t7\tAda_L\t1\n")
    pairs = R.read_pairs(tmp_path / "pairs.txt")
    names = [[pairs.faces.name(k) for k in pair] for pair in pairs.pairs]
    assert names == [["Ada_L/Ada_L_0001.jpg", "Ada_L/Ada_L_0002.jpg"], ["Ada_L/Ada_L_0002.jpg", "Bob/Bob_0001.jpg"],
                     ["Bob/Bob_0007.jpg", "Ada_L/Ada_L_0001.jpg"]]
    assert pairs.same.tolist() == [True, False, False] and pairs.faces.people == ["Ada_L", "Bob"]
    a, b = pairs.faces.labels[pairs.pairs].T
    assert ((a == b) == pairs.same).all()
    report = R.check(tmp_path)
    assert report.pairs == 3 and report.problems["missing image"] == [1, ["Bob/Bob_0007.jpg"]] and report.usable


@pytest.mark.parametrize("prefix", ["m.", ""])
@pytest.mark.parametrize("inside", ["test", "."])
def test_rfw_lists(tmp_path, prefix, inside):
    for k, race in enumerate(R.RACES):
        for person, number in (("m.01", 1), ("m.01", 2), ("m.02", 1)):
            put(tmp_path / inside / "data" / race / person / f"{person}_{number:04d}.jpg", png(40 * k))
        put(tmp_path / inside / "txts" / race / f"{race}_pairs.txt",
            f"{prefix}01\t1\t2\n{prefix}01\t2\t{prefix}02\t1\n".encode())
    pairs = R.read_rfw(tmp_path)
    assert pairs.same.tolist() == [True, False] * 4 and pairs.groups.tolist() == np.repeat(R.RACES, 2).tolist()
    assert len(pairs.faces) == 12 and len(pairs.faces.people) == 8
    assert [int(pairs.faces.load(k)[0, 0, 0]) for k in pairs.pairs[::2, 0]] == [0, 40, 80, 120]
    report = R.check(tmp_path)
    assert report.layout == "RFW" and (report.pairs, report.opened) == (8, 12) and not problems(report)
    (tmp_path / inside / "txts" / "Asian" / "Asian_pairs.txt").unlink()
    with pytest.raises(UserError, match="Asian_pairs.txt: missing; RFW needs it, or all of RACE_test.bin"):
        R.read_rfw(tmp_path)


def test_rfw_aligned_sets_come_first(tmp_path):
    for k, race in enumerate(R.RACES):
        images, same = [png(10 * k), png(10 * k + 1)] * (k + 1), [k % 2] * (k + 1)
        put(tmp_path / "test" / f"{race}_test.bin", pickle.dumps((images, same)))
    pairs = R.read_rfw(tmp_path)
    assert pairs.groups.tolist() == np.repeat(R.RACES, [1, 2, 3, 4]).tolist()
    assert pairs.same.tolist() == [False, True, True, False, False, False, True, True, True, True]
    assert [int(pairs.faces.load(k)[0, 0, 0]) for k in pairs.pairs[-1]] == [30, 31]
    assert R.check(tmp_path).pairs == 10


def test_bfw_table(tmp_path):
    rows = ["fold,p1,p2,label,id1,id2,att1,att2,vgg16,a1",
            "1,asian_females/n1/1.jpg,asian_females/n1/2.jpg,1,0,0,asian_females,asian_females,0.7,AF",
            "5,asian_females/n1/2.jpg,white_males/n9/1.jpg,0.0,0,1,asian_females,white_males,0.1,AF"]
    (tmp_path / "bfw-v0.1.5-datatable.csv").write_text("\n".join(rows) + "\n")
    put(tmp_path / "asian_females" / "n1" / "1.jpg", png(5))
    pairs = R.read_bfw(tmp_path / "bfw-v0.1.5-datatable.csv")
    assert pairs.same.tolist() == [True, False] and pairs.groups.tolist() == ["asian_females", ""]
    assert pairs.folds.tolist() == [1, 5] and pairs.faces.people == ["asian_females/n1", "white_males/n9"]
    assert pairs.faces.load(pairs.pairs[0, 0])[0, 0, 0] == 5
    assert problems(R.check(tmp_path / "bfw-v0.1.5-datatable.csv")) == {"missing image": 2}
    with pytest.raises(UserError, match="pandas.read_pickle.*to_csv"):
        R.read_bfw(tmp_path / "bfw.pkl")


# ---------------------------------------------------------------- scikit-learn

def test_sklearn_sets_become_faces(monkeypatch):
    from sklearn import datasets

    images = np.arange(400 * 4, dtype=np.float32).reshape(400, 2, 2) % 256
    monkeypatch.setattr(datasets, "fetch_olivetti_faces", lambda **_: types.SimpleNamespace(
        images=images / 255, target=np.repeat(np.arange(40), 10)))
    monkeypatch.setattr(datasets, "fetch_lfw_people", lambda **o: types.SimpleNamespace(
        images=np.full((2, 4, 4, 3), 9.0), target=np.array([1, 0]), target_names=np.array(["Ada", "Bob"])))
    olivetti, lfw = R.fetch_faces(), R.fetch_faces("lfw")
    assert np.array_equal(olivetti[7][0], images[7].astype(np.uint8)) and olivetti[7][0].ndim == 2
    assert olivetti.load(7, grey=False).shape == (2, 2, 3) and len(olivetti.people) == 40
    assert lfw.people == ["Ada", "Bob"] and lfw[0][1] == 1 and (lfw[0][0] == 9).all()
    assert lfw.load(0, size=2, grey=True).shape == (2, 2)


def test_sklearn_sets_that_are_not_there(tmp_path):
    for name in ("olivetti", "lfw"):
        with pytest.raises(UserError, match=f"{name}: not in scikit-learn's folder"):
            R.fetch_faces(name, data_home=tmp_path, download=False)
    with pytest.raises(UserError, match="olivetti or lfw"):
        R.fetch_faces("yale")


# ---------------------------------------------------------------- archives

def make_zip(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members:
            file.writestr(name, data)


def make_tar(path, members):
    with tarfile.open(path, "w:gz") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            if isinstance(data, tuple):
                info.type, info.linkname = data
                file.addfile(info)
            else:
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))


GOOD = [("set/ada/1.png", png(1)), ("set/bob/1.png", png(2))]


@pytest.mark.parametrize("make, name", [(make_zip, "a.zip"), (make_tar, "a.tar.gz")])
def test_good_archives_unpack_whole(tmp_path, make, name):
    make(tmp_path / name, GOOD)
    faces = R.read_faces(R.extract(tmp_path / name, tmp_path / "out" / "set"))
    assert faces.people == ["set/ada", "set/bob"] and faces.load(1)[0, 0, 0] == 2
    with pytest.raises(UserError, match="not empty; give a new folder"):
        R.extract(tmp_path / name, tmp_path / "out" / "set")
    (tmp_path / "there").mkdir()
    assert R.extract(tmp_path / name, tmp_path / "there").is_dir()
    assert sorted(os.listdir(tmp_path)) == sorted([name, "out", "there"])


def linked_zip(path):
    info = zipfile.ZipInfo("ada/link")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    make_zip(path, [*GOOD, (info, "../../outside")])


@pytest.mark.parametrize("name, make", [
    *[("a.zip", lambda p, m=m: make_zip(p, [*GOOD, (m, b"x")])) for m in (
        "../x", "/x", "a/../../x", "..\\x", "C:\\x", "a/./../../x")],
    *[("a.tar.gz", lambda p, m=m: make_tar(p, [*GOOD, (m, b"x")])) for m in ("../x", "/x", "set/ada/1.png")],
    *[("a.tar.gz", lambda p, k=k: make_tar(p, [*GOOD, ("ada/link", (k, "../../outside"))])) for k in (
        tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)],
    ("a.zip", linked_zip),
])
def test_hostile_archives_leave_nothing(tmp_path, name, make):
    inner = tmp_path / "inner"
    inner.mkdir()
    make(inner / name)
    with pytest.raises(UserError, match="nothing unpacked; .* or stand twice: 1 "):
        R.extract(inner / name, inner / "out")
    assert os.listdir(inner) == [name] and os.listdir(tmp_path) == ["inner"]


@pytest.mark.parametrize("name, make", [("a.zip", make_zip), ("a.tar.gz", make_tar)])
@pytest.mark.parametrize("part", [0.3, 0.9])
def test_cut_off_archives_leave_nothing(tmp_path, name, make, part):
    noise = np.random.default_rng(0).bytes(200_000)
    make(tmp_path / name, [*GOOD, ("set/noise.png", noise)])
    damage(tmp_path / name, lambda d: d[: int(part * len(d))])
    with pytest.raises(UserError, match=f"{name}: not unpacked"):
        R.extract(tmp_path / name, tmp_path / "out")
    assert os.listdir(tmp_path) == [name]


def test_archives_with_a_flipped_byte_or_none_at_all(tmp_path):
    make_zip(tmp_path / "a.zip", [("a/1.png", np.random.default_rng(0).bytes(5000))])
    damage(tmp_path / "a.zip", lambda d: d[:1000] + bytes([d[1000] ^ 1]) + d[1001:])
    with pytest.raises(UserError, match="not unpacked"):
        R.extract(tmp_path / "a.zip", tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        R.extract(tmp_path / "b.zip", tmp_path / "out")
    (tmp_path / "c.zip").write_bytes(b"hello")
    with pytest.raises(UserError, match="c.zip: not unpacked"):
        R.extract(tmp_path / "c.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- the report

def test_the_report_stays_short(tmp_path):
    report = R.ReadReport("here", "folders of people", 3, 5000)
    for k in range(4000):
        report.add("unreadable image", f"{k}.jpg")
    text = str(report)
    assert len(text) < 300 and "4,000 × unreadable image (copy it again, or delete it): 0.jpg; 1.jpg; 2.jpg; …" in text


def test_only_a_sample_is_opened(tree):
    for k in range(60):
        write_image(tree / "zoe" / f"{k}.png", np.full((8, 8, 3), k, np.uint8))
    assert R.check(tree, sample=10).opened == 10 and R.check(tree, sample=None).opened == 64
