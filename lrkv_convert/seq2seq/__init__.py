"""Encoder-decoders: converting and comparing models that read one thing, speech or text, and write
another.
"""
