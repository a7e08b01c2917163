"""Several tasks, experts, adapters, anchors, graphs."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F

from tests.helpers.zoo.entry import BATCH, BATCHES, Entry, loader, points


class MultiTask(LightningModule):
    """A classification and a regression, weighted by learned uncertainties (Kendall et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(16, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU())
        self.heads = nn.ModuleDict(
            {"label": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3)), "norm": nn.Linear(64, 1)}
        )
        self.log_vars = nn.Parameter(torch.zeros(2))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        h = self.backbone(x)
        losses = torch.stack(
            [F.cross_entropy(self.heads["label"](h), y), F.mse_loss(self.heads["norm"](h).squeeze(1), x.norm(dim=1))]
        )
        loss = (torch.exp(-self.log_vars) * losses + self.log_vars).sum()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(
            [
                {"params": self.backbone.parameters(), "lr": 1e-3},
                {"params": self.heads.parameters()},
                {"params": [self.log_vars], "lr": 1e-2},
            ],
            lr=2e-3,
        )

    def train_dataloader(self) -> Any:
        return loader(*points())


class MixtureOfExperts(LightningModule):
    """Each sample goes to the two experts with the largest gates; the others do not see it."""

    def __init__(self, experts: int = 4, width: int = 48) -> None:
        super().__init__()
        self.embed = nn.Linear(16, width)
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, width)) for _ in range(experts)
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.embed(x))
        probabilities = self.gate(h).softmax(-1)
        weights, chosen = probabilities.topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(h)
        for index, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == index)
            if rows.numel() > 0:
                mixed.index_add_(0, rows, weights[rows, places, None] * expert(h[rows]))
        load = torch.stack([(chosen == k).float().mean() for k in range(len(self.experts))])
        return self.head(h + mixed), (load * probabilities.mean(0)).sum()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits, balance = self(x)
        loss = F.cross_entropy(logits, y) + 0.1 * balance
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)

    def train_dataloader(self) -> Any:
        return loader(*points())


class LoRALinear(nn.Module):
    """A frozen linear layer with a low-rank update that is trained (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = 8, alpha: float = 16.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scaling = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.lora_a.T @ self.lora_b.T) * self.scaling


class LoRA(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
        self.model.requires_grad_(False)
        for name, layer in list(self.model.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(self.model, name, LoRALinear(layer))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)

    def train_dataloader(self) -> Any:
        return loader(*points())


class ElasticWeights(LightningModule):
    """Continual learning: the weights are held near those of an earlier task (EWC, Kirkpatrick et al. 2017)."""

    def __init__(self, strength: float = 10.0) -> None:
        super().__init__()
        self.strength = strength
        self.net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 3))
        for name, parameter in list(self.net.named_parameters()):
            self.register_buffer("mean_" + name.replace(".", "_"), parameter.detach().clone())
            self.register_buffer("fisher_" + name.replace(".", "_"), torch.rand_like(parameter))

    def penalty(self) -> Tensor:
        loss = torch.zeros((), device=self.device)
        for name, parameter in self.net.named_parameters():
            fisher = getattr(self, "fisher_" + name.replace(".", "_"))
            mean = getattr(self, "mean_" + name.replace(".", "_"))
            loss = loss + (fisher * (parameter - mean) ** 2).sum()
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y) + self.strength / 2 * self.penalty()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)

    def train_dataloader(self) -> Any:
        return loader(*points())


class Propagation(nn.Module):
    """One round of messages along the edges."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * width, 64), nn.ReLU(), nn.Linear(64, width))
        self.update = nn.GRUCell(width, width)

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        source, target = edges
        messages = self.message(torch.cat([h[source], h[target]], dim=-1))
        gathered = torch.zeros_like(h).index_add_(0, target, messages)
        return self.update(gathered, h)


class GraphNetwork(LightningModule):
    """Message passing over the joined graphs of a batch, then a sum over the nodes of each."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.rounds = nn.ModuleList(Propagation(width) for _ in range(2))
        self.readout = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor, count: int) -> Tensor:
        h = torch.relu(self.embed(nodes))
        for each in self.rounds:
            h = each(h, edges)
        pooled = h.new_zeros(count, h.size(1)).index_add(0, graph, h)
        return self.readout(pooled).squeeze(-1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        nodes, edges, target = batch
        count, size, features = nodes.shape
        start = (torch.arange(count, device=self.device) * size)[:, None, None]
        joined = (edges + start).permute(1, 0, 2).reshape(2, -1)
        graph = torch.arange(count, device=self.device).repeat_interleave(size)
        loss = F.mse_loss(self(nodes.reshape(-1, features), joined, graph, count), target)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=2e-3)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(8)
        count = BATCHES * BATCH
        nodes = torch.randn(count, 6, 5, generator=generator)
        edges = torch.randint(6, (count, 2, 10), generator=generator)
        return loader(nodes, edges, nodes[:, :, 0].sum(1))


class GraphConvolution(LightningModule):
    """A graph convolution with a dense, normalised adjacency matrix; each sample is a graph."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Linear(5, width), nn.Linear(width, width)
        self.out = nn.Linear(width, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        nodes, adjacency, labels = batch
        a = adjacency + torch.eye(adjacency.size(1), device=self.device)
        scale = a.sum(-1).rsqrt()
        a = scale[:, :, None] * a * scale[:, None, :]
        h = F.relu(a @ self.w1(nodes))
        h = F.dropout(F.relu(a @ self.w2(h)), 0.1, self.training)
        return F.cross_entropy(self.out(h).flatten(0, 1), labels.flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=5e-3, weight_decay=5e-4)

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(9)
        count = BATCHES * BATCH
        nodes = torch.randn(count, 6, 5, generator=generator)
        adjacency = (torch.rand(count, 6, 6, generator=generator) < 0.3).float()
        adjacency = ((adjacency + adjacency.transpose(1, 2)) > 0).float()
        return loader(nodes, adjacency, (nodes[:, :, 0] > 0).long())


TABULAR = {
    "multi-task with uncertainties": Entry(MultiTask, ("backbone", "heads.label", "heads.norm")),
    "mixture of experts": Entry(
        MixtureOfExperts,
        ("embed", "experts.0", "experts.1", "experts.2", "experts.3", "head"),
        not_exported="data-dependent",
    ),
    "lora": Entry(LoRA, ("model",)),
    "ewc": Entry(ElasticWeights, ("net",)),
    "message passing": Entry(GraphNetwork, ("embed", "rounds.0", "rounds.1", "readout")),
    "graph convolution": Entry(GraphConvolution, ("w1", "w2", "out")),
}
