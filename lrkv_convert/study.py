"""The prologue that every story has: a checkpoint opened and checked, the sites of its attention,
what it is observed on, and what was seen there.

    study = Study(model)                    open, find the family, place the tensors
    study.build(device)                     the model without weights
    study.gather(calibration, tokens)       read texts, pairs or speech
    study.check()                           every weight is there and finite
    study.read()                            examples
    study.observe({"fisher"}, store)        run them through, layer by layer
    study.seen(store, site)                 one attention module, for the fit
"""

from collections.abc import Callable, Collection, Sequence
from typing import cast

import torch
from transformers import PreTrainedModel

from .device import pick_dtype
from .errors import LrkvError
from .evaluate.load import load_model
from .examples.example import Example
from .examples.material import Material, gather
from .families import AttentionWeights, Family, Site, by_kind, family_of
from .fit.metric import LayerMetrics
from .folder.store import Store
from .modeling import auto_class
from .observe.calibrate import Observed, calibrate, observed
from .observe.sensitivity import gradient_rows, head_moments
from .plan.allocate import Caps, Curve
from .plan.curves import survey
from .source import Checkpoint, open_checkpoint
from .source.names import describe, placed
from .source.skeleton import Skeleton, skeleton_of

Progress = Callable[[str, int, int], None]  # (stage, done, total)


class Study:
    """An original model that is looked at.

    model: folder, .gguf file or hub id; choose: family -> the kinds of attention to look at
    (default: all). Raises LrkvError, also for weights that are already quantised.
    """

    skeleton: Skeleton
    material: Material

    def __init__(
        self,
        model: str,
        choose: Callable[[Family], Collection[str]] = lambda family: tuple(family.kinds),
        progress: Progress = lambda *_: None,
    ):
        checkpoint = open_checkpoint(model)
        self.model, self.progress = model, progress
        self.family = family_of(checkpoint.config)
        self.kinds = tuple(choose(self.family))
        if getattr(checkpoint.config, "quantization_config", None):
            raise LrkvError(
                f"{checkpoint.source} holds quantised weights",
                "convert the full-precision checkpoint, then quantise",
            )
        described = describe(checkpoint, auto_class(self.family.model_type))
        self.checkpoint: Checkpoint = placed(checkpoint, described, self.family.any.stored)
        self.layers = self.family.layers(self.checkpoint.config)
        self.sites = self.family.sites(self.checkpoint.config, self.kinds)
        self.examples: list[Example] | None = None

    @property
    def config(self):
        return self.checkpoint.config

    @property
    def by_kind(self) -> dict[str, list[Site]]:
        """The sites of each kind of attention."""
        return by_kind(self.sites)

    def stored_dtype(self, dtype: str) -> torch.dtype:
        """The output's dtype: as asked, or that of the source's first attention weight."""
        if dtype != "auto":
            return cast(torch.dtype, pick_dtype(dtype))
        at, tensors = self.family.any.module(self.sites[0].layer), self.checkpoint.tensors
        names = [n for n in tensors if n.startswith(at) and n.endswith("weight")]
        if not names:
            return torch.float32
        # a type that torch does not have is refused with the other tensors
        return cast(torch.dtype, self.checkpoint.shape_dtype(names[0])[1])

    def build(self, device: torch.device) -> Skeleton:
        """The model without weights. Raises LrkvError for tensors that are missing."""
        self.skeleton = skeleton_of(self.checkpoint, self.family, device)
        self.checkpoint.check(self.skeleton.expected())
        return self.skeleton

    def gather(self, calibration: list[str] | None, tokens: int) -> Material:
        """Read what it is to be observed on. Raises LrkvError."""
        self.material = gather(calibration, tokens, self.family)
        return self.material

    def check(self, stored: torch.dtype | None = None) -> None:
        """Raise LrkvError for weights that are not finite, or would not be in the dtype stored."""
        for done, total in self.checkpoint.finite(self.skeleton.expected(), stored):
            self.progress("checking", done, total)

    def read(self) -> list[Example] | None:
        """The examples; None without any. Raises LrkvError."""
        if self.material:
            self.examples = self.material.examples(
                self.checkpoint,
                self.whole,
                lambda done, total: self.progress("writing", done, total),
            )
        return self.examples

    def whole(self) -> PreTrainedModel:
        """The model with all its weights: of an encoder-decoder in float32, as it is calibrated."""
        dtype = "auto" if self.family.encoder is None else torch.float32
        auto = auto_class(self.family.model_type)
        return load_model(self.model, self.skeleton.device, dtype, auto)

    def observe(self, metrics: Collection[str], store: Store, for_refit: bool = True) -> None:
        """Calibration: what every layer sees and, for the Fisher metric, what the loss minds.
        Nothing without examples.
        """
        if self.examples is None:
            return
        rows = gradient_rows(self.examples) if "fisher" in metrics else []
        calibrate(
            self.skeleton,
            self.sites,
            self.examples,
            metrics,
            store,
            rows,
            for_refit,
            lambda done, total: self.progress("calibrating", done, total),
        )
        if rows:
            head_moments(
                self.skeleton,
                self.sites,
                self.examples,
                rows,
                store,
                lambda done, total: self.progress("gradients", done, total),
            )

    def seen(self, store: Store, site: Site) -> Observed:
        """One attention module as far as the store knows it."""
        return observed(self.skeleton, store, site)

    def look(self, store: Store, metric: str, site: Site) -> tuple[AttentionWeights, LayerMetrics]:
        """Its weights, and the norms it is fitted in."""
        seen = self.seen(store, site)
        return seen.weights, seen.metrics(metric)

    def curves(
        self,
        kind: str,
        metric: str,
        caps: Caps,
        keys: str,
        store: Store,
        bits: Sequence[int] | None = None,
        group_size: int | None = None,
    ) -> list[tuple[Curve, Curve]]:
        """What widths and ranks would cost: (keys, values) of every site of a kind. keys: their
        form; bits: widths of codes, None for 16-bit numbers; group_size: heads that share a base
        of codes, None for all.
        """
        sites, total = self.by_kind[kind], len(self.sites)
        before = sum(len(self.by_kind[k]) for k in self.kinds[: self.kinds.index(kind)])
        return survey(
            sites,
            lambda site: self.look(store, metric, site),
            caps,
            keys,
            bits,
            group_size,
            store,
            lambda done: self.progress("planning", before + done, total),
        )
