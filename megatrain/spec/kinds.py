"""The kinds of numbers that a training state has of a parameter, by the names under which checkpoints keep them."""

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
"""What has a number for each weight; which of them a parameter has, its optimizer says."""
FACTORS = ("exp_avg_sq_rows", "exp_avg_sq_columns")
"""Adafactor's second moment of a matrix, [rows] and [columns] of the whole one, on every rank that has a part of it."""
