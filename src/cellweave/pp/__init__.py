"""Preprocessing that scanpy lacks."""

from ._counts import recover_counts

__all__ = ["recover_counts"]
