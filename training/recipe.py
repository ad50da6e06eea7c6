"""Everything that a training run is told."""

from dataclasses import dataclass, field
from pathlib import Path

from kvcapsule.codec.kvcapsule import KVCapsuleConfig, pyramid, weighted
from kvcapsule.data.source import SourceConfig

FAMILIES = ("transform", "cross-layer", "kvcapsule", "compact")
"""Families that can be trained."""
CODED = ("transform", "cross-layer")
"""Those whose stored numbers have few bits each."""
_LOGIT_BATCHES = 12
REFERENCE_BITS = 16
"""Bits of an element of the cache that compression is counted against, whatever precision the model runs in."""


@dataclass(frozen=True)
class OptimConfig:
    """How a KVCapsule learns."""

    soft_steps: int = 120
    """Steps with the soft mask, its temperature falling."""
    hard_steps: int = 120
    """Steps with the hard mask, on reconstruction and attention output."""
    lr: float = 1e-3
    """Peak learning rate of Adam, for reconstructions."""
    mask_lr: float = 2e-2
    """Learning rate of the mask logits."""
    temperature_start: float = 1.0
    """Temperature of the mask at the first step."""
    temperature_end: float = 0.1
    """Temperature at the last soft step; it falls geometrically."""
    mask_weight: float = 0.01
    """Weight of the mask's binary cross-entropy."""
    ratio_weight: float = 1.0
    """Weight of the retention-ratio loss."""
    output_weight: float = 1.0
    """Weight of the attention-output error in the hard phase; 0 trains on reconstruction alone, as the paper does."""
    kl_weight: float = 0.0
    """Weight, in the hard phase, of the KL divergence of the answers' logits through the frozen VLM; the paper has no
    such loss."""
    train_values: bool = False
    """Also move the value basis in the hard phase, away from the PCA of the paper, towards a small attention-output
    error."""
    ridge: float = 1e-4
    """Ridge of the closed-form reconstruction, relative to the mean token energy."""
    mask_init: str = "greedy"
    """Where the mask begins: "greedy" (pivoted Cholesky on the key moments), "even" or "random"."""
    refit: bool = True
    """Solve a linear reconstruction in closed form when the mask hardens."""

    def __post_init__(self) -> None:
        if self.soft_steps < 0 or self.hard_steps < 0:
            raise ValueError("soft_steps and hard_steps count steps: 0 or more.")
        if self.output_weight < 0 or self.kl_weight < 0:
            raise ValueError("output_weight and kl_weight are weights: 0 or more.")
        if self.mask_init not in ("greedy", "even", "random"):
            raise ValueError(f"mask_init {self.mask_init!r} is neither greedy, even nor random.")


@dataclass(frozen=True)
class TransformRecipe:
    """How a transform code is shaped and learns."""

    joint_heads: int = 0
    """KV heads that are coded together; 0 takes as many as have 128 channels in all."""
    joint_layers: int = 0
    """Layers that a cross-layer code codes together, keys and values alike; 0 takes as many as have 512 channels in
    all."""
    allocation: str = "output"
    """How layers share the bits: "output" (by what each bit saves in attention's output), "pyramid" (see
    --codec.pyramid) or "uniform"."""
    key_bits: float | None = None
    """Mean bits of an element of the keys, in place of what the allocation would give them."""
    value_bits: float | None = None
    """Mean bits of an element of the values, likewise; give both or neither."""
    query_metric: bool = True
    """Weigh the channels of keys by the queries that read them where attention's output is what counts; False weighs
    all alike."""
    readers: int = 64
    """Training queries of each KV head whose attention tells the encoder how much each token matters; 0 treats all
    alike."""
    logit_batches: int | None = None
    """Batches on which it is measured how much the answers' logits feel errors of the keys and values, through the
    frozen VLM and back (in the memory of a training step of --batch rows); the closed form then codes for them. 0 codes
    for each layer's attention output alone. Without it 12; none with --transform.allocation pyramid or uniform, which
    share the bits out without asking what errors cost."""
    maps: float | None = None
    """Most MiB that the decoders' maps take at 16 bits a number; fewer channels are coded where they would take more. 0
    sets no bound. Without it 30.5 (32 MB), more for models of more KV channels than a 7B with grouped queries has, none
    where bits would be left."""
    probe_batches: int = 2
    """Batches on which the allocation measures what each layer's keys and values cost."""
    steps: int = 0
    """Steps of gradient descent on bases, steps of quantisation and means; 0 leaves the closed form, as good a code
    unless bits are very few (on pages-vlm below 0.4 an element) or images of sizes will be read that training has not
    seen: there 60 steps help much."""
    lr: float = 1e-4
    """Peak learning rate of Adam up to 0.8 bit an element; half of it for each bit more."""
    output_weight: float = 1.0
    """Weight of the attention-output error."""
    kl_weight: float = 5.0
    """Weight of the KL of the answers' logits, through the frozen VLM; 0 leaves it out and is about twice as fast."""

    @property
    def felt_batches(self) -> int:
        """Of `logit_batches`, or what stands in for it."""
        return (
            (_LOGIT_BATCHES if self.allocation == "output" else 0) if self.logit_batches is None else self.logit_batches
        )

    def __post_init__(self) -> None:
        if self.allocation not in ("output", "pyramid", "uniform"):
            raise ValueError(f"--transform.allocation {self.allocation!r} is neither output, pyramid nor uniform.")
        if (self.key_bits is None) != (self.value_bits is None):
            raise ValueError("--transform.key_bits and --transform.value_bits fix two budgets: give both or neither.")
        if self.allocation != "output" and (self.logit_batches or self.key_bits is not None):
            raise ValueError(
                f"--transform.allocation {self.allocation} shares the bits out by itself: leave"
                " --transform.logit_batches, --transform.key_bits and --transform.value_bits out, or the allocation."
            )
        for name in (
            "joint_heads",
            "joint_layers",
            "readers",
            "logit_batches",
            "maps",
            "steps",
            "lr",
            "output_weight",
            "kl_weight",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"--transform.{name} {getattr(self, name)}: 0 or more is needed.")
        if self.probe_batches < 1:
            raise ValueError(f"--transform.probe_batches {self.probe_batches}: at least 1 is needed.")
        if self.steps and not self.output_weight and not self.kl_weight:
            raise ValueError(
                "--transform.output_weight and --transform.kl_weight are both 0: give one a weight, or"
                " --transform.steps 0."
            )
        for name in ("key_bits", "value_bits"):
            bits = getattr(self, name)
            if bits is not None and not 0 <= bits <= 8:
                raise ValueError(f"--transform.{name} {bits} is outside 0 to 8 bits an element.")


@dataclass(frozen=True)
class CodecRecipe:
    """How a capsule is shaped: tile and canonical_frame for all families, pyramid also for a transform code, the rest
    for a KVCapsule."""

    key_share: float = 0.5
    """Share of the stored tokens that keys get: 0.5 treats keys and values alike, as the paper does; less gives values
    more."""
    key_ratio: float | None = None
    """Mean retention ratio of the keys, in place of what --ratio and --codec.key_share give."""
    value_ratio: float | None = None
    """Mean retention ratio of the values, likewise."""
    pyramid: float = 0.0
    """How much more the first layer keeps than the mean, as a fraction of it (and the last layer less): 0 is
    uniform."""
    layer_weights: list[float] | None = None
    """How much each layer keeps relative to the others, in place of a pyramid; the mean stays what --ratio says."""
    tile: int = 0
    """Visual tokens that one map covers; 0 takes the whole image, as the paper does, which ties the capsule to one
    image size."""
    key_decoder: str = "linear"
    """"linear" (attention reads the retained keys through it) or "mlp" (the paper's prose; rebuilds all keys at every
    read)."""
    hidden: int = 256
    """Width of the MLP's inner layer."""
    canonical_frame: bool = True
    """Store keys as if their tile began at position 0."""


@dataclass(frozen=True)
class CompactRecipe:
    """How a compact capsule is shaped and learns."""

    bank: int = 512
    """Training queries of each KV head that attention is matched for."""
    ridge: float = 1e-3
    """Pull of the refit values towards plain means."""
    selector: str = "attention"
    """How tokens are ranked: "attention" (of the bank) or "learned" (a network that imitates the greedy choice)."""
    passes: int = 2
    """Times that the ranking is reordered by what each token adds to those above it."""
    hidden: int = 64
    """Width of the learned selector."""
    steps: int = 200
    """Steps of its training."""
    lr: float = 3e-3
    """Peak learning rate of Adam; it falls in a line."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.lr < 0:
            raise ValueError(f"--compact.steps {self.steps}, --compact.lr {self.lr}: 0 or more is needed.")


@dataclass(frozen=True)
class TrainerRecipe:
    """Where Lightning runs the training."""

    devices: int = 1
    """Processes (or GPUs) of each node."""
    num_nodes: int = 1
    """Machines."""
    strategy: str = "auto"
    """Lightning's strategy: auto or ddp."""


@dataclass(frozen=True)
class Recipe:
    """A training run of `kvcapsule train`."""

    model: str = "pages-vlm"
    """The frozen VLM: a folder, a shipped name or an id on the Hub."""
    revision: str | None = None
    """Its revision on the Hub."""
    dtype: str = "auto"
    """Precision of the frozen VLM: auto, float32, float16 or bfloat16."""
    device: str | None = None
    """Where it runs; None takes a GPU where there is one."""
    family: str = "transform"
    """The family of codecs: transform, kvcapsule or compact."""
    ratio: float = 0.4
    """How much is stored: in (0, 1] the share of what there was; from 2 on how many times less. 0.05 and 20 are the
    same."""
    bits: float | None = None
    """Of a transform code, in place of --ratio: mean bits of an element of the keys and values, 16 / ratio."""
    codec: CodecRecipe = field(default_factory=CodecRecipe)
    """Shape of the codecs."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How a KVCapsule learns."""
    transform: TransformRecipe = field(default_factory=TransformRecipe)
    """Shape and learning of a transform code."""
    data: SourceConfig = field(default_factory=lambda: SourceConfig(size=2048))
    """Where questions and answers come from."""
    compact: CompactRecipe = field(default_factory=CompactRecipe)
    """Shape and learning of a compact capsule."""
    trainer: TrainerRecipe = field(default_factory=TrainerRecipe)
    """Devices and processes."""
    held_out: int = 64
    """Questions kept apart to measure reconstruction on (the last of the source, never trained on)."""
    batch: int = 16
    """Questions a step."""
    moment_batches: int = 40
    """Batches that the closed-form parts (PCA, first reconstruction) are computed from."""
    harvests: str | None = None
    """Folder where the keys, values and queries of each batch are kept, for later runs of any family and ratio on the
    same model and data, which then need not run the model for them; they are large (the first run says how large).
    Without it they are made when needed."""
    workers: int = 0
    """Processes that prepare batches."""
    threads: int | None = None
    """CPU threads; None leaves it to torch."""
    seed: int = 0
    """Seed of everything random."""
    output: str = "runs/capsule"
    """The capsule's folder. Logs and checkpoints go to a folder of the same name with .run at its end."""
    force: bool = False
    """Replace a capsule that is at output."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run with the same output."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"--family {self.family!r} cannot be trained: choose one of {', '.join(FAMILIES)}.")
        if not (0 < self.ratio <= 1 or self.ratio >= 2):
            raise ValueError(
                f"--ratio {self.ratio}: give the retention ratio in (0, 1] (0.05 stores a twentieth), or from 2 on how"
                " many times less is stored (20 is the same)."
            )
        if self.bits is not None and (self.family not in CODED or not 0 < self.bits <= 8):
            raise ValueError(
                f"--bits {self.bits}: mean bits of an element of a transform code, above 0 and at most 8; else give"
                " --ratio."
            )
        if self.transform.joint_layers and self.family != "cross-layer":
            raise ValueError(
                f"--transform.joint_layers {self.transform.joint_layers}: the family {self.family} codes each layer by"
                " itself; leave it out, or train cross-layer."
            )
        if not 0 < self.codec.key_share < 1:
            raise ValueError(f"--codec.key_share {self.codec.key_share} is outside (0, 1).")
        for name, count in (
            ("batch", self.batch),
            ("moment_batches", self.moment_batches),
            ("held_out", self.held_out),
        ):
            if count < 1:
                raise ValueError(f"--{name} {count}: at least 1 is needed.")

    @property
    def retention(self) -> float:
        """What is stored / what there was, in (0, 1]."""
        return self.ratio if self.ratio <= 1 else 1 / self.ratio

    @property
    def element_bits(self) -> float:
        """Mean bits that an element of the keys and values may take."""
        return self.retention * REFERENCE_BITS if self.bits is None else self.bits

    @property
    def work(self) -> Path:
        """Folder of logs and checkpoints."""
        return Path(self.output + ".run")

    def mean_ratios(self) -> tuple[float, float]:
        """Mean retention ratios of keys and values: what --ratio gives, split by key_share; what one cannot use goes to
        the other."""
        keys, values = 2 * self.retention * self.codec.key_share, 2 * self.retention * (1 - self.codec.key_share)
        keys, values = min(1.0, keys + max(0.0, values - 1.0)), min(1.0, values + max(0.0, keys - 1.0))
        return (
            keys if self.codec.key_ratio is None else self.codec.key_ratio,
            values if self.codec.value_ratio is None else self.codec.value_ratio,
        )

    def _by_layer(self, mean: float, layers: int) -> tuple[float, ...]:
        weights = self.codec.layer_weights
        if weights is None:
            return pyramid(mean, layers, self.codec.pyramid)
        if self.codec.pyramid:
            raise ValueError("--codec.pyramid and --codec.layer_weights both say what layers keep: give one.")
        if len(weights) != layers:
            raise ValueError(
                f"--codec.layer_weights has {len(weights)} numbers, but the model has {layers} layers: give one for"
                " each."
            )
        return weighted(mean, weights)

    def kvcapsule_config(self, layers: int, tile: int) -> KVCapsuleConfig:
        """The sizes of a KVCapsule for a model with so many layers and tiles of so many tokens."""
        keys, values = self.mean_ratios()
        return KVCapsuleConfig(
            tile=tile,
            canonical_frame=self.codec.canonical_frame,
            key_ratios=self._by_layer(keys, layers),
            value_ratios=self._by_layer(values, layers),
            key_decoder=self.codec.key_decoder,
            hidden=self.codec.hidden,
        )
