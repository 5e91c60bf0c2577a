"""Measurements are kept from run to run, and made in little memory and by one process of several."""

from __future__ import annotations

import json
import logging
import os
import threading

import forks
import pytest
import torch
import torch.distributed as dist
from bad_images import enlarged, noisy, scene, write
from PIL import Image

from freq_loss_plugin import ConfigError, FreqLossConfig
from freq_loss_plugin.image_quality import measurement_cache
from freq_loss_plugin.image_quality.measurement import _Room, measure_file, measure_image
from freq_loss_plugin.image_quality.measuring import _thread_count, measure_all
from freq_loss_plugin.image_quality.noise_schedules import signal_to_noise
from freq_loss_plugin.image_quality.survey import survey
from freq_loss_plugin.image_quality.trained_image import TrainedImage
from kohya_patch.image_quality import in_one_process, measure_together

SHARP, BAD = scene(1), enlarged(scene(1), 8)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own."""
    monkeypatch.setenv(measurement_cache.FOLDER, str(tmp_path / "cache"))
    return tmp_path / "cache" / "image_quality.json"


@pytest.fixture
def image(tmp_path):
    """A sharp image, uncompressed, so that another one has as many bytes."""
    SHARP.save(tmp_path / "image.bmp")
    return TrainedImage(tmp_path / "image.bmp", (128, 128))


def replace(image, by):
    """Put another image into its file that looks unchanged from outside."""
    before = image.file.stat()
    by.save(image.file)
    os.utime(image.file, ns=(before.st_atime_ns, before.st_mtime_ns))


def measure(image):
    return measure_all([image])[image]


def test_an_image_is_measured_once(image):
    first = measure(image)
    replace(image, BAD)
    assert measure(image) == first == measure_image(SHARP, image.size)


def touch(image, monkeypatch):
    os.utime(image.file)


def grow(image, monkeypatch):
    before = image.file.stat()
    image.file.write_bytes(image.file.read_bytes() + b"\0")
    os.utime(image.file, ns=(before.st_atime_ns, before.st_mtime_ns))


def code(image, monkeypatch):
    monkeypatch.setattr(measurement_cache, "_code", lambda: "another version")


@pytest.mark.parametrize("change", [touch, grow, code])
def test_it_is_measured_again_where_something_has_changed(image, monkeypatch, change):
    measure(image)
    replace(image, BAD)
    change(image, monkeypatch)
    assert measure(image).resolution < 0.2


def test_another_size_and_a_copy_are_measured_by_themselves(image, tmp_path):
    measure(image)
    replace(image, BAD)
    copy = TrainedImage(tmp_path / "copy.bmp", image.size)
    BAD.save(copy.file)
    assert measure(TrainedImage(image.file, (64, 64))).trained == (64, 64)
    assert measure(copy).resolution < 0.2
    assert measure(image).resolution == 1


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"KEY": 3}', b'{"KEY": {"size": [1, 2]}}'])
def test_a_damaged_cache_is_said_once_and_made_anew(image, cache, caplog, content):
    (key,) = measurement_cache.keys_of([image]).values()
    cache.parent.mkdir()
    cache.write_bytes(content.replace(b"KEY", key.encode()))
    with caplog.at_level(logging.WARNING):
        assert measure(image) == measure_file(image.file, image.size)
    assert [record.getMessage().split(", so")[0] for record in caplog.records] == [f"freq_loss: {cache} is damaged"]
    replace(image, BAD)
    assert measure(image).resolution == 1


def test_where_nothing_can_be_kept_images_are_measured_each_time(image, cache, caplog):
    cache.parent.write_text("a file where the folder should be")
    for by in (SHARP, BAD):
        caplog.clear()
        replace(image, by)
        with caplog.at_level(logging.WARNING):
            assert measure(image) == measure_file(image.file, image.size)
        (record,) = caplog.records
        assert "measurements of images cannot be kept" in record.getMessage()


def test_what_cannot_be_read_is_tried_again(image):
    whole = image.file.read_bytes()
    image.file.write_bytes(whole[:1000])
    before = image.file.stat()
    assert "damaged" in measure(image)
    image.file.write_bytes(whole)
    os.utime(image.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert measure(image).resolution == 1


def test_the_oldest_measurements_make_room(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(measurement_cache, "_MOST", 3)
    folder = write(tmp_path / "1_x", [scene(number) for number in range(4)])
    images = [TrainedImage(file) for file in sorted(folder.glob("*.png"))]
    for image in images:
        measure(image)
    keys = measurement_cache.keys_of(images)
    assert measurement_cache.read(keys).keys() == {*images[1:]}
    assert len(json.loads(cache.read_text(encoding="utf-8"))) == 3


def test_the_cache_is_in_the_folder_of_the_platform(tmp_path, monkeypatch):
    monkeypatch.delenv(measurement_cache.FOLDER)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert measurement_cache.cache_file() == tmp_path / "xdg" / "freq_loss_plugin" / "image_quality.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not beside the images
    assert tmp_path in measurement_cache.cache_file().parents


def test_a_large_jpeg_is_measured_in_a_smaller_copy(tmp_path):
    """With the same result, and with less than the memory of all its pixels."""
    files = {}
    for name, image in {"sharp": SHARP, "noisy": noisy(SHARP, 30), "bad": BAD}.items():
        files[name] = tmp_path / f"{name}.jpg"
        image.resize((2048, 1024), Image.Resampling.NEAREST).save(files[name], quality=95, subsampling=0)
    for file in files.values():
        found, whole = measure_file(file, (256, 128)), measure_image(Image.open(file).convert("RGB"), (256, 128), 95)
        assert found.size == whole.size == (2048, 1024)
        assert found.defect == whole.defect
        assert found.blur == pytest.approx(whole.blur, rel=0.1, abs=0.1)
        assert found.noise == pytest.approx(whole.noise, rel=0.15, abs=0.5)


@pytest.mark.parametrize("amount", [5, 30])
def test_a_thread_waits_until_there_is_room(amount):
    room, entered = _Room(10), threading.Event()

    def work():
        with room.hold(amount):
            entered.set()

    thread = threading.Thread(target=work, daemon=True)
    with room.hold(4), room.hold(4):
        thread.start()
        assert not entered.wait(0.3)
    assert entered.wait(30)
    thread.join(30)
    with room.hold(10):  # all of it is free again
        pass


def test_processes_of_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert _thread_count() == 1


# -- several processes ---------------------------------------------------------------------------------------------


class Counted(TrainedImage):
    """An image that counts how often it is measured, by any process."""

    def measure(self):
        with (self.file.parent / f"measured {self.file.stem}").open("a") as log:
            log.write("x")
        return super().measure()


class Failing(TrainedImage):
    def measure(self):
        return 1 // (self.file.stem != "bad")


def images_of(folder, kind=Counted):
    return [kind(file, (128, 128)) for file in sorted(folder.glob("*.png"))]


def measured(rank, folder):
    found = measure_together(images_of(folder)[:: 1 if rank else -1])
    return [(image.file.name, one) for image, one in sorted(found.items(), key=repr)]


def surveyed(rank, folder):
    def encode(image):
        raise ConfigError(f"the VAE of process {rank} returns NaN")

    config, snr = FreqLossConfig(image_quality="auto"), signal_to_noise("flow")
    survey(images_of(folder), config, encode, snr, end=1000, measure=measure_together, once=in_one_process)


def failing(rank, folder):
    measure_together(images_of(folder, Failing))


def work(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    said = []
    for cache, job in (("a", measured), ("a", measured), ("b", surveyed), ("c", failing)):
        os.environ[measurement_cache.FOLDER] = str(folder / cache)
        try:
            said.append(job(rank, folder))
        except (ConfigError, ZeroDivisionError) as error:
            said.append(f"{type(error).__name__}: {error}")
        if job is measured:
            said.append([file.read_text() for file in sorted(folder.glob("measured *"))])
        dist.barrier()
    torch.save(said, folder / f"said {rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What each of two processes has to say of each job; they end in time."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(4):
        scene(number).save(folder / f"{number}.png")
    BAD.save(folder / "bad.png")
    context = forks.spawn(work, (folder,), 2, join=False)
    try:
        assert context.join(timeout=120) or context.join(timeout=10), "a process waits for another"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"said {rank}", weights_only=False) for rank in range(2)]


def test_two_processes_measure_each_image_once_and_not_at_the_next_start(said):
    (first, counts, second, counts_again, *_), other = said
    assert len(first) == 5
    assert first == second == other[0] == other[2]
    assert counts == counts_again == ["x"] * 5


def test_an_error_of_the_process_that_encodes_ends_all(said):
    assert [each[4] for each in said] == ["ConfigError: the VAE of process 0 returns NaN"] * 2


def test_an_error_in_measuring_ends_all(said):
    assert sorted(each[5] for each in said) == [
        "ConfigError: another process stopped: ZeroDivisionError: integer division or modulo by zero",
        "ZeroDivisionError: integer division or modulo by zero",
    ]
