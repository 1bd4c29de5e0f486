import io
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgetune.errors import DataError, IntegrityError
from edgetune.runtime import EdgeModel
from edgetune.runtime.manifest import SessionSettings
from edgetune.runtime.tasks.image_classification import decode_image

RED, GREEN, BLUE = (200, 10, 10), (10, 200, 10), (10, 10, 200)


def solid(color, size=(5, 4)):
    return Image.new("RGB", size, color)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def model(color_bundle):
    return EdgeModel.load(color_bundle)


@pytest.fixture
def photo(tmp_path):
    def write(data, name="photo.png"):
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def test_scores_are_the_softmax_of_the_channel_means(model):
    # means (1, 0, 0): e / (e + 2) and twice 1 / (e + 2)
    image = np.array([[[0, 0, 0], [2, 0, 0]]], np.uint8)
    result = model.predict(image, all_scores=True)
    assert result.label == "red"
    assert result.score == pytest.approx(math.e / (math.e + 2))
    assert result.scores == pytest.approx(
        {"red": math.e / (math.e + 2), "green": 1 / (math.e + 2), "blue": 1 / (math.e + 2)}
    )
    assert sum(result.scores.values()) == pytest.approx(1.0)


def test_scores_of_all_labels_come_only_when_asked_for(model):
    assert model.predict(solid(RED)).scores is None


@pytest.mark.parametrize(
    "form",
    [
        lambda image, photo: photo(encoded(image)),
        lambda image, photo: str(photo(encoded(image))),
        lambda image, _: encoded(image),
        lambda image, _: bytearray(encoded(image)),
        lambda image, _: memoryview(encoded(image)),
        lambda image, _: image,
        lambda image, _: Image.open(io.BytesIO(encoded(image))),
        lambda image, _: np.array(image),
        lambda image, _: np.array(image.convert("RGBA")),
        lambda image, _: np.asfortranarray(np.array(image))[::-1],
    ],
    ids=[
        "path", "text path", "bytes", "bytearray", "memoryview", "PIL image", "lazy PIL image",
        "RGB array", "RGBA array", "strided array",
    ],
)  # fmt: skip
@pytest.mark.parametrize(("color", "label"), [(RED, "red"), (GREEN, "green"), (BLUE, "blue")])
def test_every_form_of_an_image_gives_the_same_label(model, photo, form, color, label):
    assert model.predict(form(solid(color), photo)).label == label


def test_a_list_of_mixed_forms_and_sizes_keeps_its_order(model, photo):
    samples = [
        solid(BLUE, (7, 2)),
        np.array(solid(RED)),
        encoded(solid(GREEN)),
        photo(encoded(solid(RED, (3, 3)), "JPEG"), "photo.jpg"),
        np.array(solid(GREEN)),
        solid(BLUE),
        np.array(solid(BLUE, (1, 1))),
        np.array(solid(RED, (2, 7))),
    ]
    labels = [r.label for r in model.predict(samples)]
    assert labels == ["blue", "red", "green", "red", "green", "blue", "blue", "red"]
    assert [r.label for r in model.predict(tuple(samples))] == labels


def test_a_list_longer_than_a_batch_keeps_its_order(model):
    # batches hold 4; 22 images of three sizes wait for one another
    colors = [(RED, GREEN, BLUE)[i % 3] for i in range(22)]
    samples = [solid(c, (1 + i % 3, 2)) for i, c in enumerate(colors)]
    expected = [("red", "green", "blue")[i % 3] for i in range(22)]
    assert [r.label for r in model.predict(samples)] == expected


def test_a_long_list_of_unlike_sizes_is_not_held_in_memory_at_once(model, monkeypatch):
    # two batches of 4 may wait: the 9th image is encoded after an answer, not before
    events = []
    encode, run = model.task.encode, model._run
    monkeypatch.setattr(model.task, "encode", lambda s: (events.append("encode"), encode(s))[1])
    monkeypatch.setattr(model, "_run", lambda *a: (events.append("run"), run(*a))[1])
    results = model.predict([np.zeros((1, 1 + i, 3), np.uint8) for i in range(20)])
    assert len(results) == 20
    assert events[:9] == ["encode"] * 8 + ["run"]
    assert events.count("run") == 20


def test_a_four_dimensional_array_is_a_list_of_images(model):
    images = np.stack([np.array(solid(c)) for c in (GREEN, RED)])
    assert [r.label for r in model.predict(images)] == ["green", "red"]


@pytest.mark.parametrize("empty", [[], (), np.zeros((0, 4, 4, 3), np.uint8)])
def test_no_images_give_no_results(model, empty):
    assert model.predict(empty) == []


@pytest.mark.parametrize("shape", [(3, 2), (3, 2, 1)])
def test_a_grey_array_becomes_three_equal_channels(shape):
    pixels = decode_image(np.full(shape, 9, np.uint8))
    np.testing.assert_array_equal(pixels, np.full((3, 2, 3), 9, np.uint8))


def test_the_alpha_channel_of_an_array_is_dropped():
    pixels = decode_image(np.array([[[1, 2, 3, 0]]], np.uint8))
    np.testing.assert_array_equal(pixels, [[[1, 2, 3]]])


def test_pixels_come_as_rows_columns_and_rgb():
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (1, 2, 3))
    image.putpixel((1, 0), (4, 5, 6))
    pixels = decode_image(encoded(image))
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, [[[1, 2, 3], [4, 5, 6]]])


@pytest.mark.parametrize("as_pil", [False, True])
def test_the_orientation_that_a_camera_wrote_is_applied(as_pil):
    # 8 wide, 16 high as stored, upper half red; orientation 6: shown turned right by 90 degrees,
    # so 16 wide, 8 high with red on the right
    image = Image.new("RGB", (8, 16), BLUE)
    image.paste(RED, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(image, "JPEG", exif=exif, quality=95)
    pixels = decode_image(Image.open(io.BytesIO(data)) if as_pil else data)
    assert pixels.shape == (8, 16, 3)
    assert pixels[:, 9:].mean(axis=(0, 1)) == pytest.approx(RED, abs=6)
    assert pixels[:, :7].mean(axis=(0, 1)) == pytest.approx(BLUE, abs=6)


def test_16_bit_grey_is_scaled_to_8_bits():
    grey = np.array([[0, 255, 256, 0x8000, 0xFFFF]], np.uint16)  # the high byte counts
    pixels = decode_image(png_of_16_bit_grey(grey))
    np.testing.assert_array_equal(pixels[..., 0], [[0, 0, 1, 128, 255]])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def png_of_16_bit_grey(values):
    """Write a PNG by the book (PNG specification, section 5), so that no Pillow decides."""
    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_a_palette_with_transparency_gives_its_colors():
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    for transparency in (0, b"\x00\x80"):  # one index, or an alpha for each
        pixels = decode_image(encoded(image, "PNG", transparency=transparency))
        np.testing.assert_array_equal(pixels, [[RED, GREEN]])


def test_cmyk_becomes_rgb():
    # C 0 M 255 Y 255 K 0 is red
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = decode_image(encoded(image, "JPEG", quality=95))
    assert pixels.mean(axis=(0, 1)) == pytest.approx((255, 0, 0), abs=4)


@pytest.mark.parametrize(("mode", "color"), [("1", 1), ("L", 255), ("LA", (255, 0))])
def test_black_and_white_modes_become_rgb(mode, color):
    pixels = decode_image(encoded(Image.new(mode, (2, 2), color)))
    np.testing.assert_array_equal(pixels, np.full((2, 2, 3), 255, np.uint8))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            None,
            "an open binary file, a PIL image or a uint8 array, got builtins.NoneType",
        ),
        (7, "got builtins.int"),
        ({"image": 1}, "got builtins.dict"),
        (np.zeros((2, 2, 3)), "expected a uint8 array with values 0..255, got float64"),
        (np.zeros((2, 2, 3), np.float32), "got float32"),
        (np.zeros((2, 2, 3), np.int64), "got int64"),
        (np.zeros((3, 8, 8), np.uint8), r"shape \(height, width, 3\), got \(3, 8, 8\)"),
        (np.zeros(5, np.uint8), r"got \(5,\)"),
        (np.zeros((0, 5, 3), np.uint8), r"got \(0, 5, 3\)"),
        (b"", "0 bytes: is no image that Pillow knows"),
        (b"hello", "5 bytes: is no image that Pillow knows"),
        ("absent.jpg", "absent.jpg: no such file"),
        ("a\0b.jpg", "cannot be decoded"),
        (Path(__file__).parent, "is a folder; expected an image file"),
    ],
)
def test_what_is_no_image_is_a_data_error_that_says_what_was_got(model, sample, message):
    with pytest.raises(DataError, match=message) as caught:
        model.predict(sample)
    assert caught.value.exit_code == 3


def test_one_bad_sample_in_a_list_is_a_data_error(model):
    with pytest.raises(DataError, match=r"got builtins\.int"):
        model.predict([solid(RED), 7])


def test_a_text_named_jpg_is_a_data_error(model, photo):
    with pytest.raises(DataError, match=r"text\.jpg: is no image that Pillow knows"):
        model.predict(photo(b"no picture at all", "text.jpg"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("form", ["path", "bytes", "PIL image"])
def test_a_truncated_file_is_a_data_error(model, photo, kind, form):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), kind)[:-400]
    sample = {"path": photo, "bytes": bytes, "PIL image": lambda d: Image.open(io.BytesIO(d))}
    with pytest.raises(DataError, match=r"cannot be decoded: .*truncated"):
        model.predict(sample[form](data))


def test_an_image_of_too_many_pixels_is_a_data_error(model, monkeypatch):
    # Pillow's guard against decompression bombs raises at twice this count
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match=r"cannot be decoded: .*decompression bomb"):
        model.predict(encoded(solid(RED, (20, 20))))


def test_a_postscript_file_is_refused_before_a_program_is_started(model, monkeypatch):
    postscript = encoded(solid(RED), "EPS")
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started")
    )
    with pytest.raises(DataError, match="EPS, a program and no picture"):
        model.predict(postscript)


def test_floating_point_pixels_are_refused_rather_than_clipped(model):
    with pytest.raises(DataError, match="floating-point"):
        model.predict(Image.new("F", (2, 2), 0.5))


def test_an_image_given_as_object_stays_open_and_unchanged(model):
    image = Image.open(io.BytesIO(encoded(solid(RED))))
    assert model.predict(image).label == "red"
    assert model.predict(image).label == "red"
    assert image.size == (5, 4)


def test_an_array_given_is_not_changed(model):
    array = np.array(solid(RED))
    array.flags.writeable = False
    assert model.predict(array).label == "red"


def test_a_graph_that_answers_infinity_is_no_silent_label(model, monkeypatch):
    monkeypatch.setattr(model, "_run", lambda *_: {"logits": np.float32([[1, np.nan, 0]])})
    with pytest.raises(IntegrityError, match="infinite or no number"):
        model.predict(solid(RED))


def test_a_batch_holds_no_more_samples_than_the_manifest_allows(color_bundle, seal):
    seal(color_bundle, session=SessionSettings(max_batch=1))
    model = EdgeModel.load(color_bundle)
    batches = []
    run = model._run
    model._run = lambda *a: (batches.append(a[0]["image"].shape[0]), run(*a))[1]
    model.predict([solid(RED)] * 3)
    assert batches == [1, 1, 1]
