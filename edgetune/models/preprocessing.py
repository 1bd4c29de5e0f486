"""The one definition of image preprocessing: pixels of any size -> the network's input.

Training runs this module after augmentation; export puts the same module into the ONNX
graph. Resizing is separable and antialiased, as Pillow and torchvision do it (a triangle or
Catmull-Rom kernel, widened by the scale when shrinking), written with gathers and
matrix products so that it needs no Resize operator, whose antialiasing differs between
versions and is missing in some runtimes. Only rows and columns that the crop keeps are made.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import SymInt, Tensor, nn

from edgetune.errors import ConfigError

# up to this many source lines a tap, one product with a mostly empty matrix is faster than
# gathering the lines that each kept one reads; a graph, whose sizes are open, gathers
DENSE = 24
# an edge's length: a number when run, a symbol when exported
Size = int | SymInt


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a vision model expects, in timm's vocabulary.

    input_size: side of the network's input, pixels.
    resize_size: side, pixels, that is resized to before the middle is cut out.
    crop_mode: "center" resizes the shorter edge and keeps the aspect; "squash" resizes both.
    mean, std: per channel RGB, of values in 0..1.
    channel_order: of the network's input.
    """

    input_size: int
    resize_size: int
    crop_mode: Literal["center", "squash"] = "center"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    channel_order: Literal["rgb", "bgr"] = "rgb"

    def __post_init__(self) -> None:
        """Check that the crop fits.

        Raises:
            ConfigError: the resized image would be smaller than the crop.
        """
        if self.resize_size < self.input_size:
            raise ConfigError(
                f"resize_size: expected at least input_size {self.input_size},"
                f" got {self.resize_size}"
            )

    def at_size(self, input_size: int) -> "Preprocessing":
        """Return the same preprocessing for another input size, its crop share kept."""
        resize = max(input_size, round(self.resize_size * input_size / self.input_size))
        return dataclasses.replace(self, input_size=input_size, resize_size=resize)


class Preprocess(nn.Module):
    """uint8 (batch, height, width, 3) -> float32 (batch, 3, input_size, input_size)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, spec: Preprocessing) -> None:
        """Keep the spec; mean and std become buffers in units of 0..255."""
        super().__init__()
        self.spec = spec
        self.register_buffer("mean", torch.tensor(spec.mean).mul(255).view(-1, 1, 1), False)
        self.register_buffer(
            "scale", torch.tensor(spec.std).mul(255).reciprocal().view(-1, 1, 1), False
        )

    def forward(self, image: Tensor) -> Tensor:
        """Resize, crop, normalise and order the channels."""
        batch, height, width, channels = image.shape  # sizes may be symbolic
        side = self.spec.input_size
        if self.spec.crop_mode == "center":
            short = torch.sym_min(height, width)
            resized = (
                height * self.spec.resize_size // short,
                width * self.spec.resize_size // short,
            )
        else:
            resized = (self.spec.resize_size, self.spec.resize_size)
        rows, row_weights = self._window(height, resized[0], image.device)
        columns, column_weights = self._window(width, resized[1], image.device)
        x = image.reshape(batch, height, width * channels)
        if not torch.compiler.is_compiling() and height <= DENSE * rows.shape[1]:
            x = _dense(rows, row_weights, height) @ x.float()  # (B, S, W C)
        else:
            x = torch.matmul(row_weights[:, None, :], x[:, rows].float())  # (B, S, 1, W C)
        x = x.reshape(batch, side, width, channels)
        if not torch.compiler.is_compiling() and width <= DENSE * columns.shape[1]:
            # (B, C, S rows, W) times (W, S columns)
            x = x.permute(0, 3, 1, 2) @ _dense(columns, column_weights, width).T
        else:
            # columns to the front, so that the second gather copies whole rows too
            x = x.permute(0, 2, 3, 1).reshape(batch, width, channels * side)[:, columns]
            x = torch.matmul(column_weights[:, None, :], x)  # (B, S, 1, C S)
            x = x.reshape(batch, side, channels, side).permute(0, 2, 3, 1)  # (B, C, S rows, S cols)
        if self.spec.interpolation == "bicubic":  # it overshoots at edges, and a byte cannot
            x = x.clamp(0, 255)
        x = (x - self.mean) * self.scale
        return x.flip(1) if self.spec.channel_order == "bgr" else x

    def _window(self, size: Size, resized: Size, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return which source lines each kept line reads, and their weights.

        Args:
            size: length of the source edge, pixels; may be symbolic.
            resized: length of the edge after resizing, of which the middle is kept.
            device: where the tensors go.

        Returns:
            indices, int64 (input_size, taps), and weights, float32 (input_size, taps), whose
            rows sum to 1.
        """
        reach = 1 if self.spec.interpolation == "bilinear" else 2
        taps = 2 * torch.sym_max((reach * size + resized - 1) // resized, reach) + 1
        source = torch.scalar_tensor(size, dtype=torch.float32, device=device)
        target = torch.scalar_tensor(resized, dtype=torch.float32, device=device)
        scale = source / target
        widen = torch.clamp(scale, min=1.0)
        # torchvision's centre crop starts at round((resized - side) / 2), halves to even
        start = torch.round((target - self.spec.input_size) / 2)
        kept = torch.arange(self.spec.input_size, dtype=torch.float32, device=device)
        centre = (kept + start + 0.5) * scale
        first = torch.floor(centre - reach * widen)
        lines = first[:, None] + torch.arange(taps, dtype=torch.float32, device=device)[None]
        distance = (lines + 0.5 - centre[:, None]).abs() / widen
        weights = _triangle(distance) if reach == 1 else _catmull_rom(distance)
        weights = torch.where((lines >= 0) & (lines <= source - 1), weights, 0.0)
        weights = weights / weights.sum(1, keepdim=True)
        lines = torch.minimum(torch.clamp(lines, min=0), source - 1)
        return lines.to(torch.int64), weights


def _dense(lines: Tensor, weights: Tensor, size: int) -> Tensor:
    """Return the (input_size, size) matrix that reads `lines` with `weights`."""
    matrix = torch.zeros(len(lines), size, device=lines.device)
    return matrix.scatter_add_(1, lines, weights)


def _triangle(distance: Tensor) -> Tensor:
    return torch.clamp(1 - distance, min=0)


def _catmull_rom(d: Tensor) -> Tensor:
    """Return the cubic convolution kernel with a = -0.5 (Keys 1981, eq. 15)."""
    near = (1.5 * d - 2.5) * d * d + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return torch.where(d < 1, near, torch.where(d < 2, far, 0.0))
