"""The data sets: splits that do not overlap, loaders that repeat themselves, augmentation against one image at a time."""

import sys
from urllib.error import URLError

import lightning
import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as images_of

from evolvenet.errors import EvolveNetError
from experiments.data.folders import FolderData
from experiments.data.images import Augment, BatchLoader, Cifar10Data, DataError, DigitsData, MnistData, NpzData, Split
from tests.helpers.experiments import write_numbered


def numbered(count=24):
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    return Split(images, torch.arange(count))


def first_batch(data):
    data.setup()
    return next(iter(data.train_dataloader()))


def plain(images, generator):
    return images


@pytest.mark.parametrize(
    ("kind", "name", "shape"), [(MnistData, "mnist", (28, 28)), (Cifar10Data, "cifar10", (32, 32, 3))]
)
def test_reads_keras_layout_into_one_uint8_tensor_a_split(tmp_path, kind, name, shape):
    write_numbered(tmp_path / f"{name}.npz", shape)
    data = kind(root=tmp_path, batch_size=8, val_size=10)
    data.setup()
    channels = shape[2] if len(shape) == 3 else 1
    for split, count in (("train", 30), ("val", 10), ("test", 12)):
        images, labels = data.splits[split]
        assert images.dtype == torch.uint8
        assert images.shape == (count, channels, *shape[:2])
        assert torch.equal(images[:, 0, 0, 0] % 10, labels.to(torch.uint8))
    images, labels = next(iter(data.train_dataloader()))
    assert images.dtype == torch.float32
    assert images.shape == (8, channels, *shape[:2])
    assert labels.dtype == torch.int64


def test_validation_comes_out_of_training_and_test_is_apart(tmp_path):
    write_numbered(tmp_path / "mnist.npz", (4, 4))
    found = {}
    for seed in (0, 1):
        data = MnistData(root=tmp_path, batch_size=8, val_size=10, seed=seed)
        data.setup()
        found[seed] = {name: set(split.images[:, 0, 0, 0].tolist()) for name, split in data.splits.items()}
    for parts in found.values():
        assert parts["train"] | parts["val"] == set(range(40))
        assert not parts["train"] & parts["val"]
        assert parts["test"] == set(range(40, 52))
    assert found[0]["val"] != found[1]["val"]


def test_digits_are_real_and_their_test_split_is_the_same_for_every_seed():
    first, second = DigitsData(val_size=180, seed=0), DigitsData(val_size=180, seed=1)
    first.setup("fit")
    second.setup("fit")
    assert [len(first.splits[name].labels) for name in ("train", "val", "test")] == [1257, 180, 360]
    assert torch.equal(first.splits["test"].images, second.splits["test"].images)
    assert first.splits["train"].images.max() == 255
    assert first.splits["train"].labels.bincount().min() > 100


def test_the_folds_of_the_digits_test_every_image_once():
    folds = [DigitsData(val_size=180, fold=fold) for fold in range(6)]
    for data in folds:
        data.setup()
    sizes = [len(data.splits["test"].labels) for data in folds]
    assert sizes == [360, 360, 359, 359, 359, 360]
    assert torch.equal(folds[0].splits["test"].images, folds[5].splits["test"].images)

    def images(*splits):
        return sorted(bytes(image.flatten().tolist()) for split in splits for image in split.images)

    whole = images(*folds[0].splits.values())
    assert images(*(data.splits["test"] for data in folds[:5])) == whole
    assert images(*folds[3].splits.values()) == whole


def test_normalised_pixels_have_mean_zero_and_deviation_one():
    data = DigitsData(val_size=180)
    data.setup()
    pixels = data.normalise(data.splits["train"].images).double()
    assert abs(pixels.mean()) < 1e-5
    assert abs(pixels.std(correction=0) - 1) < 1e-5


def test_order_depends_on_seed_and_epoch_alone():
    def epoch(seed, number):
        loader = BatchLoader(numbered(), 5, plain, shuffle=True, seed=seed)
        loader.sampler.set_epoch(number)
        return [labels.tolist() for _, labels in loader]

    assert epoch(0, 3) == epoch(0, 3)
    assert epoch(0, 3) != epoch(0, 4)
    assert epoch(0, 3) != epoch(1, 3)
    seen = [label for batch in epoch(0, 0) for label in batch]
    assert len(seen) == len(set(seen)) == 20


def test_unshuffled_batches_are_complete_and_in_order():
    loader = BatchLoader(numbered(), 10, plain)
    assert len(loader) == len(list(loader)) == 3
    assert torch.cat([labels for _, labels in loader]).tolist() == list(range(24))


def test_augmented_epochs_repeat_exactly():
    data = DigitsData(batch_size=64, val_size=180, augment=Augment(shift=1, rotation=10))
    data.setup()
    first, second = (list(data.train_dataloader()) for _ in range(2))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(first, second, strict=True))


class CallRecorder(lightning.LightningModule):
    """Notes the labels of every batch."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, index):
        self.seen.append(batch[1].tolist())
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_gives_every_epoch_its_own_order(tmp_path):
    loader = BatchLoader(numbered(), 24, plain, shuffle=True)
    module = CallRecorder()
    trainer = lightning.Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        log_every_n_steps=1, default_root_dir=tmp_path, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(module, loader)
    expected = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        expected += [labels.tolist() for _, labels in loader]
    assert module.seen == expected
    assert expected[0] != expected[1]


def test_shift_moves_every_image_by_whole_pixels_of_its_own():
    images = torch.rand(64, 2, 6, 6)
    shifted = Augment(shift=1)(images, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    found = set()
    for moved, frame in zip(shifted, padded, strict=True):
        offsets = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if torch.allclose(moved, frame[:, y : y + 6, x : x + 6], atol=1e-5)
        ]
        assert len(offsets) == 1
        found.update(offsets)
    assert len(found) == 9


def test_rotation_agrees_with_torchvision_one_image_at_a_time():
    images = torch.rand(5, 1, 12, 12)
    turned = Augment(rotation=30.0)(images, torch.Generator().manual_seed(4))
    angles = (torch.rand(5, generator=torch.Generator().manual_seed(4)) * 2 - 1) * 30
    for image, angle, got in zip(images, angles.tolist(), turned, strict=True):
        expected = images_of.rotate(image, angle, interpolation=InterpolationMode.BILINEAR)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_each_axis_is_stretched_by_a_factor_of_its_own():
    """A ramp's slope is divided by it, from the middle of the image."""
    across, down = torch.linspace(-15, 15, 31).expand(31, 31), torch.linspace(-15, 15, 31)[:, None].expand(31, 31)
    ramps = torch.stack([across, down]).expand(200, 2, 31, 31)
    middle = Augment(stretch=0.5)(ramps, torch.Generator().manual_seed(0))[:, :, 9:22, 9:22]
    lengths = torch.stack([6 / middle[:, 0, 6, 12], 6 / middle[:, 1, 12, 6]], dim=1)
    expected = ramps[:, :, 9:22, 9:22] / lengths[:, :, None, None]
    torch.testing.assert_close(middle, expected, atol=1e-4, rtol=0)
    assert 0.5 < float(lengths.min()) < 0.52
    assert 1.48 < float(lengths.max()) < 1.5
    assert abs(float(torch.corrcoef(lengths.T)[0, 1])) < 0.2


def test_flip_mirrors_about_half_of_the_images():
    images = torch.rand(200, 3, 5, 5)
    flipped = Augment(flip=True)(images, torch.Generator().manual_seed(0))
    same = torch.isclose(flipped, images, atol=1e-5).flatten(1).all(1)
    mirrored = torch.isclose(flipped, images.flip(-1), atol=1e-5).flatten(1).all(1)
    assert bool((same ^ mirrored).all())
    assert 60 < int(mirrored.sum()) < 140


def test_no_augmentation_changes_nothing():
    images = torch.rand(3, 1, 8, 8)
    assert Augment()(images, torch.Generator()) is images


class Unreachable:
    """Stands for torchvision's data set on a machine without a network."""

    def __init__(self, root, train, download):
        print("Downloading from a mirror")
        raise URLError("Name or service not known")


@pytest.mark.parametrize(("kind", "name"), [(MnistData, "MNIST"), (Cifar10Data, "CIFAR10")])
def test_no_data_and_no_network_is_one_clear_line(tmp_path, monkeypatch, capsys, kind, name):
    monkeypatch.setattr(torchvision.datasets, name, Unreachable)
    with pytest.raises(DataError) as caught:
        kind(root=tmp_path / "nowhere").setup()
    message = str(caught.value)
    assert isinstance(caught.value, EvolveNetError)
    assert "\n" not in message
    assert str(tmp_path / "nowhere" / f"{name.lower()}.npz") in message
    assert "Name or service not known" in message
    assert "data.root=DIRECTORY" in message
    assert capsys.readouterr().out == ""


def test_falls_back_to_torchvisions_download(tmp_path, monkeypatch):
    class Downloaded:
        def __init__(self, root, train, download):
            assert download
            assert root == str(tmp_path)
            self.data = torch.full((20 if train else 5, 28, 28), 7, dtype=torch.uint8)
            self.targets = torch.arange(len(self.data)) % 10

    monkeypatch.setattr(torchvision.datasets, "MNIST", Downloaded)
    data = MnistData(root=tmp_path, batch_size=4, val_size=6)
    data.setup()
    assert [len(split.labels) for split in data.splits.values()] == [14, 6, 5]


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"x_train": np.zeros((4, 28, 28), np.uint8)}, "y_train"),
        (
            {
                name: np.zeros((4, 28, 28) if name[0] == "x" else 4)
                for name in ("x_train", "y_train", "x_test", "y_test")
            },
            "float64",
        ),
    ],
)
def test_a_file_of_another_layout_is_refused(tmp_path, arrays, named):
    np.savez(tmp_path / "mnist.npz", **arrays)
    with pytest.raises(DataError, match=named):
        MnistData(root=tmp_path).setup()


def write_folders(root, **classes):
    """A grey image for each class of each split, as bright as its name's first letter."""
    for split, names in classes.items():
        for name in names:
            (root / split / name).mkdir(parents=True)
            Image.new("L", (8, 8), ord(name[0])).save(root / split / name / "0.png")


def test_classes_of_the_test_folder_have_the_labels_of_training(tmp_path):
    write_folders(tmp_path, train=["ant", "bee", "cow"], test=["cow", "bee"])
    train, test = FolderData(tmp_path, size=8).read()
    for images, labels in (train, test):
        assert images[:, 0, 0, 0].tolist() == [ord("abc"[label]) for label in labels.tolist()]


def test_a_class_that_is_not_trained_is_refused(tmp_path):
    write_folders(tmp_path, train=["ant", "cow"], val=["ant", "bee"])
    with pytest.raises(DataError, match=r"in .*val, got bee too"):
        FolderData(tmp_path, size=8).read()


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    (tmp_path / "mnist.npz").write_text("not an archive")
    with pytest.raises(DataError, match=r"mnist\.npz.* Delete the file to have it downloaded"):
        MnistData(root=tmp_path).setup()
    with pytest.raises(DataError, match=r"mnist\.npz.* Replace the file, or set data\.path"):
        NpzData(tmp_path / "mnist.npz").setup()


@pytest.mark.parametrize(("options", "named"), [({"val_size": 1437}, "val_size"), ({"batch_size": 1258}, "batch_size")])
def test_sizes_larger_than_the_data_are_refused(options, named):
    with pytest.raises(DataError, match=named):
        first_batch(DigitsData(**{"val_size": 180, **options}))


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"'\.\[experiments\]'"):
        DigitsData().setup()
