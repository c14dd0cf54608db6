"""WSOL via Transformer with Implicit Spatial Calibration (ECCV 2022): SCM, and TS-CAM and CAM beside it."""

from .calibration import ActivationDiffusionBlock, SpatialCalibration
from .model import SCM, TSCAM

__version__ = "0.1.0"
__all__ = ["SCM", "TSCAM", "ActivationDiffusionBlock", "SpatialCalibration"]
