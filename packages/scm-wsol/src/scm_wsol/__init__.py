"""WSOL via Transformer with Implicit Spatial Calibration (ECCV 2022)."""

__version__ = "0.1.0"
