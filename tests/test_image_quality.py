"""What is found in images with known defects, and in images of every kind without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import bad_images
import numpy as np
import pytest
import torch
from bad_images import blurred, compressed, enlarged, noisy, scene
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.image_quality import dead_leaves
from freq_loss_plugin.image_quality.defects import Defect
from freq_loss_plugin.image_quality.measurement import measure_file, measure_image
from freq_loss_plugin.image_quality.measuring import measure_all
from freq_loss_plugin.image_quality.noise_schedules import signal_to_noise, stable_diffusion_alphas
from freq_loss_plugin.image_quality.pixels import as_pixels
from freq_loss_plugin.image_quality.restoration import fit
from freq_loss_plugin.image_quality.spectrum import fit_power_law
from freq_loss_plugin.image_quality.survey import fit_defects, floors_of, survey
from freq_loss_plugin.image_quality.trained_image import TrainedImage
from freq_loss_plugin.toy_model import model_folder
from freq_loss_plugin.toy_model.scenes import Scene, draw

SNR = signal_to_noise("epsilon", stable_diffusion_alphas())
SCENES = [scene(number, style) for number, style in enumerate(("base", "weave", "frames") * 3)]


@pytest.fixture(scope="module")
def encode():
    """The toy model's VAE."""
    vae = AutoencoderKL.from_pretrained(model_folder(), subfolder="vae")

    @torch.no_grad()
    def encode(image):
        return vae.encode(as_pixels(image)[None] * 2 - 1).latent_dist.mean[0] * vae.config.scaling_factor

    return encode


def photos():
    """Those that scikit-image has in its package, small enough to be quick."""
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    names = "astronaut brick camera cell chelsea coffee coins color grass gravel hubble_deep_field ihc moon page retina"
    for name in [*names.split(), "rocket", "text", "motorcycle_left", "chessboard_RGB", "logo", "phantom", "horse"]:
        with Image.open(next(folder.glob(f"{name}.*"))) as opened:
            image = opened.convert("RGB")
        image.thumbnail((512, 512), Image.Resampling.LANCZOS)
        yield name, image


def flat_drawing():
    """Antialiased flat shapes, as in cartoons."""
    generator = np.random.default_rng(0)
    image = Image.new("RGB", (2048, 2048), (200, 220, 255))
    for _ in range(14):
        x, y, radius = (int(value) for value in (*generator.integers(0, 2048, 2), generator.integers(60, 300)))
        color = tuple(map(int, generator.integers(0, 255, 3)))
        ImageDraw.Draw(image).ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    return image.resize((512, 512), Image.Resampling.LANCZOS)


def line_art():
    generator = np.random.default_rng(1)
    image = Image.new("RGB", (2048, 2048), "white")
    for _ in range(40):
        points = [tuple(map(int, generator.integers(0, 2048, 2))) for _ in range(2)]
        ImageDraw.Draw(image).line(points, fill="black", width=7)
    return image.resize((512, 512), Image.Resampling.LANCZOS)


def screenshot():
    image = Image.new("RGB", (512, 384), "white")
    for row in range(15):
        ImageDraw.Draw(image).text((20, 20 + 24 * row), f"{row}: the quick brown fox jumps over it", fill="black")
    return image


def pixel_art():
    cells = np.random.default_rng(2).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((512, 512), Image.Resampling.NEAREST)


DRAWINGS = {"flat": flat_drawing, "lines": line_art, "screenshot": screenshot, "pixels": pixel_art}


def test_no_good_image_has_a_defect():
    found = {name: measure_image(image).defect for name, image in photos()}
    found |= {name: measure_image(draw()).defect for name, draw in DRAWINGS.items()}
    found |= {str(number): measure_image(image).defect for number, image in enumerate(SCENES)}
    assert {name: str(defect) for name, defect in found.items() if defect} == {}


def test_an_image_that_is_soft_by_nature_is_unknown():
    (note,) = measure_image(dict(photos())["cell"]).notes
    assert note == "soft by nature, its spectrum follows no power law: unknown, taken as good"


@pytest.mark.parametrize("times", [4, 8])
def test_enlarged_images_have_the_resolution_that_they_had(times):
    found = [measure_image(enlarged(image, times)).resolution for image in [*SCENES, flat_drawing()]]
    assert found == pytest.approx([1 / times] * len(found), rel=0.35)


def test_a_photo_enlarged_eightfold_is_found():
    found = {name: measure_image(enlarged(image, 8)).resolution for name, image in photos()}
    unknown = {name for name, resolution in found.items() if resolution == 1}
    assert not unknown
    assert all(0.08 < resolution < 0.2 for name, resolution in found.items() if name != "color")  # soft before, too


@pytest.mark.parametrize("quality", [10, 30, 50])
def test_jpeg_that_was_saved_again_is_found(quality):
    found = [measure_image(compressed(image, quality)).jpeg for image in SCENES]
    assert found.count(quality) >= len(SCENES) - 2  # flat shapes have few coefficients
    assert set(found) <= {quality, None}


def test_jpeg_files_say_their_quality(tmp_path):
    for quality in (10, 50, 90):
        SCENES[0].save(tmp_path / "scene.jpg", quality=quality)
        assert measure_file(tmp_path / "scene.jpg").jpeg == quality


def test_good_jpegs_are_good(tmp_path):
    for number, image in enumerate(SCENES):
        image.save(tmp_path / f"{number}.jpg", quality=85)
        assert not measure_file(tmp_path / f"{number}.jpg").defect


@pytest.mark.parametrize("deviation", [10, 20])
def test_noise_is_measured(deviation):
    for image in SCENES:
        assert measure_image(noisy(image, deviation)).noise == pytest.approx(deviation, rel=0.25)


def test_texture_is_no_noise():
    assert max(measure_image(image).noise for _, image in photos()) < 3


def test_noise_of_the_luminance_is_measured_where_there_are_quiet_places():
    for name in ("brick", "coffee", "rocket"):
        grey = dict(photos())[name].convert("L").convert("RGB")
        noise = np.random.default_rng(0).normal(0, 15, grey.size[::-1])[..., None]
        image = Image.fromarray((np.asarray(grey) + noise).clip(0, 255).round().astype(np.uint8))
        assert measure_image(image).noise == pytest.approx(15, rel=0.25)
        assert measure_image(grey).noise < 3


# Scenes of 128 px, the toy model's VAE, 5%.
TABLE = {
    Defect(resolution=16 / 128): 366,
    Defect(resolution=32 / 128): 100,
    Defect(resolution=64 / 128): 6,
    Defect(jpeg=10): 317,
    Defect(jpeg=30): 193,
    Defect(noise=20.0): 232,
}


@pytest.mark.parametrize(("defect", "expected"), TABLE.items(), ids=map(str, TABLE))
def test_least_timesteps_of_known_defects(encode, defect, expected):
    images = [scene(number) for number in range(60, 72)]
    fitted = fit([encode(image) for image in images], [encode(defect.apply(image)) for image in images])
    assert fitted.least_timestep(SNR, 0.05) == pytest.approx(expected, abs=40)


@pytest.mark.parametrize("defect", [Defect(resolution=0.25), Defect(resolution=0.125), Defect(jpeg=10)], ids=str)
def test_references_that_are_all_alike_do_not_make_other_images_worse(encode, tmp_path, defect):
    """Red circles on white: a filter that has seen nothing else makes other scenes up to ten times worse."""
    circle = Scene("circle", "red", "in the centre", "white", "checks")
    alike = [draw(replace(circle, phase=number, radius=0.15 + 0.01 * number), "frames") for number in range(6)]
    images = [Image.fromarray((pixels * 255).round().astype(np.uint8)) for pixels in alike]
    folder = bad_images.write(tmp_path / "1_sharp", images)
    (fitted,) = fit_defects([defect], [TrainedImage(file) for file in folder.glob("*.png")], encode).values()
    varied = [scene(number, "frames") for number in range(20, 28)]
    pairs = [(encode(defect.apply(image)), encode(image)) for image in varied]
    before, after = (
        sum(float((one - sharp).square().sum()) for one, (_, sharp) in zip(which, pairs, strict=True))
        for which in ([bad for bad, _ in pairs], [fitted.apply(bad) for bad, _ in pairs])
    )
    assert after < 1.02 * before


def test_synthetic_references_are_sharp_and_alike_on_every_machine():
    image = dead_leaves.draw(256, 1)
    found = measure_image(image)
    assert found.is_good
    assert fit_power_law(as_pixels(image)).exponent == pytest.approx(2, abs=0.6)
    assert np.array_equal(image, dead_leaves.draw(256, 1))
    assert not np.array_equal(image, dead_leaves.draw(256, 2))


def test_a_worse_defect_never_has_a_lower_floor(encode, tmp_path):
    folder = bad_images.write(tmp_path / "1_sharp", map(scene, range(3)))
    references = [TrainedImage(file) for file in folder.glob("*.png")]
    # One that the filter takes back entirely, where a milder one is left as it is.
    defects = [Defect(resolution=0.5), Defect(resolution=0.25), Defect(resolution=0.25, jpeg=50), Defect(jpeg=50)]
    fitted = fit_defects(defects, references, encode)
    half, quarter, both, compressed_alone = (defects[number] for number in range(4))
    nothing_left = {**fitted, both: fit(*[[encode(scene(number)) for number in range(3)]] * 2)}
    assert nothing_left[both].least_timestep(SNR, 0.05) == 0
    floors = floors_of(nothing_left, SNR, 0.05)
    assert floors[half] < floors[quarter]
    assert floors[both] == max(floors[quarter], floors[compressed_alone]) > 0
    assert not Defect(jpeg=50).is_at_most(Defect(jpeg=50, jpeg_scale=2.0))
    assert Defect(jpeg=50, jpeg_scale=2.0).is_at_most(Defect(jpeg=40))


def test_the_noise_levels_of_flow_matching():
    snr = signal_to_noise("flow")
    assert snr[500] == pytest.approx(1)
    assert snr[200] == pytest.approx(16)


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda image: enlarged(image, 8), (490, 660)),
        (lambda image: enlarged(image, 4), (250, 380)),
        (lambda image: blurred(image, 2), (370, 570)),
        (lambda image: blurred(image, 4), (500, 680)),
        (lambda image: compressed(image, 10), (500, 630)),
    ],
    ids=["8 times", "4 times", "blur 2", "blur 4", "JPEG 10"],
)
def test_a_survey_finds_the_bad_images_and_their_least_timestep(encode, tmp_path, make, least):
    sharp = bad_images.write(tmp_path / "1_sharp", map(scene, range(60, 64)))
    bad = bad_images.write(tmp_path / "1_bad", (make(scene(number)) for number in (70, 71, 73)))
    images = [TrainedImage(file, (128, 128)) for file in [*sharp.glob("*.png"), *bad.glob("*.png")]]
    found = survey(images, FreqLossConfig(image_quality="auto"), encode, SNR, end=1000)
    assert {image.file for image in found.least} == set(bad.glob("*.png"))
    assert all(least[0] <= value <= least[1] for value in found.least.values())
    assert found.summary.startswith("7 images: 4 full quality; ")
    strict = survey(images, FreqLossConfig(image_quality="auto", image_quality_threshold=0.002), encode, SNR, end=1000)
    assert all(strict.least[image] > value for image, value in found.least.items())
    assert all(found.restorations[image].restored > 0 for image in found.restorations)


def test_enlarging_by_the_trainer_counts(encode, tmp_path):
    """A sharp image of 48 pixels has no more detail when it is trained at 256."""
    sharp = bad_images.write(tmp_path / "1_sharp", [flat_drawing().resize((256, 256), Image.Resampling.LANCZOS)])
    small = bad_images.write(tmp_path / "1_small", [scene(2).resize((48, 48), Image.Resampling.LANCZOS)])
    images = [TrainedImage(file, (256, 256)) for file in [*sharp.glob("*.png"), *small.glob("*.png")]]
    found = survey(images, FreqLossConfig(image_quality="auto"), encode, SNR, end=1000)
    assert {image.file for image in found.least} == set(small.glob("*.png"))
    assert any("too few to measure" in warning for warning in found.warnings)


def test_reducing_by_the_trainer_helps(tmp_path):
    large = flat_drawing().resize((4096, 4096), Image.Resampling.BICUBIC)
    large.save(tmp_path / "large.png", compress_level=1)
    assert measure_file(tmp_path / "large.png").resolution < 0.2
    assert not measure_file(tmp_path / "large.png", (512, 512)).defect


def test_few_sharp_images_are_warned_of(encode, tmp_path):
    sharp = bad_images.write(tmp_path / "1_sharp", [scene(1)])
    bad = bad_images.write(tmp_path / "1_bad", (enlarged(scene(number), 8) for number in range(2, 13)))
    images = [TrainedImage(file, (128, 128)) for file in [*sharp.glob("*.png"), *bad.glob("*.png")]]
    found = survey(images, FreqLossConfig(image_quality="auto"), encode, SNR, end=1000)
    assert any(warning.startswith("only 1 of 12 images are of full quality") for warning in found.warnings)


def test_what_is_not_known_is_not_called_full_quality(encode, tmp_path):
    images = [*bad_images.write(tmp_path / "1_sharp", [scene(1)]).glob("*.png"), tmp_path / "red.png"]
    Image.new("RGB", (128, 128), "red").save(images[-1])
    found = survey(
        [TrainedImage(file, (128, 128)) for file in images], FreqLossConfig(image_quality="auto"), encode, SNR, end=1000
    )
    assert found.summary == "2 images: 1 full quality; 1 not known, train at every t"


def one_color_beside_a_bad_one(folder):
    Image.new("RGB", (128, 128), "red").save(folder / "red.png")
    enlarged(scene(1), 8).save(folder / "x.png")


def damaged(folder):
    (folder / "x.png").write_bytes(b"no image")


BAD_INPUT = {
    "damaged": (damaged, "images that cannot be read: .*x.png"),
    "all bad but one that tells nothing": (one_color_beside_a_bad_one, "none of the 2 images is sharp"),
    "all bad": (lambda folder: enlarged(scene(1), 8).save(folder / "x.png"), "none of the 1 images is sharp"),
}


@pytest.mark.parametrize(("make", "message"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_what_cannot_be_used_is_an_error(encode, tmp_path, make, message):
    make(tmp_path)
    images = [TrainedImage(file, (128, 128)) for file in tmp_path.iterdir()]
    with pytest.raises(ConfigError, match=message):
        survey(images, FreqLossConfig(image_quality="auto"), encode, SNR, end=1000)


def test_an_image_that_could_never_train_is_an_error(tmp_path):
    rules = {tmp_path.name: {"least_timestep": 500}}
    with pytest.raises(ConfigError, match=r"1 images may only train above .* \(max_timestep = 500\): bad.png"):
        survey([TrainedImage(tmp_path / "bad.png")], FreqLossConfig(image_rules=rules), None, SNR, end=500)


def test_a_vae_that_returns_nan_is_told(tmp_path):
    scene(1).save(tmp_path / "sharp.png")
    enlarged(scene(2), 8).save(tmp_path / "bad.png")
    images = [TrainedImage(tmp_path / name, (128, 128)) for name in ("sharp.png", "bad.png")]
    with pytest.raises(ConfigError, match="the VAE returns NaN"):
        survey(
            images,
            FreqLossConfig(image_quality="auto"),
            lambda image: torch.full((4, image.height // 8, image.width // 8), float("nan")),
            SNR,
            end=1000,
        )


def test_an_image_that_hardly_trains_is_named(encode, tmp_path):
    """Where the end of the run's timesteps is below what was found, it trains at the last one, and weighs nothing."""
    scene(1).save(tmp_path / "sharp.png")
    enlarged(scene(2), 8).save(tmp_path / "bad.png")
    images = [TrainedImage(tmp_path / name, (128, 128)) for name in ("sharp.png", "bad.png")]
    found = survey(images, FreqLossConfig(image_quality="auto"), encode, SNR, end=200)
    assert found.least == {images[1]: 199}
    (hardly,) = found.warnings
    assert hardly.startswith("1 images hardly train")
    assert hardly.endswith("bad.png")


def with_alpha(image, alpha):
    image.putalpha(alpha)
    return image


ODD = {
    "transparent": (lambda: with_alpha(scene(1), 254), "transparent"),
    "opaque": (lambda: with_alpha(scene(1), 255), None),
    "grey": (lambda: scene(1).convert("L"), "grey: its noise is told by quiet places alone"),
    "one color": (lambda: Image.new("RGB", (128, 128), "red"), "one color: nothing to measure, taken as good"),
    "small": (lambda: scene(1).resize((40, 40)), "40×40 pixels are too few to measure, taken as good"),
    "palette": (lambda: scene(1).quantize(16), None),
}


@pytest.mark.parametrize(("make", "note"), ODD.values(), ids=ODD)
def test_odd_images_are_good_and_named(tmp_path, make, note):
    make().save(tmp_path / "odd.png")
    found = measure_file(tmp_path / "odd.png")
    assert not found.defect
    assert found.notes == () if note is None else any(text.startswith(note) for text in found.notes)


def test_rules_alone_measure_nothing(tmp_path):
    damaged(tmp_path)
    config = FreqLossConfig(image_rules={tmp_path.name: {"least_timestep": 300}})
    image = TrainedImage(tmp_path / "x.png", (128, 128))
    assert survey([image], config, None, SNR, end=1000).least == {image: 300}


def test_a_power_law_is_recovered():
    """Noise whose amplitude falls as 1/f: the exponent of its power is 2."""
    frequency = torch.hypot(torch.fft.fftfreq(256)[:, None], torch.fft.fftfreq(256)[None]).clamp(min=1 / 256)
    fits = []
    for seed in range(6):
        noise = torch.randn(256, 256, generator=torch.Generator().manual_seed(seed))
        pixels = torch.fft.ifft2(torch.fft.fft2(noise) / frequency).real
        fits.append(fit_power_law((0.5 + 0.1 * pixels / pixels.std()).expand(3, -1, -1)))
    assert np.mean([fit.exponent for fit in fits]) == pytest.approx(2, abs=0.25)
    assert all(fit.is_a_law for fit in fits)
    high = fits[0].spectrum.frequency > 0.2
    errors = torch.stack([torch.log10(fit.spectrum.power / fit.expected)[high].mean() for fit in fits])
    assert errors.mean().abs() < 0.5


def test_measuring_in_threads_gives_the_same(tmp_path):
    folder = bad_images.write(tmp_path / "1_x", SCENES[:4])
    images = [TrainedImage(file) for file in sorted(folder.glob("*.png"))]
    threads = torch.get_num_threads()
    assert measure_all(images) == {image: measure_file(image.file) for image in images}
    assert torch.get_num_threads() == threads
