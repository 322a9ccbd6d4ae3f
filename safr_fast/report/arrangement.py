"""Where the words of a neuron allocation graph stand, and which of them are joined."""

from dataclasses import dataclass

import networkx as nx
import numpy as np

_EDGES = 2


@dataclass(frozen=True)
class Edge:
    """Between words ``i < j``."""

    i: int
    j: int
    strength: float
    """0 to 1, the strongest of all pairs"""
    aligned: bool
    """whether ``h_i · h_j`` is positive"""


@dataclass(frozen=True)
class Arrangement:
    xy: np.ndarray
    """``(n, 2)``: the stronger a pair, the shorter the way between them"""
    edges: tuple[Edge, ...]
    """of each word the strongest"""

    @classmethod
    def of(cls, gram: np.ndarray) -> "Arrangement":
        """Of the words' inner products ``(n, n)``."""
        n = len(gram)
        strength = np.abs(gram * ~np.eye(n, dtype=bool))
        strength = np.sqrt(strength / (strength.max() if strength.any() else 1.0))
        nearest = np.argsort(-strength, axis=1, kind="stable")[:, :_EDGES]
        pairs = {(min(i, j), max(i, j)) for i in range(n) for j in nearest[i].tolist() if strength[i, j] > 0}
        distance = {i: {j: 1.2 - strength[i, j] if i != j else 0.0 for j in range(n)} for i in range(n)}
        place = nx.kamada_kawai_layout(nx.complete_graph(n), dist=distance)
        edges = (Edge(i, j, float(strength[i, j]), bool(gram[i, j] > 0)) for i, j in sorted(pairs))
        return cls(np.array([place[i] for i in range(n)]), tuple(edges))
