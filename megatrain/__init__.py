"""Pretraining of Transformers: any layout, same numbers."""

__version__ = "0.2.0"
