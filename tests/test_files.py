"""Files are written whole or not at all, and read with suspicion."""
import pickle

import numpy as np
import pytest
import torch

from facebook_nb.files import (
    UserError,
    decode_image,
    load_strict,
    read_image,
    read_json,
    read_metadata,
    read_weights,
    write_atomic,
    write_image,
    write_json,
    write_weights,
)


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
