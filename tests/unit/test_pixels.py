"""Pixels from the file to the network: the decoder, the way beside PIL's, and what the device makes of them."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from datasets.collate import pad_images
from datasets.decode import decode_rgb
from datasets.transforms import eval_transforms, resize, train_transforms
from tests.tiny import tiny_args, tiny_images
from tests.unit.test_transforms import sample_of
from util.bench_loader import (
    LEVELS,
    OUR_WAY,
    PIL_WAY,
    difference,
    generated_files,
    load_batch,
    normalize_pil,
    read_files,
)
from util.pixels import IMAGENET_MEAN, IMAGENET_STD, denormalize, normalize
from util.structures import ImageBatch

RECIPE = {
    "scales": range(480, 801, 32),
    "crop_scales": [400, 500, 600],
    "crop_range": (384, 600),
    "max_size": 1333,
    "test_size": 800,
}
MOST = LEVELS + 0.001  # differences of normalised pixels are rounded


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def by_pil(content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content)).convert("RGB"))).permute(2, 0, 1)


# ---- decoding ----


@pytest.mark.parametrize(
    ("mode", "file_format", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "quality": 60}),
        ("RGB", "JPEG", {"subsampling": "4:4:4"}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        *((mode, "PNG", {}) for mode in ("RGB", "L", "RGBA", "LA", "P", "1")),
        ("P", "PNG", {"transparency": 3}),
        ("RGB", "BMP", {}),
        ("RGB", "TIFF", {}),
        ("P", "GIF", {}),
        ("RGB", "WEBP", {}),
    ],
)
def test_every_kind_of_file_has_the_pixels_that_pil_reads(mode, file_format, options):
    content = encoded(F.to_pil_image(noise(37, 53)).convert(mode), file_format, **options)
    pixels = decode_rgb(content)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 37, 53)
    assert (pixels.int() - by_pil(content).int()).abs().max() <= 1


def test_of_sixteen_bits_of_a_grey_png_the_upper_eight_count():
    depth = Image.fromarray(np.arange(6, dtype=np.uint16).reshape(2, 3) * 12000)  # PIL would make five of six white
    assert decode_rgb(encoded(depth, "PNG"))[0].tolist() == [[0, 46, 93], [140, 187, 234]]


def test_a_jpeg_does_not_go_through_pil(monkeypatch):
    content = encoded(F.to_pil_image(noise(8, 8)), "JPEG")
    expected = decode_rgb(content)
    monkeypatch.setattr(Image.Image, "convert", None)
    assert torch.equal(decode_rgb(content), expected)


def test_a_jpeg_that_torchvision_refuses_goes_through_pil(monkeypatch):
    content = encoded(F.to_pil_image(noise(8, 8)), "JPEG")

    def refuse(*_, **__):
        raise RuntimeError("not supported")

    monkeypatch.setattr("datasets.decode.decode_jpeg", refuse)
    assert torch.equal(decode_rgb(content), by_pil(content))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_damaged_files_raise_or_have_the_pixels_that_pil_reads(file_format):
    content = encoded(F.to_pil_image(noise(24, 32)), file_format)
    rng, raised = np.random.default_rng(0), 0
    for _ in range(60):
        damaged = bytearray(content[: int(rng.integers(len(content) // 2, len(content) + 1))])
        damaged[int(rng.integers(20, len(damaged)))] ^= 255
        try:
            expected = by_pil(bytes(damaged))
        except Exception:
            raised += 1
            with pytest.raises(Exception):  # noqa: B017 (PIL raises anything)
                decode_rgb(bytes(damaged))
        else:
            assert (decode_rgb(bytes(damaged)).int() - expected.int()).abs().max() <= 1
    assert raised > 10


# ---- the augmentation beside PIL's ----


def apart(files: list[bytes], transforms, seed: int) -> dict:
    return difference(*(load_batch(way, files, transforms, seed)[0] for way in (PIL_WAY, OUR_WAY)))


@pytest.mark.parametrize("seed", range(4))
def test_the_training_augmentation_gives_pils_boxes_and_its_pixels_nearly(seed):
    found = apart(generated_files(3), train_transforms(augment="detr", **RECIPE), seed)
    assert found["same_boxes"] and found["grey_levels"] <= MOST


def test_the_evaluation_transform_gives_pils_pixels_within_one_level():
    found = apart(generated_files(2), eval_transforms(test_size=800, max_size=1333), 0)
    assert found["same_boxes"] and found["grey_levels"] <= MOST


def test_real_images_are_augmented_like_pils(shared_data):
    files = read_files(str(shared_data / "coco128" / "images"), 12)
    found = apart(files, train_transforms(augment="detr", **RECIPE), 0)
    assert found["same_boxes"] and found["grey_levels"] <= MOST


@pytest.mark.parametrize("hw", [(7, 90), (60, 100), (33, 47), (300, 5), (1, 1)])
def test_noise_is_resized_like_pils_within_one_level(hw):
    image = noise(60, 80)
    ours, _ = resize(image, sample_of([], 60, 80), hw)
    expected = F.to_pil_image(image).resize(hw[::-1], Image.Resampling.BILINEAR)
    assert (ours.int() - F.pil_to_tensor(expected).int()).abs().max() <= 1


@pytest.mark.parametrize("antialias", [True, False])
def test_resizing_does_not_depend_on_how_an_image_lies_in_memory(antialias):
    image, sample = noise(60, 80), sample_of([], 60, 80)
    layouts = [image, image.permute(1, 2, 0).contiguous().permute(2, 0, 1), noise(60, 81)[..., 1:].copy_(image)]
    found = [resize(layout, sample, (45, 70), antialias=antialias)[0] for layout in layouts]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_without_antialiasing_pixels_are_those_of_torchvision_on_a_converted_pil_image():
    image = F.to_pil_image(noise(60, 80))
    ours, _ = resize(F.pil_to_tensor(image), sample_of([], 60, 80), (23, 31), antialias=False)
    expected = F.resize(F.to_image(image), [23, 31], interpolation=InterpolationMode.BILINEAR, antialias=False)
    assert torch.equal(ours, expected.as_subclass(torch.Tensor))


# ---- normalisation ----


def test_normalize_uses_the_statistics_of_imagenet():
    pixels = normalize(torch.tensor([255, 0, 51], dtype=torch.uint8)[:, None, None])
    expected = [(v - m) / s for v, m, s in zip((1.0, 0.0, 0.2), IMAGENET_MEAN, IMAGENET_STD)]
    assert pixels.shape == (3, 1, 1) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels.flatten(), torch.tensor(expected))


def test_normalize_gives_what_torchvision_gives_and_leaves_its_input_alone():
    image = noise(20, 30)
    torch.testing.assert_close(normalize(image), normalize_pil(F.to_pil_image(image)), rtol=0, atol=1e-6)
    assert torch.equal(image, noise(20, 30))


def test_denormalize_gives_the_colours_back():
    torch.testing.assert_close(denormalize(normalize(noise(6, 8))), noise(6, 8) / 255, rtol=0, atol=1e-6)


def test_a_normalised_batch_is_that_of_normalised_images_and_exactly_zero_at_padding():
    images = [noise(20, 30), noise(25, 10, seed=1)]
    batch = pad_images(images).normalized()
    expected = pad_images([normalize(image) for image in images])
    assert batch.pixels.dtype == torch.float32 and batch.pixels.is_contiguous() and batch.sizes == expected.sizes
    assert torch.equal(batch.pixels, expected.pixels)
    padded = batch.pixels.permute(0, 2, 3, 1)[batch.padding]
    assert len(padded) and not padded.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_float_batch_counts_as_normalised(dtype):
    batch = ImageBatch(torch.randn(1, 3, 4, 4).to(dtype), torch.zeros(1, 4, 4, dtype=torch.bool), [(4, 4)])
    assert batch.normalized() is batch


def test_collated_images_stay_bytes_and_padding_is_black():
    batch = pad_images([noise(20, 30), noise(25, 10, seed=1)])
    assert batch.pixels.dtype == torch.uint8
    assert torch.equal(batch.pixels[1, :, :, :10], noise(25, 10, seed=1)) and not batch.pixels[1, :, :, 10:].any()


def test_the_detector_says_the_same_about_bytes_and_about_normalised_pixels():
    from models import build_detector

    model = build_detector(tiny_args()).eval()
    floats = tiny_images()
    pixels = (denormalize(floats.pixels) * 255).round().to(torch.uint8)
    batch = ImageBatch(pixels, floats.padding, floats.sizes)
    with torch.no_grad():
        assert torch.equal(model(batch).pred_logits, model(batch.normalized()).pred_logits)
