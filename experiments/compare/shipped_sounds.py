"""Sounds with a known pitch or speaker, made from a seed, for the networks of `experiments.compare.shipped_networks`."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RATE = 16_000
"""Samples of sound a second."""


@dataclass(frozen=True)
class Sound:
    """Harmonic tones.

    Args:
        samples: `[count, samples]`.
        pitch: at each sample, Hz.
    """

    samples: Tensor
    pitch: Tensor


def tones(count: int, seconds: float, seed: int, low: float = 70.0, high: float = 800.0) -> Sound:
    """Tones whose pitch glides and vibrates, of harmonics with random strengths, in some noise."""
    draw = torch.Generator().manual_seed(seed)
    time = torch.arange(int(seconds * RATE)) / RATE
    start = low * (high / low) ** torch.rand(count, 1, generator=draw)
    glide = (torch.rand(count, 1, generator=draw) - 0.5) * time / seconds
    vibrato = 0.02 * torch.rand(count, 1, generator=draw) * torch.sin(2 * math.pi * 5 * time)
    pitch = start * 2 ** (0.5 * glide + vibrato)
    phase = 2 * math.pi * (pitch / RATE).cumsum(1)
    strengths = torch.rand(count, 20, generator=draw) / torch.arange(1, 21) ** (
        0.5 + torch.rand(count, 1, generator=draw)
    )
    sound = torch.zeros_like(pitch)
    for number in range(20):
        heard = (number + 1) * pitch < 0.45 * RATE
        sound += strengths[:, number, None] * heard * torch.sin((number + 1) * phase)
    sound = sound / sound.square().mean(1, keepdim=True).sqrt()
    noise = torch.randn(sound.shape, generator=draw) * 0.05 * torch.rand(count, 1, generator=draw)
    return Sound(0.1 * (sound + noise), pitch)


VOWELS = (
    (730, 1090, 2440),
    (270, 2290, 3010),
    (300, 870, 2240),
    (530, 1840, 2480),
    (570, 840, 2410),
    (440, 1020, 2240),
)
"""Formants in Hz (Peterson and Barney 1952)."""


def voices(speakers: int, each: int, seconds: float, seed: int) -> tuple[Tensor, Tensor]:
    """Syllables of vowels with pauses: (`[speakers · each, samples]`, speaker of each)."""
    draw = torch.Generator().manual_seed(seed)
    length, frame = int(seconds * RATE), RATE // 5
    own = [
        (80 + 160 * torch.rand(1, generator=draw), 0.85 + 0.3 * torch.rand(1, generator=draw)) for _ in range(speakers)
    ]
    found = []
    for pitch, size in own:
        for _ in range(each):
            parts = []
            for _ in range(length // frame + 1):
                vowel = VOWELS[int(torch.randint(len(VOWELS), (1,), generator=draw))]
                loud = float(torch.rand(1, generator=draw) > 0.3)
                base = pitch * (0.9 + 0.2 * torch.rand(1, generator=draw))
                numbers = torch.arange(1, int(0.4 * RATE / base) + 1)
                gain = sum(1 / (1 + ((numbers * base - size * f) / 90) ** 2) for f in vowel) / numbers**0.5
                time = torch.arange(frame) / RATE
                rise = torch.sin(math.pi * time * RATE / frame)
                parts.append(
                    loud * rise * (gain[:, None] * torch.sin(2 * math.pi * base * numbers[:, None] * time)).sum(0)
                )
            sound = torch.cat(parts)[:length]
            found.append(0.05 * sound / sound.square().mean().sqrt().clamp(min=1e-3))
    sounds = torch.stack(found)
    return sounds + 0.002 * torch.randn(sounds.shape, generator=draw), torch.arange(speakers).repeat_interleave(each)
