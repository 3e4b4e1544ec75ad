"""Schedules against DINO's array form, groups by name, and the moving average against its definition."""

import numpy as np
import torch
from torch import nn

from neco.model.backbone import Backbone
from neco.training import optim
from neco.training.module import follow


def published_cosine(first, last, total):
    """The schedule of DINO's code, which the published NeCo uses: an array with a value a step."""
    steps = np.arange(total)
    return last + 0.5 * (first - last) * (1 + np.cos(np.pi * steps / len(steps)))


def test_cosine_equals_the_published_array():
    for first, last, total in [(0.9995, 1.0, 37), (0.04, 0.5, 100), (1e-4, 0.0, 1)]:
        ours = [optim.cosine(first, last, step, total) for step in range(total)]
        np.testing.assert_allclose(ours, published_cosine(first, last, total), rtol=0, atol=1e-15)


def test_the_default_momentum_follows_the_number_of_steps():
    """Published at the published length and beyond, tuned on the demo at 300 steps; a short run leaves its start."""
    assert optim.ema_momentum(25 * (118_287 // 64)) == optim.ema_momentum(10**6) == (0.9995, 1.0)
    assert abs(optim.ema_momentum(300)[0] - 0.98) < 0.003
    momenta = [optim.ema_momentum(steps)[0] for steps in (1, 10, 100, 1000, 10_000, 46_200)]
    assert momenta == sorted(momenta) and momenta[0] == 0
    assert max(optim.teacher_start_fraction(optim.ema_momentum(steps), steps) for steps in (20, 120, 300, 5000)) < 0.2
    assert optim.teacher_start_fraction((0.9995, 1.0), 290) > 0.9, "what the published value would leave of it"


def test_the_fraction_of_the_start_is_what_follow_leaves():
    student, teacher = nn.Linear(1, 1), nn.Linear(1, 1)
    for module, value in ((student, 0.0), (teacher, 1.0)):
        for parameter in module.parameters():
            parameter.data.fill_(value)
    for step in range(7):
        follow(teacher, student, optim.cosine(0.8, 1.0, step, 7))
    assert abs(float(teacher.weight) - optim.teacher_start_fraction((0.8, 1.0), 7)) < 1e-6


def test_polynomial_equals_torch():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=9, power=0.9)
    for step in range(9):
        np.testing.assert_allclose(optim.polynomial(1e-4, step, 9, 0.9), scheduler.get_last_lr()[0], rtol=1e-12)
        optimizer.step()
        scheduler.step()
    assert abs(optim.polynomial(1.0, 3, 4, 0.9) - 0.2871745887) < 1e-9


def test_groups_cover_every_trainable_parameter_once():
    backbone, head, loss = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), nn.Linear(4, 2), nn.Module()
    loss.prototypes = nn.Parameter(torch.zeros(5, 2))
    backbone[0].bias.requires_grad_(False)
    groups = {group["name"]: group for group in optim.parameter_groups(backbone, head, loss, 1e-5, 1e-4)}
    ids = [id(p) for group in groups.values() for p in group["params"]]
    wanted = [id(p) for m in (backbone, head, loss) for p in m.parameters() if p.requires_grad]
    assert sorted(ids) == sorted(wanted)
    assert set(groups) == {"backbone", "backbone/no_decay", "head", "head/no_decay"}
    assert any(p is loss.prototypes for p in groups["head"]["params"])
    assert all(p.ndim == 1 for p in groups["backbone/no_decay"]["params"])


DECAYED = {  # layer_decay 0.5, depth 4, lr 1: by hand
    "backbone": 1.0,  # block 3 and the final norm
    "backbone/block2": 0.5,
    "backbone/block1": 0.25,
    "backbone/block0": 0.125,
    "backbone/embeddings": 0.0625,
}


def test_layer_decay_is_the_table():
    backbone = Backbone(name="vit_tiny_patch16_224", size=32, arch={"depth": 4, "embed_dim": 12, "num_heads": 2})
    head = nn.Linear(12, 2)
    groups = {group["name"]: group for group in optim.parameter_groups(backbone, head, nn.Module(), 1.0, 7.0, 0.5)}
    ids = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(ids) == sorted(map(id, [*backbone.parameters(), *head.parameters()]))
    rates = {**DECAYED, "head": 7.0}
    assert {name: group["peak_lr"] for name, group in groups.items()} == {
        name + suffix: rate for name, rate in rates.items() for suffix in ("", "/no_decay")
    }
    net, group_of = backbone.net, {id(p): name for name, group in groups.items() for p in group["params"]}
    for parameter, name in [
        (net.patch_embed.proj.weight, "backbone/embeddings"),
        (net.pos_embed, "backbone/embeddings"),
        (net.patch_embed.proj.bias, "backbone/embeddings/no_decay"),
        (net.blocks[0].attn.qkv.weight, "backbone/block0"),
        (net.blocks[2].norm1.weight, "backbone/block2/no_decay"),
        (net.blocks[3].mlp.fc2.weight, "backbone"),
        (net.norm.weight, "backbone/no_decay"),
    ]:
        assert group_of[id(parameter)] == name
    net.blocks[1].requires_grad_(False)
    left = optim.parameter_groups(backbone, head, nn.Module(), 1.0, 7.0, 0.5)
    assert not [group["name"] for group in left if "block1" in group["name"]]


def test_schedule_sets_rates_and_decay_by_group():
    backbone, head = nn.Linear(3, 4), nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(optim.parameter_groups(backbone, head, nn.Module(), 1e-5, 1e-4))
    optim.schedule(optimizer, 5, 10, (0.04, 0.5))
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert abs(groups["backbone"]["lr"] - 0.5e-5) < 1e-12 and abs(groups["head"]["lr"] - 0.5e-4) < 1e-12
    assert abs(groups["head"]["weight_decay"] - 0.27) < 1e-12
    assert groups["head/no_decay"]["weight_decay"] == 0
    optim.schedule(optimizer, 3, 4, (0.04, 0.5), power=0.9)
    assert abs(groups["backbone"]["lr"] - 0.2871745887e-5) < 1e-14


def test_follow_is_the_moving_average():
    student, teacher = nn.Linear(3, 4), nn.Linear(3, 4)
    wanted = [0.9 * t + 0.1 * s for t, s in zip(teacher.parameters(), student.parameters(), strict=True)]
    before = [s.clone() for s in student.parameters()]
    follow(teacher, student, 0.9)
    for got, want in zip(teacher.parameters(), wanted, strict=True):
        torch.testing.assert_close(got, want)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), before, strict=True))
    student.bias.requires_grad_(False)
    teacher.bias.data, student.bias.data = -torch.zeros(4), -torch.zeros(4)
    follow(teacher, student, 0.3)
    assert teacher.bias.signbit().all(), "what is frozen keeps its very bits"
    torch.testing.assert_close(teacher.weight, 0.3 * wanted[0] + 0.7 * before[0])
    wanted = [teacher.weight.clone()]
    follow(teacher, student, 1.0)
    torch.testing.assert_close(next(teacher.parameters()), wanted[0])
