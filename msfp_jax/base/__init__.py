"""Tools that know nothing of diffusion: files, progress, pictures, pickles."""
