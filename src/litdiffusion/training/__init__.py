"""Lightning lives here: the module that trains a denoiser, and the callbacks that watch it."""
