"""Influence functions: what the test losses would be without single training examples."""

from __future__ import annotations

from .calls import influences, self_influence
from .queries import Queries
from .streams import Top

__all__ = ["Queries", "Top", "influences", "self_influence"]
