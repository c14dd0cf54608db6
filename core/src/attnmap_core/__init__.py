"""Shared core of the attnmap packages: it knows no paper, and importing it needs no GPU and no network."""

__version__ = "0.1.0"
