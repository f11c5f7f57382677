"""Other frameworks on fastopt's kernels: a module for each, which imports it."""
