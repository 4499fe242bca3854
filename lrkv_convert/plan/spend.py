"""What a conversion may spend of the original cache: a budget over all layers, or the same shape in
every layer.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar

from ..errors import LrkvError
from ..families import Site
from .allocate import Caps, check_floor
from .curves import width_caps
from .shapes import Plan, uniform_plan

if TYPE_CHECKING:
    from .options import Options


@dataclass(frozen=True)
class Budget:
    """Bytes, as a share `ratio` of the original cache, spent where the loss rises least; bits:
    widths that codes may have, None for 16-bit numbers; the widest bases of keys and values of
    those, None for the default; group_size: heads that share a base of codes, None for all.
    """

    ratio: float
    bits: tuple[int, ...] | None = None
    max_width_k: int | None = None
    max_width_v: int | None = None
    group_size: int | None = None

    def caps(self, keys: str) -> Caps:
        """The widest bases of keys in this form, and of values, by geometry."""
        return lambda geometry: width_caps(geometry, self.max_width_k, self.max_width_v, keys)

    def ahead(
        self, sites: Sequence[Site], layers: int, element_size: int, options: "Options"
    ) -> None:
        """No plan before calibration. Raises LrkvError for a budget below the smallest plan."""
        if self.bits is None:
            name = options.form.name
            check_floor(sites, self.caps(name), name, self.ratio)


@dataclass(frozen=True)
class Uniform:
    """The same shape in every layer: residual ranks and base widths, each for both sides or one of
    them, None for the default (`shapes.uniform_plan`); bits: of each latent, None for 16-bit
    numbers.
    """

    rank: int | None = None
    rank_k: int | None = None
    rank_v: int | None = None
    width: int | None = None
    width_k: int | None = None
    width_v: int | None = None
    bits: int | None = None
    ratio: ClassVar[None] = None  # there is no budget

    def ahead(
        self, sites: Sequence[Site], layers: int, element_size: int, options: "Options"
    ) -> Plan:
        """The plan of one kind of attention. layers: of its stack; element_size: bytes of a number
        stored. Raises LrkvError for shapes that cannot be.
        """
        plan = uniform_plan(
            sites, layers, element_size, **asdict(self), keys=options.form.name, force=options.force
        )
        try:
            for form, shape, geometry in reversed(plan.sites[0].sides):
                form.check_shape(shape, geometry, options.base)
        except ValueError as error:
            raise LrkvError(str(error), "see --base-width and --rank") from error
        return plan
