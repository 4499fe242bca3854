"""YAML as people mean it in a recipe: plain values, every name once. 1e-3 is a number and 010 is
none, as in YAML 1.2; no tags, anchors or dates."""

import re
from collections import Counter

import yaml

from ..errors import LrkvError, first_line
from .fields import shown

MOST = 1 << 16  # characters: what is larger is no recipe


class Reader(yaml.SafeLoader):
    """A SafeLoader with resolvers of its own, which refuses what a recipe has no use for."""

    yaml_implicit_resolvers = {}

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(
                problem="it has an anchor or an alias", problem_mark=event.start_mark
            )
        if getattr(event, "tag", None):
            raise yaml.MarkedYAMLError(
                problem=f"it has a tag, {shown(event.tag)}", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, count in names.items() if count > 1]:
            raise yaml.MarkedYAMLError(
                problem=f"it has {shown(twice[0])} twice", problem_mark=node.start_mark
            )
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    (
        "bool",
        "true|True|TRUE|false|False|FALSE|yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF",
        "tTfFyYnNoO",
    ),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", "[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)"
        r"|[-+]?(?:(?:0|[1-9][0-9_]*)\.[0-9]*|\.[0-9]+)|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    Reader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
    )


def parse(text: str, what: str, hint: str):
    """The value of a YAML text; `what` it is, in words. Raises LrkvError."""
    if len(text) > MOST:
        raise LrkvError(f"{what} is too long: {len(text):,} characters", hint)
    try:
        return yaml.load(text, Reader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise LrkvError(
            f"{what} is not YAML, or not as plain as it must be: {error.problem or error.context}"
            + (f", line {mark.line + 1}" if mark else ""),
            hint,
        ) from error
    except (
        yaml.YAMLError,
        ValueError,
        RecursionError,
    ) as error:  # characters; numbers of thousands of digits; thousands of brackets
        raise LrkvError(
            f"{what} is not YAML, or not as plain as it must be: {first_line(error)}", hint
        ) from error
