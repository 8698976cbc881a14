"""A full disk or a folder that cannot be written is found before anything starts."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.store.preflight import require_space, require_writable


def problem(check, *arguments) -> str:
    with pytest.raises(InputError) as caught:
        check(*arguments)
    (line,) = caught.value.problems
    return line


def test_a_writable_place_is_left_as_it_was(tmp_path):
    require_writable(tmp_path)
    require_writable(tmp_path / "not" / "yet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("below", ["", "outputs/sft"])
def test_a_file_in_the_way(tmp_path, below):
    file = tmp_path / "file"
    file.touch()
    line = problem(require_writable, file / below)
    assert (
        line == f"cannot write to {file / below}: {file} is a file, not a folder; set output_dir to another"
    )


def test_a_broken_link_in_the_way(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    assert f"{tmp_path / 'link'} is a broken link, not a folder" in problem(
        require_writable, tmp_path / "link"
    )


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_the_system_says_is_in_the_line(tmp_path, monkeypatch, code):
    def refuse(self, **_):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "touch", refuse)
    line = problem(require_writable, tmp_path / "new")
    expected = (
        f"cannot write to {tmp_path / 'new'}: {tmp_path}: {os.strerror(code)}; set output_dir to another"
    )
    assert line == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in problem(require_writable, tmp_path)


@pytest.mark.parametrize(("needed", "enough"), [(2_000_000_000, True), (2_000_000_001, False)])
def test_space(tmp_path, monkeypatch, needed, enough):
    asked = []
    usage = shutil._ntuple_diskusage(9e9, 7e9, 2_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: (asked.append(path), usage)[1])
    if enough:
        require_space(tmp_path / "a" / "b", needed)
    else:
        line = problem(require_space, tmp_path / "a" / "b", 12_345_000_000)
        start = f"not enough disk space for {tmp_path / 'a' / 'b'}: 12.35 GB needed, 2.00 GB free; "
        assert line.startswith(start) and "rlhf_exp.store gc" in line
        problem(require_space, tmp_path, needed)
    assert asked[0] == tmp_path  # the disk of the nearest folder that exists
