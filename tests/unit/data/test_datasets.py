"""Data sets: what they hold, their batches, and the errors for files that are missing or damaged.

Tests of real files read the folder ``MPICOMP_DATA`` and fail if it is set but lacks a file.
"""

import importlib.util
import os
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from mpicomp.data import images
from mpicomp.data.dataset import crop_and_flip
from mpicomp.data.datasets import load
from mpicomp.data.files import FOLDER_VARIABLE, data_folder
from mpicomp.data.partition import partition
from mpicomp.errors import ConfigError, DataError

REAL = os.environ.get(FOLDER_VARIABLE)
needs_real_data = pytest.mark.skipif(not REAL, reason=f"{FOLDER_VARIABLE} is not set: no folder of real data")


@pytest.fixture
def small(monkeypatch):
    """Let the image sets have 30 training and 20 test images."""
    counts = (("train", 30), ("test", 20))
    monkeypatch.setattr(images, "IMAGE_COUNTS", {"fashion_mnist": counts, "cifar10": counts})


def write_images(path, shape, counts=(30, 20), classes=10):
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for split, n in zip(("train", "test"), counts, strict=True):
            file[f"{split}/images"] = generator.integers(0, 256, (n, *shape), dtype=np.uint8)
            file[f"{split}/labels"] = (np.arange(n) % classes).astype(np.uint8)
    return path


def test_digits_are_split_by_class_and_normalized():
    digits = load("digits")
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert (digits.input_shape, digits.classes, digits.task) == ((1, 8, 8), 10, "classification")
    assert np.bincount(digits.test.labels.numpy()).min() >= 35
    inputs, targets = digits.batch("train", np.arange(1438))
    assert inputs.dtype == torch.float32 and targets.dtype == torch.int64
    assert abs(float(inputs.mean())) < 0.02 and abs(float(inputs.std()) - 1) < 0.02
    assert torch.equal(load("digits").train.labels, digits.train.labels)


def test_validation_samples_are_taken_out_of_training_by_class():
    whole = load("digits")
    split = whole.with_validation(300)
    assert split.evaluated_on == "validation" and whole.evaluated_on == "test"
    assert len(split.train) + len(split.test) == len(whole.train) and abs(len(split.test) - 300) < 10
    counts = [torch.bincount(samples.labels, minlength=10) / len(samples) for samples in (split.train, split.test)]
    torch.testing.assert_close(*counts, rtol=0.05, atol=0)
    rows = {tuple(image.flatten().tolist()) for image in split.train.inputs}
    assert not rows & {tuple(image.flatten().tolist()) for image in split.test.inputs}
    assert torch.equal(whole.with_validation(300).test.inputs, split.test.inputs)


@pytest.mark.parametrize("count", [1440, -1])
def test_validation_leaves_samples_for_training(count):
    with pytest.raises(ConfigError, match=rf"data.validation = {count}: must be less than the \d+ training samples"):
        load("digits").with_validation(count)


def test_digits_are_those_of_scikit_learn():
    images, labels = load_digits(return_X_y=True)
    digits = load("digits")
    for split, count in ((digits.train, 1438), (digits.test, 359)):
        assert split.inputs.dtype == torch.uint8 and split.labels.dtype == torch.int64
        rows = np.column_stack([split.inputs.flatten(1).numpy(), split.labels.numpy()])
        theirs = {tuple(row): number for number, row in enumerate(np.column_stack([images, labels]).astype(int))}
        order = [theirs[tuple(row)] for row in rows.astype(int)]
        assert len(order) == count and order == sorted(order)


def test_digits_need_scikit_learn(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load("digits")


def test_batches_follow_the_indices():
    digits = load("digits")
    chosen = np.array([7, 3, 3, 100])
    inputs, targets = digits.batch("test", chosen)
    assert torch.equal(targets, digits.test.labels[torch.from_numpy(chosen)])
    assert torch.equal(inputs[1], inputs[2])
    expected = (digits.test.inputs[7].float() / 16 - 0.3053) / 0.3760
    torch.testing.assert_close(inputs[0], expected)


def test_images_are_normalized_per_channel(tmp_path, small):
    path = write_images(tmp_path / "cifar10.h5", (32, 32, 3))
    cifar = load("cifar10", tmp_path)
    assert cifar.input_shape == (3, 32, 32)
    inputs, targets = cifar.batch("train", np.array([5, 2]))
    with h5py.File(path) as file:
        pixel = file["train/images"][5, 10, 20].astype(float)
        assert targets.tolist() == [5, 2]
    expected = (pixel / 255 - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    np.testing.assert_allclose(inputs[0, :, 10, 20].numpy(), expected, rtol=1e-5)


def test_a_file_can_be_given_in_place_of_its_folder(tmp_path, small):
    path = write_images(tmp_path / "renamed.h5", (28, 28))
    assert load("fashion_mnist", path).input_shape == (1, 28, 28)


def test_the_folder_is_the_path_then_the_variable_then_here(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    assert data_folder(None) == Path("data")
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    assert data_folder(None) == tmp_path
    assert data_folder(Path("other")) == Path("other")


def test_a_missing_file_is_named_with_the_remedy(tmp_path, monkeypatch):
    with pytest.raises(DataError) as caught:
        load("fashion_mnist", tmp_path)
    for part in (
        "fashion_mnist.h5",
        str(tmp_path),
        "data.path",
        FOLDER_VARIABLE,
        "mpicomp data fetch fashion_mnist",
    ):
        assert part in str(caught.value)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(DataError, match=r"MPICOMP_DATA or \./data, as data\.path is not set"):
        load("cifar10")


def truncate(path):
    path.write_bytes(path.read_bytes()[:2000])


def replace(name, value):
    def change(path):
        with h5py.File(path, "a") as file:
            del file[name]
            if value is not None:
                file[name] = value

    return change


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "HDF5 cannot read it"),
        (lambda path: path.write_bytes(b"no HDF5 at all"), "HDF5 cannot read it"),
        (replace("test/labels", None), "it has no array test/labels"),
        (replace("train/images", np.zeros((30, 28, 27), np.uint8)), r"train/images is uint8 \(30, 28, 27\) instead of"),
        (replace("train/images", np.zeros((30, 28, 28))), r"train/images is float64"),
        (replace("train/labels", np.zeros(29, np.uint8)), r"train/labels is uint8 \(29,\) instead of uint8 \(30,\)"),
        (replace("test/labels", np.full(20, 11, np.uint8)), "test/labels holds 11, but there are 10 classes"),
    ],
)
def test_a_damaged_image_file_is_named_with_the_reason(tmp_path, small, damage, reason):
    path = write_images(tmp_path / "fashion_mnist.h5", (28, 28))
    damage(path)
    with pytest.raises(DataError, match=reason) as caught:
        load("fashion_mnist", tmp_path)
    assert str(path) in str(caught.value) and "'fashion_mnist'" in str(caught.value)


def test_augmentation_depends_on_the_draw_alone_and_spares_the_test_split(tmp_path, small):
    write_images(tmp_path / "cifar10.h5", (32, 32, 3))
    cifar = load("cifar10", tmp_path, augment=True)
    chosen = np.arange(20)
    first, again, other = (cifar.batch("train", chosen, draw=(0, 1, 2, step))[0] for step in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, cifar.batch("train", chosen)[0])
    plain = load("cifar10", tmp_path)
    assert torch.equal(plain.batch("train", chosen, draw=(0, 1, 2, 3))[0], plain.batch("train", chosen)[0])
    assert torch.equal(cifar.batch("test", chosen, draw=(0, 1, 2, 3))[0], plain.batch("test", chosen)[0])


def test_crops_are_shifts_with_black_and_half_are_mirrored():
    images = torch.randint(1, 256, (200, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = crop_and_flip(images, (0, 0, 0, 0))
    assert made.shape == images.shape and made.dtype == torch.uint8
    mirrored = 0
    for image, crop in zip(images, made, strict=True):
        padded = torch.nn.functional.pad(image, [4] * 4)
        windows = padded.unfold(1, 32, 1).unfold(2, 32, 1)
        straight = (windows == crop[:, None, None]).flatten(3).all(dim=3).all(dim=0).any()
        flipped = (windows == crop.flip(2)[:, None, None]).flatten(3).all(dim=3).all(dim=0).any()
        assert straight or flipped
        mirrored += bool(flipped)
    assert 70 < mirrored < 130


def test_a_text_is_cut_into_windows_that_predict_every_character_once(tmp_path):
    words = "the quick brown fox jumps over the lazy dog. " * 40
    (tmp_path / "input.txt").write_text(words)
    text = load("text", tmp_path, context=16)
    assert (text.task, text.input_shape, text.classes) == ("language", (16,), len(set(words)))
    assert len(text.train) == (len(words) - len(words) // 10 - 1) // 16
    inputs, targets = text.batch("train", np.arange(len(text.train)))
    alphabet = sorted(set(words))
    assert "".join(alphabet[i] for i in inputs.flatten()) == words[: inputs.numel()]
    assert "".join(alphabet[i] for i in targets.flatten()) == words[1 : 1 + targets.numel()]
    assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
    with pytest.raises(ConfigError, match="one class only"):
        partition("dirichlet", text.train_labels, 4, 0)


def test_texts_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "input.txt"
    path.write_text("short " * 20)
    with pytest.raises(DataError, match=r"data\.context = 64: .*has 108 tokens .* 12 for testing"):
        load("text", tmp_path)
    with pytest.raises(ConfigError, match=r"data\.context = 0: must be at least 1"):
        load("text", tmp_path, context=0)
    path.write_bytes(b"\xff\xfe\xfa" * 100)
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load("text", tmp_path)
    path.write_text("".join(chr(0x4E00 + i) for i in range(3000)))
    with pytest.raises(DataError, match=r"3000 different characters, but at most 256 .* data\.tokenizer = 'bpe'"):
        load("text", tmp_path)
    (tmp_path / "tinyshakespeare.txt").write_text("First Citizen:\n" * 100)
    with pytest.raises(DataError, match="1500 characters instead of 1115394"):
        load("tinyshakespeare", tmp_path)


LIBSVM = "1 0:1.5 3:2\n-1 1:1\n1 2:0.5\n-1 0:1 3:1\n1 3:1\n-1 2:2\n1 1:3\n-1 0:0.5\n1 0:2\n-1 1:1\n"


def test_libsvm_text_becomes_dense_vectors_and_labels_from_zero(tmp_path):
    (tmp_path / "a.txt").write_text(LIBSVM)
    (tmp_path / "b.txt").write_text("-1 5:1\n1 0:1\n")
    both = load("libsvm", tmp_path, file="a.txt", test_file="b.txt")
    assert (len(both.train), len(both.test), both.input_shape, both.classes) == (10, 2, (6,), 2)
    inputs, targets = both.batch("train", np.array([0, 1]))
    assert inputs.tolist() == [[1.5, 0, 0, 2, 0, 0], [0, 1, 0, 0, 0, 0]]
    assert targets.tolist() == [1, 0]
    alone = load("libsvm", tmp_path / "a.txt")
    assert (len(alone.train), len(alone.test)) == (8, 2)
    assert sorted(alone.test.labels.tolist()) == [0, 1]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1 a:b\n", "is not LIBSVM text"),
        ("", "is not LIBSVM text|it has no samples"),
        ("1 0:inf\n0 0:1\n", "values that are not finite"),
        ("1.5 0:1\n0 0:1\n", "labels are not whole numbers"),
        ("1 0:1\n1 0:2\n", "all its labels are the same"),
        ("1 0:1\n0 0:2\n", "too few samples of each class to keep any for testing"),
    ],
)
def test_damaged_libsvm_text_is_named(tmp_path, content, reason):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=reason):
        load("libsvm", tmp_path, file="a.txt")


def test_a_test_label_that_training_lacks_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text(LIBSVM)
    (tmp_path / "b.txt").write_text("7 0:1\n")
    with pytest.raises(DataError, match=r"label 7 does not occur in a\.txt"):
        load("libsvm", tmp_path, file="a.txt", test_file="b.txt")


def test_synthetic_data_can_be_learned_and_repeats():
    first, second = load("synthetic", noise=0.0), load("synthetic", noise=0.0)
    assert (len(first.train), len(first.test), first.input_shape, first.classes) == (2000, 400, (20,), 4)
    assert torch.equal(first.train.inputs, second.train.inputs)
    assert not torch.equal(first.train.inputs, load("synthetic", data_seed=1).train.inputs)
    one_hot = torch.nn.functional.one_hot(first.train.labels, 4).float()
    teacher = torch.linalg.lstsq(first.train.inputs, one_hot - 0.25).solution
    accuracy = ((first.test.inputs @ teacher).argmax(1) == first.test.labels).float().mean()
    assert accuracy > 0.85


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("fashion", {}, r"data\.kind = 'fashion' is unknown\. Did you mean 'fashion_mnist'\?"),
        (
            "cifar10",
            {"augmnt": True},
            r"data\.augmnt is no parameter of data\.kind = 'cifar10'\. Did you mean 'augment'\?",
        ),
        ("synthetic", {"samples": 0}, r"data\.samples = 0: must be at least 1"),
        ("synthetic", {"classes": 1}, r"data\.classes = 1: must be at least 2"),
        ("synthetic", {"noise": -1.0}, r"data\.noise = -1"),
        ("libsvm", {"test_fraction": 1.0}, r"data\.test_fraction = 1"),
    ],
)
def test_bad_arguments_are_named(kind, params, message):
    with pytest.raises(ConfigError, match=message):
        load(kind, **params)


@needs_real_data
@pytest.mark.parametrize(
    ("kind", "sizes", "shape", "classes"),
    [
        ("fashion_mnist", (60_000, 10_000), (1, 28, 28), 10),
        ("tinyshakespeare", (15_685, 1_742), (64,), 65),
    ],
)
def test_real_files_hold_what_they_should(kind, sizes, shape, classes):
    real = load(kind, Path(REAL))
    assert (len(real.train), len(real.test)) == sizes
    assert (real.input_shape, real.classes) == (shape, classes)


@needs_real_data
def test_real_images_have_mean_zero_and_deviation_one():
    inputs, _ = load("fashion_mnist", Path(REAL)).batch("train", np.arange(0, 60_000, 6))
    assert abs(float(inputs.mean())) < 0.01 and abs(float(inputs.std()) - 1) < 0.01
