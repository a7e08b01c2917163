"""Networks over images beyond classifiers: a detector, capsules, pairs, a U-Net with attention gates."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv(nn.Module):
    """A convolution, its norm and SiLU, as the YOLO family has them."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1) -> None:
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(c1, c2, k, s, k // 2, bias=False), nn.BatchNorm2d(c2), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """`[b, c1, h, w]` → `[b, c2, h / s, w / s]`."""
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c, c, 3), Conv(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """One half passes on, the other through bottlenecks; all results concatenated."""

    def __init__(self, c1: int, c2: int, n: int = 2) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1, self.cv2 = Conv(c1, 2 * self.c), Conv((2 + n) * self.c, c2)
        self.m = nn.ModuleList([Bottleneck(self.c) for _ in range(n)])

    def forward(self, x: Tensor) -> Tensor:
        """`[b, c1, h, w]` → `[b, c2, h, w]`."""
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class Csp(nn.Module):
    """YOLOv5's C3: two branches, one of them through bottlenecks, concatenated."""

    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.cv1, self.cv2, self.cv3 = Conv(c1, c2 // 2), Conv(c1, c2 // 2), Conv(c2, c2)
        self.m = nn.Sequential(Bottleneck(c2 // 2), Bottleneck(c2 // 2))

    def forward(self, x: Tensor) -> Tensor:
        """`[b, c1, h, w]` → `[b, c2, h, w]`."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class Sppf(nn.Module):
    """Three poolings one after another, all results concatenated."""

    def __init__(self, c1: int, c2: int, k: int = 5) -> None:
        super().__init__()
        self.cv1, self.cv2, self.m = Conv(c1, c1 // 2), Conv(c1 * 2, c2), nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        """`[b, c1, h, w]` → `[b, c2, h, w]`."""
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Detect(nn.Module):
    """YOLOv8's decoupled heads: the distance to each side as an expectation over bins, and the classes."""

    def __init__(self, nc: int, channels: tuple[int, ...], reg_max: int = 4) -> None:
        super().__init__()
        self.nc, self.reg_max, self.no = nc, reg_max, nc + reg_max * 4
        c2, c3 = 16, 12
        self.cv2 = nn.ModuleList([nn.Sequential(Conv(c, c2, 3), nn.Conv2d(c2, 4 * reg_max, 1)) for c in channels])
        self.cv3 = nn.ModuleList([nn.Sequential(Conv(c, c3, 3), nn.Conv2d(c3, nc, 1)) for c in channels])
        self.dfl = nn.Conv2d(reg_max, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(reg_max, dtype=torch.float).view(1, reg_max, 1, 1)

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Feature maps → `[b, 4 + nc, places]`."""
        found = [torch.cat((self.cv2[i](x), self.cv3[i](x)), 1) for i, x in enumerate(levels)]
        x = torch.cat([level.view(len(level), self.no, -1) for level in found], 2)
        box, classes = x.split((self.reg_max * 4, self.nc), 1)
        b, _, a = box.shape
        sides = self.dfl(box.view(b, 4, self.reg_max, a).transpose(2, 1).softmax(1)).view(b, 4, a)
        return torch.cat((sides, classes.sigmoid()), 1)


class Yolo(nn.Module):
    """A backbone of three levels, a path back up with the levels concatenated, and a detection head at two of them."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem, self.down1, self.down2 = Conv(3, 8, 3, 2), Conv(8, 16, 3, 2), Conv(16, 32, 3, 2)
        self.csp1, self.c2f1, self.sppf = Csp(16, 16), C2f(32, 32), Sppf(32, 32)
        self.up, self.c2f2 = nn.Upsample(scale_factor=2, mode="nearest"), C2f(48, 16)
        self.detect = Detect(classes, (16, 32))

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 3, 32, 32]` → `[b, 9, places]`."""
        p3 = self.csp1(self.down1(self.stem(x)))
        p4 = self.sppf(self.c2f1(self.down2(p3)))
        return self.detect([self.c2f2(torch.cat([self.up(p4), p3], 1)), p4])


def squash(x: Tensor) -> Tensor:
    """A vector shortened to a length below one."""
    square = (x**2).sum(-1, keepdim=True)
    return square / (1 + square) * x / (square + 1e-8).sqrt()


class CapsuleNetwork(nn.Module):
    """Sabour et al. 2017: small vectors, sent on by agreement in three rounds; lengths are the scores."""

    def __init__(self, capsules: int = 4, inner: int = 6, classes: int = 3, outer: int = 5, places: int = 9) -> None:
        super().__init__()
        self.capsules, self.inner = capsules, inner
        self.conv, self.primary = nn.Conv2d(1, 12, 3), nn.Conv2d(12, capsules * inner, 3, stride=2)
        self.weight = nn.Parameter(torch.randn(1, capsules * places, classes, outer, inner) * 0.3)
        self.decoder = nn.Sequential(nn.Linear(classes * outer, 16), nn.ReLU(), nn.Linear(16, 81), nn.Sigmoid())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """`[b, 1, 9, 9]` → lengths `[b, 3]` and an image `[b, 81]`."""
        x = self.primary(functional.relu(self.conv(x)))
        u = squash(x.view(len(x), self.capsules, self.inner, -1).permute(0, 1, 3, 2).flatten(1, 2))
        votes = (self.weight @ u[:, :, None, :, None]).squeeze(-1)
        logits = torch.zeros(*votes.shape[:3], 1, dtype=x.dtype, device=x.device)
        v = votes
        for _ in range(3):
            v = squash((logits.softmax(2) * votes).sum(1, keepdim=True))
            logits = logits + (votes * v).sum(-1, keepdim=True)
        v = v.squeeze(1)
        return v.norm(dim=-1), self.decoder(v.flatten(1))


class Siamese(nn.Module):
    """One encoder over two images; the difference and product of both codes decide."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(12, 16, 3), nn.ReLU()
        )
        self.fc = nn.Linear(16, 20)
        self.head = nn.Sequential(nn.Linear(40, 12), nn.ReLU(), nn.Linear(12, 1))

    def encode(self, x: Tensor) -> Tensor:
        """`[b, 1, h, w]` → `[b, 20]`."""
        return self.fc(self.features(x).mean((2, 3)))

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        """Two images → `[b, 1]`."""
        a, b = self.encode(one), self.encode(two)
        return self.head(torch.cat([(a - b).abs(), a * b], 1))


class Projected(nn.Module):
    """Contrastive learning: normalised projections of both images and their similarities."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.projector = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 10))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, one: Tensor, two: Tensor) -> Tensor:
        """Two images → `[b]` scaled cosines."""
        a, b = (functional.normalize(self.projector(self.encoder(x)), dim=1) for x in (one, two))
        return self.logit_scale.exp() * (a * b).sum(1)


def double_conv(fan_in: int, fan_out: int) -> nn.Sequential:
    """Two convolutions with norms."""
    layers: list[nn.Module] = []
    for fan in (fan_in, fan_out):
        layers += [nn.Conv2d(fan, fan_out, 3, padding=1), nn.BatchNorm2d(fan_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class AttentionUNet(nn.Module):
    """A U-Net whose skips are padded to the size of what comes up, gated by it, and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.inc, self.down1, self.down2 = double_conv(3, 8), double_conv(8, 16), double_conv(16, 24)
        self.up1, self.up2 = nn.ConvTranspose2d(24, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.w_g, self.w_x, self.psi = nn.Conv2d(16, 10, 1), nn.Conv2d(16, 10, 1), nn.Conv2d(10, 1, 1)
        self.merge1, self.merge2, self.outc = double_conv(32, 16), double_conv(16, 8), nn.Conv2d(8, 2, 1)

    @staticmethod
    def fit(up: Tensor, skip: Tensor) -> Tensor:
        """Padded to the size of the skip."""
        dy, dx = skip.size(2) - up.size(2), skip.size(3) - up.size(3)
        return functional.pad(up, [dx // 2, dx - dx // 2, dy // 2, dy - dy // 2])

    def forward(self, x: Tensor) -> Tensor:
        """`[b, 3, h, w]` → `[b, 2, h, w]`."""
        one = self.inc(x)
        two = self.down1(functional.max_pool2d(one, 2))
        x = self.fit(self.up1(self.down2(functional.max_pool2d(two, 2))), two)
        gate = torch.sigmoid(self.psi(functional.relu(self.w_g(x) + self.w_x(two))))
        x = self.merge1(torch.cat([two * gate, x], 1))
        return self.outc(self.merge2(torch.cat([one, self.fit(self.up2(x), one)], 1)))
