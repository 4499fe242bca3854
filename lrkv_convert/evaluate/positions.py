"""How many positions a model has: what its config says."""


def positions(config) -> int | None:
    """Tokens that a decoder can hold; None where nothing says so, as with relative positions."""
    return getattr(config, "max_target_positions", None) or getattr(
        config, "max_position_embeddings", None
    )


def encoder_positions(config, tokens: int) -> int:
    """Positions of the encoder that cross-attention reads beside so many tokens of the decoder: all
    that a speech model has, for a text as many as there are tokens.
    """
    return getattr(config, "max_source_positions", None) or tokens


def positions_exceeded(config, tokens: int) -> int | None:
    """How many tokens a decoder with this config can hold, where these are more."""
    limit = positions(config)
    return limit if limit is not None and tokens > limit else None
