"""Solving a plan unit by unit: measuring, transforming, rounding, packing."""
