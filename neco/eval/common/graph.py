"""Communities of clusters that touch each other in images ("CD": Ziegler and Asano, Self-Supervised Learning of Object
Parts for Semantic Segmentation, 2022).

Shapes: B maps of S pixels per side, K nodes: a node is a cluster, or the background.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal

import networkx
import numpy as np
import torch
from torch import Tensor

from neco.eval.common.metrics import Compat
from neco.utils.errors import NecoError

Method = Literal["louvain", "infomap"]


@dataclass(frozen=True)
class Partition:
    """Communities: `module`, int64 (K,), says of which each node is.

    `count` and `modularity` are those of the graph without its isolated nodes, which come last.
    """

    module: np.ndarray
    count: int
    modularity: float


def check_method(method: Method) -> None:
    """Raises NecoError when `method` is infomap and that is not installed; imports nothing."""
    if method == "infomap" and find_spec("infomap") is None:
        raise NecoError(
            "method=infomap: Infomap is not installed. It is under the GPL, so no part of this project: install it "
            "yourself (pip install 'neco[infomap]') or choose method=louvain"
        )


def offsets(compat: Compat = "standard") -> list[tuple[int, int]]:
    """(down, right) of the neighbours of a pixel, in 8 directions at distances 1 and 2, rounded to whole pixels.

    So both distances are the same pixel on a diagonal, and it counts twice. The published list of angles holds 4 pi / 3
    where 5 pi / 4 was meant (`reference`): one of the two is (-2, -1) instead of (-1, -1).
    """
    angles = [i * math.pi / 4 for i in range(8)]
    if compat == "reference":
        angles[5] = 4 * math.pi / 3
    return [(round(d * math.sin(a)), round(d * math.cos(a))) for d in (1, 2) for a in angles]


def neighbour_shares(maps: Tensor, nodes: int, around: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Of the neighbours that a node has in an image, the share of each other node; summed over images.

    A node is no neighbour of itself.

    Args:
        maps: integers (B, S, S) in 0..K-1.
        around: what is a neighbour, see `offsets`.

    Returns: sums of shares float64 (K, K), and int64 (K,): in how many images the node has neighbours.
    """
    height, width = maps.shape[1:]
    rows = maps.long() + nodes * torch.arange(len(maps), device=maps.device)[:, None, None]
    counts = torch.zeros(len(maps) * nodes**2, dtype=torch.long, device=maps.device)
    for down, right in around:
        here = rows[:, max(-down, 0) : height - max(down, 0), max(-right, 0) : width - max(right, 0)]
        there = maps[:, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)]
        counts += torch.bincount((here * nodes + there).flatten(), minlength=len(counts))
    pairs = counts.view(-1, nodes, nodes)
    pairs.diagonal(dim1=1, dim2=2).zero_()
    neighbours = pairs.sum(2, keepdim=True)
    return (pairs / neighbours.clamp(min=1).double()).sum(0), (neighbours[..., 0] > 0).sum(0)


def edge_weights(shares: Tensor, images: Tensor) -> Tensor:
    """The lesser of the two mean shares of each pair of nodes: sums (K, K), images (K,) -> symmetric float64 (K, K)."""
    mean = shares / images.clamp(min=1)[:, None]
    return torch.minimum(mean, mean.T)


def communities(
    weights: Tensor,
    threshold: float,
    *,
    method: Method = "louvain",
    markov_time: float = 1.0,
    modules: int | None = None,
    seed: int = 0,
) -> Partition:
    """Communities of the graph whose edges have at least weight `threshold`; a node without any is one of its own.

    Args:
        weights: symmetric (K, K), the diagonal does not count.
        method: `louvain` maximises modularity at the resolution 1 / markov_time (the linear part of what Markov
            stability says); `infomap` minimises the description length of a random walk, two levels.
        markov_time: length of a step of the walk: the longer, the larger the communities.
        modules: preferred number of communities. Infomap has an option for it; for Louvain the resolution is moved by
            factors of 2 ** 0.5, 8 times either way at most, until the number is nearest.
    """
    kept = torch.where(weights >= threshold, weights, 0).fill_diagonal_(0).cpu().numpy()
    graph = networkx.from_numpy_array(kept)
    alone = list(networkx.isolates(graph))
    graph.remove_nodes_from(alone)
    groups: list[set[int]] = []
    if graph:
        groups = (_infomap if method == "infomap" else _louvain)(graph, markov_time, modules, seed)
    modularity = networkx.community.modularity(graph, groups) if graph else 0.0
    module = np.empty(len(kept), np.int64)
    for number, group in enumerate([*sorted(groups, key=min), *({node} for node in alone)]):
        module[list(group)] = number
    return Partition(module, len(groups), modularity)


def _louvain(graph: networkx.Graph, markov_time: float, modules: int | None, seed: int) -> list[set[int]]:
    found: list[list[set[int]]] = []
    for step in sorted(range(-6, 7), key=abs) if modules else [0]:
        resolution = 2 ** (step / 2) / markov_time
        found.append(networkx.community.louvain_communities(graph, resolution=resolution, seed=seed))
        if len(found[-1]) == modules:
            break
    return min(found, key=lambda groups: abs(len(groups) - (modules or 0)))


def _infomap(graph: networkx.Graph, markov_time: float, modules: int | None, seed: int) -> list[set[int]]:
    from infomap import Infomap

    preferred = f" --preferred-number-of-modules {modules}" if modules else ""
    machine = Infomap(f"--silent --two-level --seed {seed + 1} --markov-time {markov_time}{preferred}")  # 0 is no seed
    for one, other, weight in graph.edges(data="weight"):
        machine.add_link(one, other, weight)
    machine.run()
    groups: dict[int, set[int]] = {}
    for node, module in machine.modules:
        groups.setdefault(module, set()).add(node)
    return list(groups.values())
