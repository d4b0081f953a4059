"""Roofline time: how long a pass takes on a device that is always limited by arithmetic or by memory bandwidth.

Each operator takes the longer of FLOPs / peak and bytes / bandwidth, and operators follow each other without overlap
(Williams et al., 2009; LLM-Viewer, arXiv:2402.16363). On ``nvidia_V100`` this is the paper's column "Prefill time".
It is no measurement: real kernels reach neither roof, and launch overhead is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from adallava.cost.flops import Op, Pass, Tokens, decode_step, prefill
from adallava.cost.load import PlanLike
from adallava.cost.spec import CostError, ModelSpec
from adallava.registry import Registry

PAPER_DEVICE = "nvidia_V100"


@dataclass(frozen=True)
class Device:
    """Peak rates of one device; ``CostError`` unless all are above 0. Make one by hand for a device not listed."""

    name: str
    """What it is called in results."""
    bandwidth_bytes_per_s: float
    """Memory bandwidth."""
    fp16_flops_per_s: float
    """Dense 16-bit arithmetic."""
    int8_ops_per_s: float | None
    """Dense 8-bit arithmetic, None where it has none."""
    onchip_bytes: float
    """Register or cache memory that flash attention blocks live in."""

    def __post_init__(self) -> None:
        """Check the rates."""
        for name in ("bandwidth_bytes_per_s", "fp16_flops_per_s", "int8_ops_per_s", "onchip_bytes"):
            value = getattr(self, name)
            if value is None and name == "int8_ops_per_s":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise CostError(f"{name} of device {self.name!r} is {value!r}, expected a number above 0.")

    @property
    def ridge_flops_per_byte(self) -> float:
        """Arithmetic intensity above which the device is limited by arithmetic."""
        return self.fp16_flops_per_s / self.bandwidth_bytes_per_s


# The numbers are those of the released research code, from vendors' data sheets, so that its times come out. Upstream
# LLM-Viewer has 309.677e12 / 2 FLOP/s for nvidia_A6000 and no nvidia_A6000_Ada.
_A100_40G = (1555e9, 312e12, 624e12, 27648e3)
_A100_80G = (2039e9, 312e12, 624e12, 27648e3)
_H100_SXM = (3072e9, 989.5e12, 1979e12, 33792e3)
_TABLE: dict[str, tuple[float, float, float | None, float]] = {
    # bandwidth, FP16, INT8, on-chip
    "nvidia_V100": (900e9, 112e12, 62e12, 20480e3),
    "nvidia_A6000": (768e9, 154.8e12, 309.7e12, 21504e3),
    "nvidia_A6000_Ada": (960e9, 364.2e12, 728.5e12, 36352e3),
    "nvidia_A100": _A100_40G,
    "nvidia_A100_40G": _A100_40G,
    "nvidia_A100_80G": _A100_80G,
    "nvidia_A800_80G_SXM": _A100_80G,
    "nvidia_A40": (696e9, 149.7e12, 299.3e12, 21504e3),
    "nvidia_H100": _H100_SXM,
    "nvidia_H100_SXM": _H100_SXM,
    "nvidia_H100_PCIe": (2048e9, 756.5e12, 1513e12, 29184e3),
    "nvidia_L40": (864e9, 181e12, 362e12, 36352e3),
    "intel_13900k": (89.6e9, 1.3824e12, None, 36e6),
}

DEVICES: Registry[Device] = Registry("device")
for _name, _rates in _TABLE.items():
    DEVICES.register(_name, Device(_name, *_rates))
DEVICES.freeze()


def get_device(device: str | Device) -> Device:
    """Return the device of that name (a ``Device`` as it is); ``UnknownNameError`` with a suggestion otherwise."""
    return device if isinstance(device, Device) else DEVICES.get(device)


def op_time_ms(op: Op, device: str | Device) -> float:
    """Return max(FLOPs / peak, bytes / bandwidth) of one operator in milliseconds (16 bit)."""
    rates = get_device(device)
    return 1e3 * max(op.flops / rates.fp16_flops_per_s, op.traffic_bytes / rates.bandwidth_bytes_per_s)


def pass_time_ms(ops: Pass, device: str | Device) -> float:
    """Return the time of a pass in milliseconds: the sum over its operators."""
    rates = get_device(device)
    return sum(count * op_time_ms(op, rates) for op, count in ops.ops)


def prefill_time_ms(
    spec: ModelSpec,
    plan: PlanLike,
    tokens: Tokens,
    device: str | Device = PAPER_DEVICE,
    *,
    batch: int = 1,
    flash: bool = False,
) -> float:
    """Return the roofline time of a prefill in milliseconds (paper convention; the default device is the paper's).

    Arguments and errors as for ``flops.prefill``; flash counts attention as one fused operator, which the paper does
    not. Raises ``UnknownNameError`` for a device that is not in the table.
    """
    onchip = _onchip(device, flash)
    return pass_time_ms(prefill(spec, plan, tokens, batch=batch, flash_onchip_bytes=onchip), device)


def decode_step_time_ms(
    spec: ModelSpec,
    plan: PlanLike,
    tokens: Tokens,
    device: str | Device = PAPER_DEVICE,
    *,
    batch: int = 1,
    flash: bool = False,
) -> float:
    """Return the roofline time of one decoding step in milliseconds, as ``prefill_time_ms`` (paper convention)."""
    onchip = _onchip(device, flash)
    return pass_time_ms(decode_step(spec, plan, tokens, batch=batch, flash_onchip_bytes=onchip), device)


def _onchip(device: str | Device, flash: bool) -> int | None:
    return int(get_device(device).onchip_bytes) if flash else None
