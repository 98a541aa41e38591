"""Files, progress, pictures, pickles: what knows nothing of diffusion."""
