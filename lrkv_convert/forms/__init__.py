"""Forms: how keys and values are cached and read, one file a form."""

from ..errors import LrkvError
from .base import Asked, Fitted, Form, Shape, group_count, of_values
from .channels import Channels
from .commuting import Commuting
from .full import Full
from .joint import Joint
from .per_head import PerHead
from .rotary import Rotary

FORMS: dict[str, Form] = {
    form.name: form for form in (Joint(), PerHead(), Rotary(), Commuting(), Channels(), Full())
}


def form_named(name: str) -> Form:
    """The form of keys of this name. Raises LrkvError where there is none."""
    if name not in FORMS:
        raise LrkvError(f"unknown form of keys {name!r}", f"choose from {', '.join(FORMS)}")
    return FORMS[name]


__all__ = ["FORMS", "Asked", "Fitted", "Form", "Shape", "form_named", "group_count", "of_values"]
