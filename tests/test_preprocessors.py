"""ControlNet preprocessors on images of every mode and of unusual shapes, and the preprocessor list for clients."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffusion_workers.control.preprocessors import (
    PREPROCESSORS,
    MapScaling,
    binary_map,
    canny_map,
    check_value,
    color_palette_map,
    fit_map,
    infer_union_mode,
    invert_map,
    lineart_standard_map,
    low_quality_map,
    make_map,
    preprocessor_list,
    resize_map,
    scribble_xdog_map,
    union_mode_number,
    working_size,
)
from diffusion_workers.families.registry import FAMILIES, UNION_MODE_NUMBERS
from diffusion_workers.request.images import pixel_sha256
from ez_diffusion_client.models import ParameterKind, Preprocessing, ResizeMode, UnionModeName

WEIGHTLESS = [row.name for row in PREPROCESSORS.values() if row.make_map]


@pytest.fixture(scope="module")
def drawing() -> Image.Image:
    "A test image with shading, edges and a little noise."
    x, y = np.meshgrid(np.linspace(0, 200, 144), np.linspace(0, 255, 96))
    noise = np.random.default_rng(0).normal(0, 4, (96, 144, 3))
    pixels = np.stack([x, y, 255 - x], axis=2) + noise
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    draw.ellipse((20, 20, 70, 70), fill=(240, 140, 30), outline=(40, 20, 10))
    draw.line((80, 90, 140, 10), fill=(20, 20, 20), width=2)
    return image


@pytest.fixture(scope="module")
def samples(drawing: Image.Image) -> dict[str, Image.Image]:
    "One image of each mode, and images of unusual shapes."
    clear = drawing.resize((30, 50)).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((30, 50)))
    square = drawing.resize((40, 40))
    return {
        "RGB": drawing,
        "portrait": drawing.rotate(90, expand=True),
        "RGBA": clear,
        "LA": clear.convert("LA"),
        **{mode: square.convert(mode) for mode in ("L", "1", "P", "CMYK")},
        "16 bits": Image.fromarray((np.arange(1600).reshape(40, 40) * 40).astype(np.uint16)),
        "one pixel": Image.new("RGB", (1, 1), "teal"),
        "strip": Image.new("RGB", (2000, 20), "teal"),
        "post": Image.new("RGB", (3, 900), "teal"),
    }


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_maps_have_the_requested_size(name: str, samples: dict[str, Image.Image]):
    for image in samples.values():
        for size, mode, resolution in (
            ((64, 64), ResizeMode.just_resize, None),
            ((136, 72), ResizeMode.crop_and_resize, 64),
            ((71, 203), ResizeMode.resize_and_fill, 100),
        ):
            request = Preprocessing(name=name, resolution=resolution)
            made = make_map(request, image, *size, mode, mask=Image.new("L", image.size, 255))
            assert (made.mode, made.size) == ("RGB", size)


@pytest.mark.parametrize("name", WEIGHTLESS)
def test_maps_are_deterministic(name: str, drawing: Image.Image):
    mask, request = Image.new("L", drawing.size, 255), Preprocessing(name=name, resolution=100)
    again = {pixel_sha256(make_map(request, drawing, 128, 96, mask=mask)) for _ in range(2)}
    assert len(again) == 1


def test_ready_made_maps_are_fitted_to_the_generation_size(samples: dict[str, Image.Image]):
    for image in samples.values():
        for mode in ResizeMode:
            fitted = fit_map(image, 88, 120, mode)
            assert (fitted.mode, fitted.size) == ("RGB", (88, 120))


def test_uniform_images_produce_no_lines():
    flat = np.full((64, 64, 3), 90, np.uint8)
    assert lineart_standard_map(flat, 6.0, 8).max() == 0
    assert scribble_xdog_map(flat, 32).max() == 0
    assert canny_map(flat, 1, 2).max() == 0


def test_thresholds_affect_maps_and_inversion_is_reversible(drawing: Image.Image):
    pixels = np.asarray(drawing)
    assert scribble_xdog_map(pixels, 8).mean() > scribble_xdog_map(pixels, 48).mean()
    assert binary_map(pixels, 200).mean() > binary_map(pixels, 60).mean()
    assert (invert_map(invert_map(pixels)) == pixels).all()


def test_noise_leaves_the_global_random_state_alone(drawing: Image.Image):
    state = np.random.get_state()[1].copy()
    low_quality_map(np.asarray(drawing), 3.0, 9.0, 30, 5)
    assert (np.random.get_state()[1] == state).all()


def test_labels_keep_their_colors(drawing: Image.Image):
    labels = Image.fromarray(color_palette_map(np.asarray(drawing), 24))
    colors = {color for _, color in labels.getcolors(100_000)}
    assert {color for _, color in resize_map(labels, 100, 77, MapScaling.labels).getcolors(4096)} <= colors


def test_resized_lines_have_no_gaps():
    line = Image.new("RGB", (301, 203))
    ImageDraw.Draw(line).line([(5, 190), (290, 11)], fill="white")
    for size in ((100, 67), (900, 31)):
        kept = np.asarray(resize_map(line, *size, MapScaling.lines))[..., 0] > 0
        assert kept.any(axis=0)[int(0.05 * size[0]) : int(0.9 * size[0])].all(), size


def test_working_sizes():
    assert working_size(768, 512) == (768, 512)
    assert working_size(512, 768, 1024) == (1024, 1536)
    assert working_size(8192, 8, 64) == (8192, 8)


def test_preprocessor_table_is_consistent():
    assert len(PREPROCESSORS) == 29
    for name, row in PREPROCESSORS.items():
        assert row.name == name
        assert len({p.name for p in row.parameters}) == len(row.parameters)
        for parameter in row.parameters:
            assert check_value(parameter, parameter.default, name) is None  # a default lies within its own bounds
            assert parameter.meaning, (name, parameter)
            assert isinstance(parameter.default, bool) or parameter.low < parameter.high, (name, parameter)


def test_preprocessor_list_matches_the_table():
    listed = {info.name: info for info in preprocessor_list()}
    assert list(listed) == list(PREPROCESSORS)
    for name, row in PREPROCESSORS.items():
        for told, parameter in zip(listed[name].parameters or [], row.parameters, strict=True):
            assert (told.name, told.default) == (parameter.name, parameter.default)
            assert (told.minimum, told.maximum) == (parameter.low, parameter.high)
    assert [listed[name].weights is None for name in ("canny", "midas")] == [True, False]
    assert [listed[name].needs_mask for name in ("canny", "inpaint_mask")] == [False, True]
    assert {told.kind for info in listed.values() for told in info.parameters or []} == set(ParameterKind)


def test_union_mode_numbers():
    tables = [table for family in FAMILIES.values() for table in family.controls.union_tables]
    assert list(UNION_MODE_NUMBERS) == tables  # the tables that a manifest may name
    promax = [union_mode_number("sdxl_union_promax", mode) for mode in (UnionModeName.tile, UnionModeName.repaint, 0)]
    assert promax == [6, 7, 0]
    for table, mode in (
        ("sdxl_union", "tile"),
        ("sdxl_union", 6),
        ("flux_union_pro", "normal"),
        ("flux_union_pro", 7),
        ("flux_union_pro", -1),
        ("flux_union_pro", True),
        ("flux_union_pro_2", 0),
    ):
        with pytest.raises(ValueError, match=table):
            union_mode_number(table, mode)
    fed = {"hed": "soft_edge", "mlsd": "line", "sam": "segmentation", "tile": None}
    assert {name: infer_union_mode(name, "sdxl_union") for name in fed} == fed
