"""Triton's functions, one file for each operator. Importing one imports Triton."""
