"""Pure tensor functions, each beside its paper and equation."""
