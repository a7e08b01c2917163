"""Text and time series."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.zoo.entry import Entry, loader, tokens, waves

VOCABULARY = 12


class Seq2Seq(LightningModule):
    """Recurrent encoder and decoder; at each place the decoder is given the target or its own output, at random."""

    def __init__(self, width: int = 48, forcing: float = 0.5) -> None:
        super().__init__()
        self.forcing = forcing
        self.embedding = nn.Embedding(VOCABULARY, 32)
        self.encoder = nn.GRU(32, width, batch_first=True)
        self.decoder = nn.GRUCell(32, width)
        self.attention = nn.Linear(width, width)
        self.out = nn.Sequential(nn.Linear(2 * width, 64), nn.Tanh(), nn.Linear(64, VOCABULARY))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        states, last = self.encoder(self.embedding(source))
        hidden = last[0]
        token = torch.zeros_like(target[:, 0])
        logits = []
        for position in range(target.size(1)):
            hidden = self.decoder(self.embedding(token), hidden)
            weights = torch.softmax((states @ self.attention(hidden).unsqueeze(2)).squeeze(2), dim=1)
            read = (weights.unsqueeze(2) * states).sum(1)
            logits.append(self.out(torch.cat([hidden, read], dim=1)))
            token = target[:, position] if random.random() < self.forcing else logits[-1].argmax(1)
        return torch.stack(logits, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        source = batch[0]
        target = source.flip(1)
        logits = self(source, target)
        loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), target.reshape(-1))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=2e-3)

    def train_dataloader(self) -> Any:
        return loader(tokens(5))


class Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (each.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class LanguageModel(LightningModule):
    """A small GPT whose head shares the embedding's weights."""

    def __init__(self, width: int = 32, length: int = 8) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe(torch.arange(ids.size(1), device=ids.device))
        for each in self.blocks:
            x = each(x)
        return self.lm_head(self.norm(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids = batch[0]
        logits = self(ids[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
        self.log("perplexity", math.exp(min(loss.item(), 20)))
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        decay = [p for p in self.parameters() if p.dim() >= 2]
        rest = [p for p in self.parameters() if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train_dataloader(self) -> Any:
        return loader(tokens())


class TokenClassifier(LightningModule):
    """PyTorch's transformer encoder tags each token; padded places do not count."""

    def __init__(self, tags: int = 3, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width, padding_idx=0)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, tags)
        self.loss = nn.CrossEntropyLoss(ignore_index=-100)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=padding))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        ids, lengths = batch
        padding = torch.arange(ids.size(1), device=ids.device)[None, :] >= lengths[:, None]
        ids = ids.masked_fill(padding, 0)
        tags = (ids % 3).masked_fill(padding, -100)
        loss = self.loss(self(ids, padding).transpose(1, 2), tags)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)

    def train_dataloader(self) -> Any:
        ids = tokens()
        lengths = torch.randint(4, ids.size(1) + 1, (len(ids),), generator=torch.Generator().manual_seed(5))
        return loader(ids, lengths)


class Forecaster(LightningModule):
    """Two LSTM layers forecast the rest of a series."""

    def __init__(self, width: int = 48, horizon: int = 4) -> None:
        super().__init__()
        self.horizon = horizon
        self.lstm = nn.LSTM(2, width, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, horizon * 2))

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        return self.head(output[:, -1]).view(-1, self.horizon, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        series = batch[0]
        loss = F.huber_loss(self(series[:, : -self.horizon]), series[:, -self.horizon :])
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        # Not ReduceLROnPlateau: Lightning forgets a reduction that comes right after the checkpoint at an epoch's end.
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2)}

    def train_dataloader(self) -> Any:
        return loader(waves(12))


class Causal(nn.Module):
    """A dilated causal convolution with weight norm and a shortcut."""

    def __init__(self, inp: int, out: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv1d(inp, out, 3, dilation=dilation))
        self.skip = nn.Conv1d(inp, out, 1) if inp != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.pad(x, (self.padding, 0))) + self.skip(x))


class TCN(LightningModule):
    """Forecasts every next value of a series."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(Causal(2, width, 1), Causal(width, width, 2), Causal(width, width, 4))
        self.head = nn.Conv1d(width, 2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        series = batch[0].transpose(1, 2)
        return F.mse_loss(self.head(self.layers(series[:, :, :-1])), series[:, :, 1:])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=3e-3)

    def train_dataloader(self) -> Any:
        return loader(waves())


SEQUENCES = {
    "seq2seq with teacher forcing": Entry(Seq2Seq, ("encoder", "decoder", "out")),
    "language model": Entry(LanguageModel, ("blocks.0.mlp", "blocks.1.mlp")),
    "token classification": Entry(TokenClassifier, ("encoder",)),
    "lstm forecaster": Entry(Forecaster, ("lstm", "head")),
    "tcn": Entry(TCN, ("layers",)),
}
