"""Conversion: plan what would happen, rewrite the two projections, write the folder, prove the result."""
