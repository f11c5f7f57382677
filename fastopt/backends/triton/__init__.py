"""Backend ``triton``: kernels that a card's own compiler builds at their first use."""
