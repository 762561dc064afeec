"""Compressors around other compressors: error feedback, tensor by tensor, by rank, and how ratios are dealt out."""
