"""Derivatives of a network as functions: products with Jacobians, GGNs and Hessians.

Nothing here knows an operator class: `operators.matrix_free` wraps these functions.
"""
