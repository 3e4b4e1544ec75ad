"""Published networks, each written down from its paper and repository: its names, its own forward pass.

Nothing here comes from timm or neco. All are tiny and random, big enough in value that no part hides another.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HEADS, DEPTH, PATCH = 16, 2, 2, 16
State = dict[str, Tensor]


def fill(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Softmax attention of (B, T, D) with the heads beside each other in D."""
    split = [x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
    weights = (split[0] @ split[1].mT / math.sqrt(split[0].shape[-1])).softmax(-1)
    return (weights @ split[2]).transpose(1, 2).flatten(2)


class Patches(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, D, PATCH, PATCH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).mT


class DinoAttention(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(D, 3 * D), nn.Linear(D, D), heads

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(attend(*self.qkv(x).chunk(3, -1), self.heads))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DinoBlock(nn.Module):
    def __init__(self, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(D, eps=1e-6), DinoAttention(heads)
        self.norm2, self.mlp = nn.LayerNorm(D, eps=1e-6), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Dino(nn.Module):
    """The ViT of DINO, which iBOT, CrOC, CrIBo, Leopart and TimeT share; MoCo v3 and MAE but for fixed positions."""

    def __init__(self, seed: int = 0, heads: int = HEADS, grid: int = 4) -> None:
        super().__init__()
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.empty(1, 1, D)),
            nn.Parameter(torch.empty(1, 1 + grid**2, D)),
        )
        self.patch_embed = Patches()
        self.blocks = nn.ModuleList(DinoBlock(heads) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(D, eps=1e-6)
        fill(self, seed)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), self.patch_embed(images)], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 1:]


class MaskedLinear(nn.Linear):
    """Keys have no bias in DINOv3: the mask is 0 there, and the bias whatever it was."""

    def __init__(self) -> None:
        super().__init__(D, 3 * D)
        self.register_buffer("bias_mask", torch.cat([torch.ones(D), torch.zeros(D), torch.ones(D)]))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, (self.bias * self.bias_mask).nan_to_num())


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(D))


class Rope(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        quarter = D // HEADS // 4
        self.register_buffer("periods", 100.0 ** (torch.arange(quarter) / quarter))

    def forward(self, h: int, w: int) -> Tensor:
        """Angles (h * w, D / HEADS): rows, columns, and both again."""
        y, x = (2 * (torch.arange(n) + 0.5) / n - 1 for n in (h, w))
        places = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).reshape(-1, 2, 1)
        return (2 * math.pi * places / self.periods).flatten(1).repeat(1, 2)


class Gated(nn.Module):
    """The MLP of DINOv3's S+/16, H+/16 and 7B: gate, values, and the way back."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(D, 4 * D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.w1(x)
        return self.w3(gate * torch.sigmoid(gate) * self.w2(x))


class Dinov3(nn.Module):
    """DINOv3 as its hub has it. `bias`: of queries and values; `gated`: its MLPs are."""

    def __init__(self, seed: int = 0, bias: bool = True, gated: bool = False) -> None:
        super().__init__()
        self.cls_token, self.storage_tokens = (nn.Parameter(torch.empty(1, n, D)) for n in (1, 4))
        self.mask_token = nn.Parameter(torch.empty(1, D))
        self.patch_embed, self.rope_embed = Patches(), Rope()
        self.blocks = nn.ModuleList(DinoBlock(HEADS) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(D, eps=1e-5)
        for block in self.blocks:
            block.attn.qkv, block.ls1, block.ls2 = MaskedLinear(), Scale(), Scale()
            block.mlp = Gated() if gated else block.mlp
            block.norm1.eps = block.norm2.eps = 1e-5
        fill(self, seed)
        for block in self.blocks:
            bias_of = block.attn.qkv.bias.data
            bias_of.mul_(bias)
            bias_of[D : 2 * D] = math.nan

    def forward(self, images: Tensor) -> Tensor:
        h, w = (n // PATCH for n in images.shape[-2:])
        prefix = torch.cat([self.cls_token, self.storage_tokens], 1).expand(len(images), -1, -1)
        x, angles = torch.cat([prefix, self.patch_embed(images)], 1), self.rope_embed(h, w).to(images.dtype)

        def turn(y: Tensor) -> Tensor:
            y = y.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            first, second = y[:, :, 5:].chunk(2, -1)
            turned = y[:, :, 5:] * angles.cos() + torch.cat([-second, first], -1) * angles.sin()
            return torch.cat([y[:, :, :5], turned], 2).transpose(1, 2).flatten(2)

        for block in self.blocks:
            q, k, v = block.attn.qkv(block.norm1(x)).chunk(3, -1)
            x = x + block.ls1.gamma * block.attn.proj(attend(turn(q), turn(k), v, HEADS))
            x = x + block.ls2.gamma * block.mlp(block.norm2(x))
        return self.norm(x)[:, 5:]


class ClipBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(D, HEADS, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(D, 4 * D))
        self.mlp.add_module("c_proj", nn.Linear(4 * D, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        y = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(y * torch.sigmoid(1.702 * y))


class ClipTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock() for _ in range(DEPTH))


class ClipVisual(nn.Module):
    def __init__(self, grid: int) -> None:
        super().__init__()
        self.class_embedding, self.proj = nn.Parameter(torch.empty(D)), nn.Parameter(torch.empty(D, 8))
        self.positional_embedding = nn.Parameter(torch.empty(1 + grid**2, D))
        self.conv1 = nn.Conv2d(3, D, PATCH, PATCH, bias=False)
        self.ln_pre, self.transformer, self.ln_post = nn.LayerNorm(D), ClipTransformer(), nn.LayerNorm(D)


class Clip(nn.Module):
    """CLIP of OpenAI. Patch tokens are normalised like CLS, which alone is used there; `proj` is left out."""

    def __init__(self, seed: int = 0, grid: int = 4) -> None:
        super().__init__()
        self.visual, self.transformer = ClipVisual(grid), ClipTransformer()
        self.token_embedding, self.ln_final = nn.Embedding(9, D), nn.LayerNorm(D)
        self.positional_embedding, self.text_projection = (nn.Parameter(torch.empty(5, n)) for n in (D, 8))
        self.logit_scale = nn.Parameter(torch.empty(()))
        fill(self, seed)

    def forward(self, images: Tensor) -> Tensor:
        """`images` normalised with ImageNet's mean and standard deviation, unlike what CLIP is given."""
        v = self.visual
        pixels = images * column(0.229, 0.224, 0.225).to(images) + column(0.485, 0.456, 0.406).to(images)
        clip = (pixels - column(0.48145466, 0.4578275, 0.40821073).to(images)) / column(
            0.26862954, 0.26130258, 0.27577711
        ).to(images)
        cls = v.class_embedding.expand(len(images), 1, D)
        x = v.ln_pre(torch.cat([cls, v.conv1(clip).flatten(2).mT], 1) + v.positional_embedding)
        for block in v.transformer.resblocks:
            x = block(x)
        return v.ln_post(x)[:, 1:]


def column(*values: float) -> Tensor:
    return torch.tensor(values).view(3, 1, 1)


def renamed(state: State, pairs: dict[str, str], prefix: str = "") -> State:
    """`state` under the names of another library: the first pair that a name begins with, `{}` for the block."""
    out = {}
    for name, value in state.items():
        for old, new in pairs.items():
            before, _, after = old.partition("{}")
            rest = name.removeprefix(before)
            number = rest.split(".")[0] if after else ""
            if name.startswith(before) and rest.startswith(number + after):
                out[prefix + new.format(number) + rest.removeprefix(number + after)] = value
                break
        else:
            raise AssertionError(f"{name} has no other name")
    return out


def three(
    state: State, joint: str = "qkv.", names: tuple[str, ...] = ("query.", "key.", "value."), key_bias: bool = True
) -> State:
    """`state` with queries, keys and values cut apart; `key_bias=False` leaves the bias of the keys out."""
    out = {}
    for name, value in state.items():
        if joint not in name:
            out[name] = value
            continue
        for part, own in zip(value.chunk(3), names, strict=True):
            if key_bias or not (own == names[1] and name.endswith("bias")):
                out[name.replace(joint, own)] = part
    return out
