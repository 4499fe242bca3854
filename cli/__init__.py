"""The command line. Torch is imported inside commands only, so that every --help answers at
once.
"""
