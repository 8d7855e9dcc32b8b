"""Files are written whole or not at all, and read with suspicion."""
import pickle
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from facebook_nb import files
from facebook_nb.files import (
    UserError,
    decode_image,
    load_plain,
    load_strict,
    read_image,
    read_json,
    read_metadata,
    read_text,
    read_weights,
    write_atomic,
    write_image,
    write_json,
    write_weights,
)
from facebook_nb.inputs import write_rows
from tests.conftest import ROOT


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a" / "x.bin"
    with write_atomic(path) as part:
        part.write_bytes(b"old")
    with pytest.raises(RuntimeError), write_atomic(path) as part:
        part.write_bytes(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert list(path.parent.iterdir()) == [path]


def test_json_has_no_nan(tmp_path):
    write_json(tmp_path / "m.json", {"a": float("nan"), "b": np.float32(0.5), "c": torch.arange(2), "d": tmp_path})
    assert read_json(tmp_path / "m.json") == {"a": None, "b": 0.5, "c": [0, 1], "d": str(tmp_path)}
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UserError, match="m.json"):
        read_json(tmp_path / "m.json")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".pgm", ".webp", ".tiff"])
def test_images_come_back(tmp_path, suffix):
    image = np.full((20, 30, 3), (200, 100, 50), np.uint8)
    path = tmp_path / f"x{suffix}"
    write_image(path, image[..., 0] if suffix == ".pgm" else image)
    back = read_image(path)
    assert back.shape == (20, 30, 3) and back.dtype == np.uint8
    expected = np.full(3, 200) if suffix == ".pgm" else image[0, 0]
    assert np.abs(back[0, 0].astype(int) - expected).max() <= 4
    assert read_image(path, grey=True).shape == (20, 30)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".pgm", ".webp", ".tiff"])
def test_too_many_pixels_are_refused(tmp_path, suffix):
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x{suffix}"
    write_image(path, image[..., 0] if suffix == ".pgm" else image)
    with pytest.raises(UserError, match=rf"x{suffix}.*4,?095|x{suffix}.*limit"):
        read_image(path, max_pixels=4095)


@pytest.mark.parametrize("keep", [0, 1, 10, 100, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_cut_off_picture_is_an_error_that_names_it(tmp_path, suffix, keep):
    image = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"cut{suffix}"
    write_image(path, image)
    data = path.read_bytes()
    path.write_bytes(data[:keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(UserError, match=f"cut{suffix}"):
        read_image(path)


def test_not_an_image_is_named():
    with pytest.raises(UserError, match="notes.txt"):
        decode_image(b"dear diary, " * 100, "notes.txt")


def test_weights_keep_values_types_and_metadata(tmp_path):
    tensors = {"a": torch.randn(3, 2), "b": torch.tensor(3), "c": torch.randn(4).bfloat16(), "empty": torch.zeros(0)}
    write_weights(tmp_path / "w.safetensors", tensors, {"step": "7"})
    back = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())
    assert read_metadata(tmp_path / "w.safetensors")["step"] == "7"


def test_the_weights_of_the_package_are_those_in_the_list(tmp_path, monkeypatch):
    for path in sorted(files.SHIPPED.glob("*.safetensors")):
        read_metadata(path)
    assert set(read_json(files.SHIPPED / "digests.json")) == {p.name for p in files.SHIPPED.glob("*.safetensors")}
    monkeypatch.setattr(files, "SHIPPED", tmp_path)
    write_weights(tmp_path / "a.safetensors", {"a": torch.ones(3)}, {"about": '{"side": 3}'})
    files.list_shipped(tmp_path)
    assert files.read_about(tmp_path / "a.safetensors") == {"side": 3}
    write_weights(tmp_path / "a.safetensors", {"a": torch.ones(3)}, {"about": '{"side": 4}'})   # right in itself
    with pytest.raises(UserError, match="a.safetensors: not the file that was shipped"):
        read_weights(tmp_path / "a.safetensors")


def test_a_header_that_was_changed_is_found(tmp_path):
    path = tmp_path / "w.safetensors"
    for about in ('{"side": 3}', "{", "[]", None):
        write_weights(path, {"a": torch.ones(3)}, {"about": about} if about else {})
        if about == '{"side": 3}':
            path.write_bytes(path.read_bytes().replace(b'side\\": 3', b'side\\": 4'))
        with pytest.raises(UserError, match="w.safetensors: (damaged|its header)"):
            files.read_about(path)


def test_one_flipped_bit_is_found(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, {"a": torch.randn(100)})
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        read_weights(path)


class Hostile:
    def __reduce__(self):
        import os
        return os.system, ("touch hacked",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for save in (lambda p: torch.save({"w": Hostile()}, p), lambda p: p.write_bytes(pickle.dumps({"w": Hostile()}))):
        save(tmp_path / "evil.pth")
        with pytest.raises(UserError, match="evil.pth"):
            read_weights(tmp_path / "evil.pth")
    assert not (tmp_path / "hacked").exists()


def test_strict_loading_names_the_tensor():
    layer = torch.nn.Linear(2, 2)
    good = {"module.weight": np.eye(2, dtype=np.float32), "module.bias": np.ones(2, np.float32)}
    assert torch.equal(load_strict(layer, good).bias, torch.ones(2))
    with pytest.raises(UserError, match="surplus.*extra"):
        load_strict(layer, {**good, "module.extra": np.ones(1)})
    with pytest.raises(UserError, match="missing.*bias"):
        load_strict(layer, {"weight": np.eye(2)})
    with pytest.raises(UserError, match=r"ill-shaped.*\(3, 2\)"):
        load_strict(layer, {**good, "module.weight": np.ones((3, 2))})


def named(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def own_addresses():
    """Pickles that name NumPy alone, and whose *states* have eight bytes of theirs followed as an address."""
    body, core = lambda x: pickle.dumps(x, 2)[2:-1], "numpy.core.multiarray"
    for base, state in (("O8", (3, "|", None, None, None, -1, -1, 0)),
                        ("V8", (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)),
                        ("V8", (3, "|", None, ("a",), {"a": (np.dtype("u8"), 1 << 40)}, 8, 1, 0)),
                        ("V8", (3, "|", (np.dtype("O"), (1,)), None, None, 8, 1, 0))):
        kind = named("numpy", "dtype") + body((base, False, True)) + b"R" + body(state) + b"b"
        yield b"\x80\x02" + named(core, "scalar") + kind + body(b"A" * 8) + b"\x86R."
        made = named(core, "_reconstruct") + named("numpy", "ndarray") + body((0,)) + body(b"b") + b"\x87R"
        yield b"\x80\x02" + made + b"(" + body(1) + body((1,)) + kind + body(False) + body(b"A" * 8) + b"tb."
    for name in ("dtype", "_reconstruct"):                  # a state for the function itself
        yield b"\x80\x02" + named("numpy", name) + body((None, {"__defaults__": (1,)})) + b"b."


@pytest.mark.parametrize("data", list(own_addresses()))
def test_a_pickle_sets_no_state_of_numpys(tmp_path, data):
    (tmp_path / "evil.pkl").write_bytes(data)
    with pytest.raises(UserError, match="evil.pkl: refused"):
        load_plain(tmp_path / "evil.pkl")


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_arrays_come_back(tmp_path, protocol):
    words = np.array(["x", "yyy"])
    value = {"a": np.arange(6.0).reshape(2, 3), "f": np.asfortranarray(np.eye(3, 2)), "w": words, "b": np.array([True]),
             "big": np.arange(3, dtype=">i4"), "o": np.array([b"1", [np.arange(2)]], object), "s": np.float32(2),
             "empty": np.zeros((0, 3)), "list": [words, (words, None)]}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol))
    back = load_plain(tmp_path / "a.pkl")
    for name in ("a", "f", "w", "b", "big", "s", "empty"):
        assert np.array_equal(back[name], value[name]) and back[name].dtype == value[name].dtype, name
    assert back["o"][0] == b"1" and (back["o"][1][0] == [0, 1]).all() and (back["list"][1][0] == words).all()
    back["a"][0] = 7                                        # one's own, to be written to


def test_lists_are_utf8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "list.txt"
    for data, words in ((b"\xef\xbb\xbfa\nb", None), (b"a\nb", None), (b"a\n\xfc", "line 2 is not UTF-8"),
                        ("a\nb".encode("utf-16"), "UTF-16; save it as UTF-8")):
        path.write_bytes(data)
        if words is None:
            assert read_text(path) == "a\nb"
        else:
            with pytest.raises(UserError, match=f"list.txt: .*{words}"):
                read_text(path)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    for text in ("[" * 99999, '{"a": ' + "9" * 5000 + "}", ""):
        path.write_text(text)
        with pytest.raises(UserError, match="not readable as JSON"):
            read_json(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="list.txt: an object"):
        read_json(path, dict)
    for odd, words in ((tmp_path, "a folder"), (Path("/dev/zero"), "not a file"), (tmp_path / "gone", "no such file")):
        with pytest.raises(UserError, match=words):
            read_text(odd)


def test_all_lists_are_read_by_the_one_reader():
    for path in (ROOT / "facebook_nb/readers").glob("*.py"):
        assert ".read_text(" not in path.read_text() and "json.load" not in path.read_text(), path.name


def test_grey_of_more_than_eight_bits(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, x in (("a.tif", (grey.astype(np.uint16) * 257).astype(">u2")), ("b.tif", grey.astype(np.int32) * 257),
                    ("c.tif", grey.astype(np.float32) / 255), ("d.tif", grey.astype(np.float32)),
                    ("e.png", grey.astype(np.uint16) * 257), ("f.tif", grey.astype(np.int32))):
        Image.fromarray(x).save(tmp_path / name)
        assert (read_image(tmp_path / name, grey=True) == grey).all(), name
        assert (read_image(tmp_path / name) == grey[..., None]).all(), name
    Image.fromarray(grey.astype(np.float32) - 100).save(tmp_path / "g.tif")
    with pytest.raises(UserError, match="g.tif: values from -100"):
        read_image(tmp_path / "g.tif")


def test_long_strips_and_kinds_that_are_not_read(tmp_path):
    Image.new("L", (1, 60000)).save(tmp_path / "strip.png")
    Image.new("L", (200, 8000)).save(tmp_path / "page.png")
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.gif")
    assert read_image(tmp_path / "page.png").shape == (8000, 200, 3)
    assert read_image(tmp_path / "a.gif").shape == (9, 9, 3)
    for name, words in (("strip.png", "too long for its width"), ("a.jpg", "kind heic, which is not read")):
        with pytest.raises(UserError, match=f"{name}: .*{words}"):
            read_image(tmp_path / name)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    """A limit on the size of files stands for the disk: it needs no privileges."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
        for write in (lambda: write_json(tmp_path / "a.json", ["x" * 1000] * 200),
                      lambda: write_weights(tmp_path / "a.safetensors", {"a": torch.ones(99999)}),
                      lambda: write_image(tmp_path / "a.png", noise),
                      lambda: write_rows(tmp_path, [{"input": "x" * 200}] * 2000)):
            with pytest.raises(UserError, match=r"(a|results)\.\w+: not written, for .*; make room") as caught:
                write()
            assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())
