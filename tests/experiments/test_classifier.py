"""The classifier of the experiments: what it does with the images' layout and precision."""

from functools import partial
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from experiments.training.classifier import Classifier, Cycles

ADAM = partial(torch.optim.AdamW, lr=1e-3)


def conv() -> nn.Module:
    """A convolution, and an average over what it makes."""
    return nn.Sequential(nn.Conv2d(3, 10, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(("above", "expected"), [(None, torch.float32), (279, torch.bfloat16), (280, torch.float32)])
def test_bfloat16_only_above_so_many_parameters(above, expected):
    """280 parameters: a limit of 279 is passed, one of 280 is not; the loss and the gradients stay float32."""
    module = Classifier(conv(), ADAM, bf16_above=above)
    module.log = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    seen = []
    module.model[0].register_forward_hook(lambda _, __, out: seen.append(out.dtype))  # pyright: ignore
    loss = module.training_step((torch.randn(4, 3, 8, 8), torch.arange(4)), 0)
    loss.backward()
    assert seen == [expected]
    assert loss.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in module.parameters()} == {torch.float32}  # pyright: ignore


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_last_holds_for_images_and_weights_and_changes_no_value(channels_last):
    """Both are laid out as asked, in training and in use, and the outputs are those of the plain network."""
    torch.manual_seed(0)
    plain = conv()
    torch.manual_seed(0)
    module = Classifier(conv(), ADAM, channels_last=channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    seen = []
    module.model[0].register_forward_hook(lambda _, args, __: seen.append(args[0]))  # pyright: ignore
    module.log = lambda *_, **__: None  # pyright: ignore[reportAttributeAccessIssue]
    images = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(module(images), plain(images))
    module.training_step((images, torch.arange(4)), 0)
    module.validation_step((images, torch.arange(4)), 0)
    assert len(seen) == 3
    assert all(each.is_contiguous(memory_format=layout) for each in seen)
    assert module.model[0].weight.is_contiguous(memory_format=layout)  # pyright: ignore


def test_cycles_have_heights_of_their_own():
    """The highest factor of each cycle, and none that is not asked for."""
    cycles = Cycles(steps=100, lengths=(1, 1, 2), warmup=0.2, heights=(0.5, 1, 2))
    factors = [cycles(step) for step in range(100)]
    assert [max(factors[begin:end]) for begin, end in ((0, 25), (25, 50), (50, 100))] == pytest.approx(
        [0.5, 1, 2], abs=1e-5
    )
    plain = Cycles(steps=100, lengths=(1, 1, 2), warmup=0.2)
    assert factors[50] == 2 * plain(50)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_follows_the_cycles_of_its_own_configuration(tmp_path):
    """Of a run of two epochs that goes on for six, the rest has the rates of a run that was to have six from the start."""

    def trained(epochs: int, path: str | None = None, **options: Any) -> tuple[list[float], lightning.Trainer]:
        rates = []
        data = DataLoader(TensorDataset(torch.randn(16, 3, 8, 8), torch.arange(16) % 10), batch_size=4)
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        module = Classifier(conv(), ADAM, **options)
        module.optimizer_step = lambda *args: (  # pyright: ignore[reportAttributeAccessIssue]
            rates.append(args[2].param_groups[0]["lr"]),
            lightning.LightningModule.optimizer_step(module, *args),
        )
        trainer.fit(module, data, ckpt_path=path)
        return rates, trainer

    _, short = trained(2)
    short.save_checkpoint(tmp_path / "short.ckpt")
    asked = {"cycles": (1, 2), "heights": (1, 0.5)}
    whole, _ = trained(6, **asked)
    resumed, _ = trained(6, str(tmp_path / "short.ckpt"), **asked)
    assert len(resumed) == 16, "four epochs of four batches were left"
    assert resumed[1:] == pytest.approx(whole[9:]), (
        "the first step still has the rate the checkpoint's optimizer brought"
    )
