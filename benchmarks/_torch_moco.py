"""MoCo v3 (Chen, Xie, He 2021) in plain PyTorch, the peer of our training step.

The paper's ViT with a fixed table of positions and a frozen patch projection, the MLP
heads with BatchNorm, the teacher and the symmetrised loss; attention is PyTorch's
fused one. Only what a training step does: no data, schedule or checkpoint.
"""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import get_ema_multi_avg_fn


class MoCoV3(nn.Module):
    """Student, predictor and teacher; called with two views, it gives the loss.

    Args:
      width, depth, heads, patch, image: of the ViT; the image is a square.
      projector, predictor: widths of the MLP heads, output last.
      tau: temperature.
    """

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        patch: int,
        image: int,
        projector: Sequence[int],
        predictor: Sequence[int],
        tau: float,
    ) -> None:
        super().__init__()
        self.tau = tau
        vit = {"width": width, "depth": depth, "heads": heads}
        vit |= {"patch": patch, "image": image}
        self.student = nn.Sequential(ViT(**vit), mlp(width, projector))
        self.teacher = nn.Sequential(ViT(**vit), mlp(width, projector))
        self.predictor = mlp(projector[-1], predictor)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        for x in self.student[0].patch.parameters():
            x.requires_grad_(False)

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Views (B, 3, rows, columns), normalised -> ctr(q1, k2) + ctr(q2, k1)."""
        q1 = self.predictor(self.student(first))  # (B, out)
        q2 = self.predictor(self.student(second))
        with torch.no_grad():
            k1, k2 = self.teacher(first), self.teacher(second)
        return contrast(q1, k2, self.tau) + contrast(q2, k1, self.tau)

    @torch.no_grad()
    def move_teacher(self, momentum: float) -> None:
        """teacher <- momentum x teacher + (1 - momentum) x student; not the buffers."""
        pairs = list(self.teacher.parameters()), list(self.student.parameters())
        get_ema_multi_avg_fn(momentum)(*pairs, 0)


def contrast(q: torch.Tensor, k: torch.Tensor, tau: float) -> torch.Tensor:
    """2 tau x cross-entropy of each query (B, out) with its own key as the target."""
    q, k = (functional.normalize(x.float(), dim=1) for x in (q, k))
    with torch.autocast(q.device.type, enabled=False):  # logits in float32
        logits = q @ k.T / tau  # (B, B)
    target = torch.arange(len(q), device=q.device)
    return 2 * tau * functional.cross_entropy(logits, target)


def mlp(width: int, widths: Sequence[int]) -> nn.Sequential:
    """[Linear, BatchNorm, ReLU] per width; the last has no affine part and no ReLU."""
    layers: list[nn.Module] = []
    for i, out in enumerate(widths):
        last = i == len(widths) - 1
        layers += [nn.Linear(width, out, bias=False)]
        layers += [nn.BatchNorm1d(out, affine=not last)]
        layers += [] if last else [nn.ReLU(inplace=True)]
        width = out
    return nn.Sequential(*layers)


class ViT(nn.Module):
    """Images (B, 3, rows, columns) -> the CLS token after the last norm (B, D)."""

    def __init__(
        self, *, width: int, depth: int, heads: int, patch: int, image: int
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, stride=patch)
        self.cls = nn.Parameter(1e-6 * torch.randn(1, 1, width))
        self.register_buffer("position", sincos(image // patch, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch(images).flatten(2).mT  # (B, D, rows, columns) -> (B, N, D)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)  # (B, T, D)
        return self.norm(self.blocks(x + self.position)[:, 0])


class Block(nn.Module):
    """x += attention(LN(x)); x += MLP(LN(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for layer in (self.qkv, self.out, self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)
            # Of the fused kernel each third is a matrix of its own.
            for part in (
                layer.weight.split(width) if layer is self.qkv else [layer.weight]
            ):
                nn.init.xavier_uniform_(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        # 3 x (B, T, D) -> 3 x (B, H, T, d)
        q, k, v = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        heads = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(heads.transpose(1, 2).flatten(2))
        hidden = functional.gelu(self.fc1(self.norm_2(x)))  # exact: erf
        return x + self.fc2(hidden)


def sincos(side: int, width: int) -> torch.Tensor:
    """(1, 1 + side x side, width): rows in the first half, zeros for CLS."""
    rate = 10000.0 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * rate  # (side, width / 4)
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    table = torch.cat([rows, columns], dim=1)
    return torch.cat([torch.zeros(1, width), table])[None]
