"""How many positions a model has: what a config says of its longest texts."""


def positions(config) -> int | None:
    """Tokens that a decoder can hold; None where nothing says so, as with relative positions."""
    return getattr(config, "max_target_positions", None) or getattr(
        config, "max_position_embeddings", None
    )


def positions_exceeded(config, tokens: int) -> int | None:
    """How many tokens a decoder with this config can hold, where these are more."""
    limit = positions(config)
    return limit if limit is not None and tokens > limit else None
