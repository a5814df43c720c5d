"""The data and the training loop of benchmarks/."""

import gzip
import struct
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytest.importorskip("sklearn")
torchvision = pytest.importorskip("torchvision")

import data  # noqa: E402
import fashion_mnist  # noqa: E402
import training  # noqa: E402


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_fashion_mnist(folder: Path, suffix: str = ".gz") -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", 20), ("t10k", 10)):
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", rng.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", np.arange(count) % 10)


def no_network(*arguments, **settings):
    raise RuntimeError("no network")


def write_images(
    root: Path, halves: tuple[str, ...] = ("train", "val"), classes: tuple[str, ...] = ("cat", "dog")
) -> None:
    image_module = pytest.importorskip("PIL.Image")
    for half in halves:
        for label in classes:
            (root / half / label).mkdir(parents=True)
            for number in range(3):
                pixels = np.full((12, 10, 3), 40 * number, dtype=np.uint8)
                image_module.fromarray(pixels).save(root / half / label / f"{number}.png")


class TestData:
    def test_digits_have_the_shape_that_the_record_says(self):
        digits = data.load("digits")
        images, labels = next(digits.train.batches(7))
        assert images.shape == (7, digits.in_chans, digits.image_size, digits.image_size) == (7, 1, 24, 24)
        assert (images.dtype, labels.dtype, digits.num_classes) == (torch.float32, torch.int64, 10)
        assert (len(digits.train), len(digits.test)) == (1437, 360)

    def test_digits_are_normalised_by_the_training_half(self):
        train = data.load("digits").train.images
        assert abs(train.mean()) < 1e-5
        assert abs(train.std() - 1) < 1e-5

    def test_digits_are_split_class_by_class_and_without_leakage(self):
        digits = data.load("digits")
        train, test = ({image.numpy().tobytes() for image in half.images} for half in (digits.train, digits.test))
        assert len(train) == 1437
        assert not train & test
        shares = digits.test.labels.bincount() / (digits.test.labels.bincount() + digits.train.labels.bincount())
        assert ((shares - 0.2).abs() < 0.005).all()

    def test_digits_are_the_same_whatever_the_seed(self):
        first = data.load("digits")
        torch.manual_seed(1)
        np.random.seed(1)
        assert torch.equal(first.test.images, data.load("digits").test.images)

    def test_batches_of_a_test_hold_everything_in_order_once(self):
        split = data.MemorySplit(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
        assert [labels.tolist() for _, labels in split.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]

    def test_shuffled_batches_are_whole_and_pair_images_with_their_labels(self):
        split = data.MemorySplit(torch.arange(10.0).view(10, 1, 1, 1), torch.arange(10))
        batches = list(split.batches(4, shuffle=True))
        labels = torch.cat([labels for _, labels in batches])
        assert len(batches) == 2
        assert len(labels.unique()) == 8
        assert torch.equal(torch.cat([images.flatten() for images, _ in batches]), labels.float())
        assert [len(labels) for _, labels in split.batches(64, shuffle=True)] == [10]

    def test_only_shuffled_batches_are_augmented(self):
        split = data.MemorySplit(torch.ones(8, 1, 4, 4), torch.zeros(8).long(), augment=lambda images: 2 * images)
        assert next(split.batches(8))[0].max() == 1
        assert next(split.batches(8, shuffle=True))[0].max() == 2

    def test_crop_and_flip_cut_a_window_of_each_image(self):
        image = torch.arange(1.0, 13).view(1, 1, 3, 4)
        found = {crop.numpy().tobytes() for crop in data.random_crop_and_flip(image.expand(400, 1, 3, 4), padding=1)}
        padded = nn.functional.pad(image, [1] * 4)
        windows = [padded[..., row : row + 3, column : column + 4] for row in range(3) for column in range(3)]
        expected = {window.flip(3).contiguous().numpy().tobytes() for window in windows}
        expected |= {window.contiguous().numpy().tobytes() for window in windows}
        assert found == expected

    def test_cifar10_says_what_to_do_when_it_is_nowhere(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torchvision.datasets, "CIFAR10", no_network)
        with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*no network.*--data-dir"):
            data.load("cifar10", tmp_path)

    def test_cifar10_is_in_memory_with_channels_first(self, monkeypatch):
        class Fake:
            def __init__(self, root, train, download):
                self.data = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
                self.targets = [number % 10 for number in range(20)]

        monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
        cifar10 = data.load("cifar10")
        assert next(cifar10.train.batches(5, shuffle=True))[0].shape == (5, 3, 32, 32)
        assert (cifar10.in_chans, cifar10.image_size, cifar10.num_classes) == (3, 32, 10)

    def test_a_folder_of_images(self, tmp_path):
        write_images(tmp_path)
        folder = data.load("imagefolder", tmp_path).resized(8)
        folder = replace(folder, train=replace(folder.train, workers=0), test=replace(folder.test, workers=0))
        images, labels = next(folder.test.batches(4))
        assert (images.shape, labels.tolist(), folder.num_classes) == ((4, 3, 8, 8), [0, 0, 0, 1], 2)
        assert len(folder.test) == 6
        assert next(folder.train.batches(4, shuffle=True))[0].shape == (4, 3, 8, 8)

    def test_a_folder_without_the_halves_or_with_other_classes_is_refused(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="must hold a folder train"):
            data.load("imagefolder", tmp_path)
        write_images(tmp_path, ("train",))
        write_images(tmp_path, ("test",), ("cat", "cow"))
        with pytest.raises(ValueError, match="classes of train and test differ"):
            data.load("imagefolder", tmp_path)
        with pytest.raises(ValueError, match="needs a data_dir"):
            data.load("imagefolder")

    def test_an_unknown_name_is_refused(self):
        with pytest.raises(ValueError, match=r"name must be one of digits, .*, got 'mnist'"):
            data.load("mnist")


class TestFashionMnist:
    @pytest.mark.parametrize("name", ["a.gz", "a"])
    def test_idx_files_are_read(self, tmp_path, name):
        expected = np.arange(24).reshape(4, 3, 2)
        write_idx(tmp_path / name, expected)
        assert torch.equal(fashion_mnist.read_idx(tmp_path / name), torch.as_tensor(expected, dtype=torch.uint8))

    @pytest.mark.parametrize(
        ("content", "rule"),
        [
            (b"", "is not an idx file"),
            (b"\x00\x00\x0d\x01", "is not an idx file"),
            (b"\x00\x00\x08\x02\x00\x00", "is not an idx file"),
            (b"\x00\x00\x08\x01\x00\x00\x00\x05abc", r"must hold \(5,\) entries after its header, got 3 bytes"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, content, rule):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match=rule):
            fashion_mnist.read_idx(tmp_path / "a")

    @pytest.mark.parametrize("place", [".", "FashionMNIST/raw"])
    @pytest.mark.parametrize("suffix", [".gz", ""])
    def test_it_is_found_in_the_data_dir(self, monkeypatch, tmp_path, place, suffix):
        monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nowhere")
        write_fashion_mnist(tmp_path / place, suffix)
        found = data.load("fashion-mnist", tmp_path)
        assert (found.train.images.shape, len(found.test)) == ((20, 1, 28, 28), 10)
        assert (found.in_chans, found.image_size, found.num_classes) == (1, 28, 10)

    def test_the_package_of_debian_comes_first(self, monkeypatch, tmp_path):
        monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "debian")
        write_fashion_mnist(tmp_path / "debian")
        write_fashion_mnist(tmp_path)
        assert fashion_mnist.find(tmp_path) == tmp_path / "debian"

    def test_it_says_what_to_install_when_it_is_nowhere(self, monkeypatch, tmp_path):
        monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "nowhere")
        monkeypatch.setattr(torchvision.datasets, "FashionMNIST", no_network)
        with pytest.raises(FileNotFoundError, match=r"no network.*apt-get install dataset-fashion-mnist.*--data-dir"):
            data.load("fashion-mnist", tmp_path)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))


def trained(seed: int, **recipe: float) -> tuple[nn.Module, dict[str, float]]:
    training.seed_everything(seed)
    model = small_model()
    return model, training.fit(model, data.load("digits").resized(8).train, training.Recipe(**recipe))


class TestTraining:
    def test_training_learns_the_digits(self):
        test = data.load("digits").resized(8).test
        before, after = training.evaluate(small_model(), test), training.evaluate(trained(0, epochs=3)[0], test)
        assert before["accuracy"] < 0.4
        assert after["accuracy"] > 0.9
        assert after["loss"] < before["loss"]

    def test_a_seed_repeats_a_training_to_the_bit(self):
        (first, metrics), (second, same) = trained(3, epochs=1), trained(3, epochs=1)
        assert metrics == same
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
        assert trained(4, epochs=1)[1] != metrics

    def test_each_epoch_is_reported(self):
        seen = []
        training.fit(
            small_model(),
            data.load("digits").resized(8).test,
            training.Recipe(epochs=2),
            lambda epoch, loss: seen.append((epoch, type(loss))),
        )
        assert seen == [(1, float), (2, float)]

    def test_evaluation_counts_every_image_and_keeps_the_mode(self):
        images, labels = torch.eye(3).view(3, 3, 1, 1), torch.tensor([0, 1, 1])
        model = nn.Flatten()
        found = training.evaluate(model.train(), data.MemorySplit(images, labels), batch_size=2)
        assert found["accuracy"] == pytest.approx(2 / 3)
        assert found["loss"] == pytest.approx(nn.functional.cross_entropy(torch.eye(3), labels).item())
        assert model.training

    def test_divergence_is_an_error(self):
        with pytest.raises(FloatingPointError, match=r"training diverged in epoch 1.*smaller learning rate"):
            trained(0, epochs=2, lr=float("nan"))
