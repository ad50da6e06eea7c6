"""Options that the two families of coded coefficients share, transform and cross-layer."""

from dataclasses import dataclass, field

from kvcapsule.errors import ConfigError

from ..recipe import REFERENCE_BITS, Recipe, require_at_least_zero

LOGIT_BATCHES = 12
"""Batches of the Fisher information unless `logit_batches` says otherwise."""


@dataclass(frozen=True)
class CoefficientOptions:
    """Shape and learning of a transform code."""

    joint_heads: int = 0
    """KV heads that are coded together; 0 takes as many as have 128 channels in all."""
    query_metric: bool = True
    """Weigh the channels of keys by the queries that read them, in the round that minimises the error of attention's
    output. false: all channels alike."""
    query_bank: int = 64
    """Training queries of each KV head whose attention tells the encoder how much each token matters; 0 treats all
    alike."""
    logit_batches: int | None = None
    """Batches on which the Fisher information of the answers' logits is measured, through the frozen VLM and back (in
    the memory of a training step of --batch rows); the closed form then codes for the logits. 0 codes for each layer's
    attention output alone. Default: 12; none with --transform.allocation pyramid or uniform, which share the bits out
    without measuring what errors cost."""
    max_map_mib: float | None = None
    """Upper limit in MiB for decoder maps in 16 bits; fewer channels are coded where they would take more. Default:
    30.5 (32 MB), scaled up for models with more KV channels than a 7B GQA model; no limit if it would leave bits
    unused. 0: no limit."""
    probe_batches: int = 2
    """Batches on which the allocation measures what errors in each layer's keys and values cost."""
    steps: int = 0
    """Steps of gradient descent on bases, scales of quantisation and means; 0 leaves the closed form, as good a code
    unless bits are very few (on pages-vlm below 0.4 an element) or images of sizes will be read that training has not
    seen: there 60 steps help much."""
    lr: float = 1e-4
    """Peak learning rate of Adam up to 0.8 bit an element; half of it for each bit more."""
    output_weight: float = 1.0
    """Weight of the attention-output error."""
    kl_weight: float = 5.0
    """Weight of the KL of the answers' logits, through the frozen VLM; 0 leaves it out and is about twice as fast."""

    @property
    def fisher_batches(self) -> int:
        """`logit_batches`, or its default."""
        return LOGIT_BATCHES if self.logit_batches is None else self.logit_batches

    def __post_init__(self) -> None:
        require_at_least_zero(self, "transform", "joint_heads", "query_bank", "logit_batches", "steps")
        require_at_least_zero(self, "transform", "max_map_mib", "lr")
        require_at_least_zero(self, "transform", "output_weight", "kl_weight")
        if self.probe_batches < 1:
            raise ConfigError(f"--transform.probe_batches {self.probe_batches}: at least 1 is needed.")
        if self.steps and not self.output_weight and not self.kl_weight:
            raise ConfigError(
                "--transform.output_weight and --transform.kl_weight are both 0: give one a weight, or"
                " --transform.steps 0."
            )


@dataclass(frozen=True)
class CoefficientRecipe(Recipe):
    """A training run of a family of coded coefficients."""

    bits: float | None = None
    """In place of --compression: mean bits of an element of the keys and values, 16 / compression."""
    transform: CoefficientOptions = field(default_factory=CoefficientOptions)
    """Shape and learning of a transform code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None and not 0 < self.bits <= 8:
            raise ConfigError(
                f"--bits {self.bits}: mean bits of an element of a transform code, above 0 and at most 8; else give"
                " --compression."
            )

    @property
    def element_bits(self) -> float:
        """Mean bits that an element of the keys and values may take."""
        return self.retention * REFERENCE_BITS if self.bits is None else self.bits
