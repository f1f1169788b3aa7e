"""What a run will cost, before anything starts: memory of one device, bytes on the wire, time. Arithmetic, no torch.

The letters are those of docs/scaling.md: W devices, M pairs in the batch, N = M / W pairs on a device, m in a
micro-batch, E embed_dim, P parameters.
"""

from dataclasses import dataclass
from typing import Literal

from diptych.errors import UsageError
from diptych.model import cost
from diptych.model.config import CLIPConfig
from diptych.train.config import Sharding

DeviceKind = Literal["h200", "h100", "a100", "v100", "cpu"]
Products = Literal["bfloat16", "float32"]
Towers = tuple[cost.TowerCost, cost.TowerCost]

ITEMSIZE: dict[Products, int] = {"bfloat16": 2, "float32": 4}
MACHINE = 8
"""Devices that share a machine and its network cards."""
USABLE = 0.9
"""Share of a device's memory that a plan fills: the rest is for the driver, workspaces, gaps between blocks and
gradients on their way back. An assumption."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a maker's data sheet says."""

    flops: dict[Products, float]
    """Peak of dense matrix products, operations per second."""
    memory: float
    """Bytes."""
    link: float
    """Between devices of one machine, bytes per second in each direction."""
    network: float
    """Between machines, bytes per second in each direction, of all network cards of one machine together."""
    tile: int = 8192
    """Rows and columns of a tile of the loss (`diptych.train.loss.TILE`)."""


DEVICES: dict[DeviceKind, Device] = {
    # NVIDIA's H100 SXM5 data sheet: 989 bfloat16 and 67 float32 TFLOP/s without sparsity, NVLink 900 GB/s both ways
    # together; a DGX H100 has eight cards of 400 Gbit/s.
    "h100": Device(flops={"bfloat16": 989e12, "float32": 67e12}, memory=80e9, link=450e9, network=400e9),
    # NVIDIA's H200 SXM data sheet: an H100 with 141 GB.
    "h200": Device(flops={"bfloat16": 989e12, "float32": 67e12}, memory=141e9, link=450e9, network=400e9),
    # NVIDIA's A100 80GB SXM data sheet: 312 and 19.5 TFLOP/s, NVLink 600 GB/s; a DGX A100 has eight of 200 Gbit/s.
    "a100": Device(flops={"bfloat16": 312e12, "float32": 19.5e12}, memory=80e9, link=300e9, network=200e9),
    # NVIDIA's V100 SXM2 data sheet: 125 TFLOP/s in float16 (it has no bfloat16; bytes are the same) and 15.7 in
    # float32, NVLink 300 GB/s; 100 Gbit/s for a machine of eight, as Amazon's p3dn.24xlarge has.
    "v100": Device(flops={"bfloat16": 125e12, "float32": 15.7e12}, memory=32e9, link=150e9, network=12.5e9),
    # Two cores of a Xeon without AMX, 23 GB, as measured in LOG.md (2048 x 2048 products); 10 Gbit/s is a guess.
    "cpu": Device(flops={"bfloat16": 169e9, "float32": 324e9}, memory=23e9, link=1.25e9, network=1.25e9, tile=1024),
}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """The run that is planned."""

    batch_size: int = 32768
    """M: pairs in a step, over all devices."""
    devices: int = 8
    """W; eight share a machine."""
    device_kind: DeviceKind = "h100"
    """Whose memory, speed and links are taken."""
    precision: Products = "bfloat16"
    """Precision of matrix products; on a v100 the 16-bit type is float16. Weights and gradients are float32."""
    micro_batch_size: int | None = None
    """m: pairs of a device that go through the towers at once; by default as many as fit. Fewer than it has means
    gradient caching, one forward pass more."""
    sharding: Sharding = "ddp"
    """ddp: every device has all weights. fsdp: each keeps a part and gathers a block when it needs it."""
    recompute: bool = False
    """Keep the inputs of each Transformer block only and compute the block again for its derivatives."""
    half_statistics: bool = False
    """Adam's two statistics in 16 bits, as in the paper, instead of float32."""
    caption_tokens: int = 16
    """Tokens of a typical caption, start and end included: what is padded behind it is not computed."""
    samples: float = 400e6
    """Pairs in the data."""
    epochs: float = 32.0
    """Passes over the data."""
    utilisation: float = 0.4
    """Share of a device's peak that the towers reach. An assumption, not a measurement."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and value <= 0 and not isinstance(value, bool):
                raise UsageError(f"{name} {value} must be above 0")
        if self.batch_size % self.devices:
            down = self.batch_size // self.devices * self.devices
            near = [str(size) for size in (down, down + self.devices) if size]
            raise UsageError(
                f"batch_size {self.batch_size} does not split evenly over {self.devices} devices; "
                f"use --batch-size {' or '.join(near)}, or another number of --devices"
            )
        if self.micro_batch_size is not None and self.micro_batch_size > self.pairs:
            raise UsageError(
                f"micro_batch_size {self.micro_batch_size} is more than the {self.pairs} pairs of a device; "
                f"use --micro-batch-size {self.pairs} or less"
            )
        if self.utilisation > 1:
            raise UsageError(f"utilisation {self.utilisation} is a share of the peak: above 0, at most 1")
        if self.steps_per_epoch < 1:
            raise UsageError(
                f"{self.samples:.0f} samples are less than one batch of {self.batch_size}; use a smaller --batch-size"
            )

    @property
    def pairs(self) -> int:
        """N: pairs on one device."""
        return self.batch_size // self.devices

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data; what is left over is not used."""
        return int(self.samples) // self.batch_size


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """What the run will cost. One device, one step, unless a line says otherwise."""

    parameters: dict[str, int]
    """Parameters of `image`, `text` and `total`, temperature and bias included."""
    micro_batch_size: int
    """m, as given or as many as fit."""
    micro_batches: int
    """Backward passes in a step; above 1 there is gradient caching."""
    flops_per_pair: dict[str, int]
    """Forward pass of `image`, `text` and their sum `forward`; `backward`, twice that; what is computed again to save
    memory, `recompute` and `cache`; `loss`, forward and backward; `total`."""
    memory: dict[str, int]
    """Bytes by component, and `total`."""
    wire: dict[str, int]
    """Bytes that a device sends (and receives) by purpose, and `total`."""
    usable_memory: int
    """Bytes that a plan may fill: 90 % of the device's."""
    fits: bool
    """Whether the memory's `total` is within that."""
    largest_micro_batch: int
    """Pairs: the largest m that fits, a power of two unless it is N; 0 if not even one pair does."""
    steps: dict[str, int]
    """In an `epoch`, and in all, `run`."""
    seconds: dict[str, float]
    """`compute` and `wire` of a step; `step`, the longer of them, as if one hid behind the other; `epoch`; `run`."""


def run(config: PlanConfig, model: CLIPConfig) -> PlanReport:
    """Plan a run."""
    device = DEVICES[config.device_kind]
    towers = cost.image_tower(model), cost.text_tower(model, config.caption_tokens)
    usable = int(USABLE * device.memory)
    largest = largest_micro_batch(config, model, towers, usable)
    micro_batch = config.micro_batch_size or largest or 1
    passes = -(-config.pairs // micro_batch)
    flops = count_flops(config, model, towers, passes)
    memory = count_memory(config, model, towers, micro_batch)
    wire = count_wire(config, model, towers, passes)
    steps = {"epoch": config.steps_per_epoch, "run": round(config.steps_per_epoch * config.epochs)}
    compute = flops["total"] * config.pairs / (device.flops[config.precision] * config.utilisation)
    on_wire = wire["total"] / bandwidth(device, config.devices)
    step = max(compute, on_wire)
    image, text = (tower.parameters for tower in towers)
    return PlanReport(
        parameters={"image": image, "text": text, "total": count_parameters(model, towers)},
        micro_batch_size=micro_batch,
        micro_batches=passes,
        flops_per_pair=flops,
        memory=memory,
        wire=wire,
        usable_memory=usable,
        fits=memory["total"] <= usable,
        largest_micro_batch=largest,
        steps=steps,
        seconds={"compute": compute, "wire": on_wire, "step": step} | {name: step * n for name, n in steps.items()},
    )


def count_parameters(model: CLIPConfig, towers: Towers) -> int:
    """Parameters of both towers, with the temperature and, if there is one, the bias of the logits."""
    return sum(tower.parameters for tower in towers) + 1 + model.logit_bias


def count_flops(config: PlanConfig, model: CLIPConfig, towers: Towers, passes: int) -> dict[str, int]:
    """Operations of one pair in one step, by purpose."""
    image, text = (tower.flops for tower in towers)
    forward = image + text
    parts = {
        "backward": 2 * forward,
        "recompute": config.recompute * sum(tower.recomputed_flops for tower in towers),
        "cache": (passes > 1) * forward,
        # Of M similarities each: the product, the product again when it is differentiated, and its two derivatives.
        "loss": 8 * config.batch_size * model.embed_dim,
    }
    return {"image": image, "text": text, "forward": forward, **parts, "total": forward + sum(parts.values())}


def count_memory(config: PlanConfig, model: CLIPConfig, towers: Towers, micro_batch: int) -> dict[str, int]:
    """Bytes on one device at the height of a step, by component."""
    itemsize, is_cut = ITEMSIZE[config.precision], config.sharding == "fsdp" and config.devices > 1
    parameters, tile = count_parameters(model, towers), DEVICES[config.device_kind].tile
    own = -(-parameters // config.devices) if is_cut else parameters
    activations = sum(tower.activation_bytes(itemsize, recompute=config.recompute) for tower in towers)
    outside = sum(tower.outside.parameters for tower in towers)
    block = max(tower.largest_block for tower in towers)
    looked_up = model.text.vocab_size * model.text.width  # in no product
    picture = 3 * model.vision.image_size**2
    n, m, e = config.pairs, config.batch_size, model.embed_dim
    memory = {
        "weights": 4 * own,
        # Autocast keeps 16-bit weights for the backward pass.
        "copies": itemsize * (parameters - looked_up) if itemsize < 4 else 0,
        # What fsdp has put together: all that is in no block, the block that works and the next one; their gradients.
        "gathered": 4 * (2 * outside + 3 * block) if is_cut else 0,
        "gradients": 4 * own,
        "statistics": 2 * (2 if config.half_statistics else 4) * own,
        # Token ids, and float32 pictures where a 16-bit copy is among the activations.
        "batch": micro_batch * (8 * model.text.context_length + (4 * picture if itemsize < 4 else 0)),
        "activations": micro_batch * activations,
        # Both towers' features here and their gradients; those of all texts and theirs.
        "features": 4 * e * (4 * n + 2 * m),
        # Three tiles at a time, never N x M; two numbers a row and a column; each device's sums of the columns.
        "loss": 4 * (3 * min(n, tile) * min(m, tile) + 2 * (n + m) + config.devices * m),
    }
    return memory | {"total": sum(memory.values())}


def largest_micro_batch(config: PlanConfig, model: CLIPConfig, towers: Towers, usable: int) -> int:
    """The most pairs that fit: all of a device's, or a power of two."""
    fixed, with_one = (count_memory(config, model, towers, size)["total"] for size in (0, 1))
    fits = min(config.pairs, max(0, usable - fixed) // (with_one - fixed))
    return fits if fits == config.pairs or not fits else 1 << (fits.bit_length() - 1)


def count_wire(config: PlanConfig, model: CLIPConfig, towers: Towers, passes: int) -> dict[str, int]:
    """Bytes that one device sends in a step, in rings: to gather or to reduce-scatter B bytes takes (W - 1) / W of B,
    an all-reduce is both."""

    def ring(size: int) -> int:
        return size * (config.devices - 1) // config.devices

    parameters, m = count_parameters(model, towers), config.batch_size
    if config.sharding == "ddp":
        weights, gradients = 0, ring(2 * 4 * parameters)
    else:
        blocks = sum(block.inside.parameters for tower in towers for block in tower.blocks)
        outside = sum(tower.outside.parameters for tower in towers)
        # A block is gathered for each forward pass, cached ones too, and each backward pass; what is in no block stays
        # between them. The scalars are not cut.
        weights = ring(4 * (blocks * passes * (3 if passes > 1 else 2) + outside * passes))
        gradients = passes * ring(4 * (blocks + outside))
    wire = {
        "weights": weights,
        "gradients": gradients,
        "text_features": ring(4 * m * model.embed_dim),
        "text_gradients": ring(4 * m * model.embed_dim),
        "sums": ring(4 * config.devices * m),  # of its columns, from every device
    }
    return wire | {"total": sum(wire.values())}


def bandwidth(device: Device, devices: int) -> float:
    """Bytes per second of a ring through all devices: what each sends crosses a machine's border once."""
    return device.link if devices <= MACHINE else min(device.link, device.network)
