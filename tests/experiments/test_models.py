"""The ResNet, its sizes, and that it is an ordinary model."""

from pathlib import Path

import pytest
import torch
import torchvision
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.models import resnet as models
from experiments.models.named import ModelNameError, with_classes
from experiments.models.resnet import BasicBlock, ResNet, UnpaddedBlock, UnpaddedResNet
from experiments.training import classifier
from tests.helpers.paths import CONF


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "images", "blocks", "at_least"),
    [
        ("digits_resnet", (2, 1, 8, 8), 3, 250_000),
        ("mnist_resnet", (2, 1, 28, 28), 6, 2_000_000),
        ("mnist_unpadded", (2, 1, 28, 28), 2, 2_000_000),
        ("cifar10_resnet", (2, 3, 32, 32), 6, 2_000_000),
    ],
)
def test_every_configured_model_maps_images_to_ten_logits(name, images, blocks, at_least):
    model = instantiate(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    assert model(torch.randn(images)).shape == (2, 10)
    assert len(model.blocks) == blocks
    assert parameters(model) >= at_least


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small"])
def test_trained_networks_get_a_last_layer_with_as_many_logits_as_classes(name):
    network = torchvision.models.get_model(name).eval()
    images, before = torch.randn(2, 3, 32, 32), {key: value.clone() for key, value in network.state_dict().items()}
    assert with_classes(network, 1000)(images).shape == (2, 1000)
    assert with_classes(network, 7)(images).shape == (2, 7)
    changed = [key for key, value in network.state_dict().items() if value.shape != before[key].shape]
    assert len(changed) == 2
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items() if key not in changed)


def test_a_trained_network_without_a_dense_layer_is_refused():
    with pytest.raises(ModelNameError, match="SqueezeNet without one"):
        with_classes(torchvision.models.get_model("squeezenet1_1"), 7)


def test_every_width_is_an_argument():
    model = ResNet(in_channels=2, classes=3, widths=(4, 5), blocks=(2, 1), strides=(1, 2), stem_stride=2, hidden=7)
    stem = 4 * 2 * 9 + 2 * 4
    first = 2 * (2 * 4 * 4 * 9 + 4 * 4)
    second = 5 * 4 * 9 + 5 * 5 * 9 + 4 * 5 + 5 * 4 + 2 * 5
    dense = 5 * 7 + 7 + 7 * 3 + 3
    assert parameters(model) == stem + first + second + dense
    assert model(torch.randn(6, 2, 12, 12)).shape == (6, 3)


@pytest.mark.parametrize(("inputs", "width", "stride", "size"), [(3, 3, 1, 8), (3, 5, 1, 8), (3, 3, 2, 4)])
def test_a_block_adds_its_shortcut(inputs, width, stride, size):
    block = BasicBlock(inputs, width, stride).eval()
    x = torch.randn(2, inputs, 8, 8)
    torch.nn.init.zeros_(block.norm2.weight)
    torch.testing.assert_close(block(x), torch.relu(block.shortcut(x)))
    assert block(x).shape == (2, width, size, size)
    assert isinstance(block.shortcut, torch.nn.Identity) == (inputs == width and stride == 1)


@pytest.mark.parametrize("slope", [0.0, 0.2])
def test_an_unpadded_block_adds_the_middle_of_its_input(slope):
    block = UnpaddedBlock(3, 7, slope).eval()
    x = torch.randn(2, 3, 8, 9)
    torch.nn.init.zeros_(block.norm2.weight)
    middle = x[:, :, 2:6, 2:7]
    torch.testing.assert_close(block(x), torch.where(middle > 0, middle, slope * middle))


def test_the_slope_is_that_of_every_relu_of_the_unpadded_network():
    torch.manual_seed(0)
    model = UnpaddedResNet(width=4, inside=(5, 6), negative_slope=1.0).eval()
    # At 1 nothing bends: the blocks are affine, and the stem ends with its norm.
    x, y = torch.randn(2, 3, 4, 13, 13, dtype=torch.float64)
    blocks = model.double().blocks
    torch.testing.assert_close(blocks((x + y) / 2), (blocks(x) + blocks(y)) / 2)
    seen = []
    blocks.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    images = torch.randn(3, 1, 28, 28, dtype=torch.float64)
    model(images)
    torch.testing.assert_close(seen[0], model.norm(model.pool(model.stem(images))))


def test_all_activations_of_the_unpadded_network_can_be_silus(monkeypatch):
    seen, honest = [], torch.nn.functional.silu
    monkeypatch.setattr(torch.nn.functional, "silu", lambda x: seen.append(x) or honest(x))
    monkeypatch.setattr(torch.nn.functional, "leaky_relu", None)
    model = UnpaddedResNet(width=4, inside=(5, 6), silu=True).eval()
    with torch.no_grad():
        model.get_parameter("blocks.0.norm2.weight").zero_()
    images = torch.randn(3, 1, 28, 28)
    model(images)
    assert [x.shape[1] for x in seen] == [4, 5, 4, 6, 4], "the stem's, then two a block: inside and at the end"
    stem = honest(model.norm(model.pool(model.stem(images))))
    torch.testing.assert_close(seen[2], stem[:, :, 2:-2, 2:-2], msg="the block's branch is 0")


def test_stages_of_different_number_are_refused():
    with pytest.raises(ValueError, match="3, 2 and 3"):
        ResNet(blocks=(2, 2))


@pytest.mark.parametrize("module", [models, classifier])
def test_models_and_classifier_do_not_import_evolvenet(module):
    imports = [line for line in Path(module.__file__).read_text().splitlines() if line.startswith(("import", "from"))]
    assert imports
    assert not any("evolvenet" in line for line in imports)
