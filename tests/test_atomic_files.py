"""Files that are written whole: names, modes, links, failures, and two programs at once."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from freq_loss_plugin.atomic_files import write_whole


def write(text):
    return lambda part: part.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("name", ["x.txt", "x" * 251 + ".txt", "\u732b" * 83 + ".txt"])
def test_any_name_that_a_file_may_have(tmp_path, name):
    write_whole(tmp_path / "new" / name, write("content"))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_the_mode_is_that_of_a_new_file_or_of_the_one_that_is_replaced(tmp_path):
    def private(part):
        part.unlink()
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600))

    plain = tmp_path / "plain"
    plain.touch()
    write_whole(tmp_path / "new", private)
    assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode
    plain.chmod(0o640)
    write_whole(plain, private)
    assert stat.S_IMODE(plain.stat().st_mode) == 0o640


def test_what_a_link_leads_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "file")
    write_whole(tmp_path / "link", write("content"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "content"


def test_a_failure_names_the_file_and_leaves_the_old_one(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail(part):
        part.write_text("half")
        raise RuntimeError("the disk is full")

    for target, writer, cause in (
        (file, fail, "the disk is full"),
        (file, lambda part: part.unlink(), "No such file"),
        (file / "below", write("x"), "exists"),
        (tmp_path / ("x" * 256), write("x"), "too long"),
    ):
        with pytest.raises(OSError, match=f"{target.name} cannot be written: .*{cause}"):
            write_whole(target, writer)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"


def test_two_programs_at_once_leave_the_whole_of_one(tmp_path):
    texts = [letter * 100_000 for letter in "abcd"]
    threads = [threading.Thread(target=write_whole, args=(tmp_path / "file", write(text))) for text in texts * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_text() in texts
    assert len(list(tmp_path.iterdir())) == 1
