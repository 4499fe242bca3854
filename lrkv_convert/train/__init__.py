"""Continued pretraining of converted models: data, loop, optimiser, objective, launch."""
