"""Number formats, quantizers, their search, specs, calibration."""
