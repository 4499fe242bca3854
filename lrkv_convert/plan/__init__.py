"""What each layer is to cache: shapes, curves of what they cost, a budget spent along them."""
