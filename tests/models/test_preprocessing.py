"""The one preprocessing against Pillow and torchvision, and its ONNX graph against itself."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode, v2

from edgetune.errors import ConfigError
from edgetune.models.preprocessing import Preprocess, Preprocessing

SIZES = [(480, 640), (640, 480), (90, 70), (8, 8), (1, 7), (224, 301), (500, 333)]
UNIT = {"mean": (0.0,) * 3, "std": (1.0,) * 3}


def smooth_image(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    small = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height)))


def run(spec: Preprocessing, image: np.ndarray) -> np.ndarray:
    return Preprocess(spec)(torch.from_numpy(image[None]))[0].numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", SIZES)
def test_centre_crop_agrees_with_torchvision_in_float(size, interpolation):
    image = smooth_image(*size)
    spec = Preprocessing(input_size=56, resize_size=64, interpolation=interpolation, **UNIT)
    reference = v2.Compose(
        [
            v2.Resize(64, interpolation=InterpolationMode(interpolation), antialias=True),
            v2.CenterCrop(56),
        ]
    )(torch.from_numpy(image).permute(2, 0, 1).float())
    # on bytes, as models are trained, bicubic's overshoot is cut off
    reference = reference.clamp(0, 255).numpy() / 255
    np.testing.assert_allclose(run(spec, image), reference, atol=2e-5)


@pytest.mark.parametrize("size", SIZES)
def test_squash_agrees_with_pillow_to_its_rounding(size):
    image = smooth_image(*size)
    spec = Preprocessing(input_size=48, resize_size=48, crop_mode="squash", **UNIT)
    reference = np.asarray(Image.fromarray(image).resize((48, 48), Image.Resampling.BILINEAR))
    # Pillow rounds to a grey level after each of its two passes
    difference = np.abs(run(spec, image) * 255 - reference.transpose(2, 0, 1))
    assert difference.max() <= 1.01


def test_normalisation_by_hand():
    spec = Preprocessing(input_size=2, resize_size=2, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    image = np.full((2, 2, 3), 255, np.uint8)
    np.testing.assert_allclose(run(spec, image)[:, 0, 0], [1.0, 3.0, 1.0], rtol=1e-6)


def test_image_of_the_right_size_is_not_resampled():
    spec = Preprocessing(input_size=32, resize_size=32, **UNIT)
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_allclose(run(spec, image) * 255, image.transpose(2, 0, 1), atol=1e-4)


def test_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(ConfigError, match="at least input_size 224, got 200"):
        Preprocessing(input_size=224, resize_size=200)


def test_another_input_size_keeps_the_crop_share():
    spec = Preprocessing(input_size=224, resize_size=256).at_size(112)
    assert (spec.input_size, spec.resize_size) == (112, 128)
