"""Folders that are whole or not there: weights, what stands beside them, and what they say."""
