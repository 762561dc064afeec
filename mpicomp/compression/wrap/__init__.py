"""Compressors around other compressors: error feedback, per tensor, by rank; and the allocation of ratios to ranks."""
