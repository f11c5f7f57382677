"""The operators: checks, the choice of a backend, and one call to it."""
