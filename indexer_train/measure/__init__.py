"""Metrics, intervals, calibration, and the choice of layers, on traces."""
