"""Rows, splits, fingerprint."""
