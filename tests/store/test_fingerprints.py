"""Content hashes: the content counts, and a remembered one is never stale."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from rlhf_exp.errors import InputError
from rlhf_exp.paths import cache_dir
from rlhf_exp.store import hashing
from rlhf_exp.store.keys import fingerprint_file, fingerprint_folder

LARGE = hashing.REMEMBER_FROM


@pytest.fixture
def later(monkeypatch):
    """Let ten seconds pass."""
    now = time.time
    monkeypatch.setattr(hashing.time, "time", lambda: now() + 10)


@pytest.fixture
def digests(monkeypatch):
    """Paths that are really read."""
    read, digest = [], hashing._digest
    monkeypatch.setattr(hashing, "_digest", lambda path: (read.append(path.name), digest(path))[1])
    return read


def forget():
    hashing._process_memo.clear()


def test_file_is_the_sha256_of_its_content(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    # the test vector of FIPS 180-2
    assert (
        fingerprint_file(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    large = b"x" * (LARGE * 2 + 7)
    (tmp_path / "b").write_bytes(large)
    assert fingerprint_file(tmp_path / "b") == hashlib.sha256(large).hexdigest()


def test_large_files_are_remembered_across_processes(tmp_path, digests, later):
    path = tmp_path / "big"
    path.write_bytes(b"x" * LARGE)
    first = fingerprint_file(path)
    forget()  # as a new process would be
    assert fingerprint_file(path) == first
    assert digests == ["big"]
    assert len(list((cache_dir() / "fingerprints").iterdir())) == 1


@pytest.mark.parametrize("change", ["content", "content with the old mtime", "another file moved here"])
def test_a_change_of_the_same_size_is_seen(tmp_path, later, change):
    path = tmp_path / "big"
    path.write_bytes(b"x" * LARGE)
    stat = path.stat()
    first = fingerprint_file(path)
    time.sleep(0.02)  # a tick of the file system's clock
    if change == "another file moved here":
        (tmp_path / "new").write_bytes(b"y" * LARGE)
        os.replace(tmp_path / "new", path)
    else:
        path.write_bytes(b"y" * LARGE)
    if change != "content":
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert fingerprint_file(path) == hashlib.sha256(b"y" * LARGE).hexdigest() != first


def test_a_file_written_just_now_is_not_remembered(tmp_path, digests, monkeypatch):
    monkeypatch.setattr(hashing, "SETTLED", 3600)
    path = tmp_path / "big"
    path.write_bytes(b"x" * LARGE)
    fingerprint_file(path)
    fingerprint_file(path)
    assert digests == ["big", "big"]


def test_a_broken_or_unwritable_cache_costs_only_time(tmp_path, monkeypatch, later):
    path = tmp_path / "big"
    path.write_bytes(b"x" * LARGE)
    expected = hashlib.sha256(b"x" * LARGE).hexdigest()
    fingerprint_file(path)
    (memo,) = (cache_dir() / "fingerprints").iterdir()
    for broken in (b"{", b"[]", b'{"path": 1}', b"\xff"):
        memo.write_bytes(broken)
        forget()
        assert fingerprint_file(path) == expected
    (tmp_path / "file").touch()
    monkeypatch.setenv("RLHF_EXP_CACHE", str(tmp_path / "file"))
    forget()
    assert fingerprint_file(path) == expected


def test_missing_file_is_bad_input(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*nothing\.jsonl: No such file"):
        fingerprint_file(tmp_path / "nothing.jsonl")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "data"
    (root / "sub").mkdir(parents=True)
    (root / "a.jsonl").write_text("1")
    (root / "sub" / "b.jsonl").write_text("2")
    (root / "readme.md").write_text("3")
    return root


def test_folder_changes_with_content_names_and_files(folder):
    seen = {fingerprint_folder(folder)}
    (folder / "a.jsonl").write_text("9")
    seen.add(fingerprint_folder(folder))
    (folder / "a.jsonl").rename(folder / "c.jsonl")
    seen.add(fingerprint_folder(folder))
    (folder / "sub" / "b.jsonl").unlink()
    seen.add(fingerprint_folder(folder))
    (folder / "sub" / "new").write_text("")
    seen.add(fingerprint_folder(folder))
    assert len(seen) == 5


def test_contents_that_move_between_files_are_seen(tmp_path):
    for name, one, two in (("x", "ab", "c"), ("y", "a", "bc")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1").write_text(one)
        (tmp_path / name / "2").write_text(two)
    assert fingerprint_folder(tmp_path / "x") != fingerprint_folder(tmp_path / "y")


def test_folder_elsewhere_with_other_times_is_the_same(folder, tmp_path):
    before = fingerprint_folder(folder)
    folder.rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "a.jsonl", (1, 1))
    assert fingerprint_folder(tmp_path / "moved") == before


def test_a_pattern_is_of_one_folder(folder):
    """Of a.jsonl, sub/b.jsonl and readme.md."""
    top, below = fingerprint_folder(folder, ("*.jsonl",)), fingerprint_folder(folder, ("*/*.jsonl",))
    (folder / "sub" / "b.jsonl").write_text("other")
    assert fingerprint_folder(folder, ("*.jsonl",)) == top
    assert fingerprint_folder(folder, ("*/*.jsonl",)) != below
    with pytest.raises(InputError, match=r"no file in .* matches b\.jsonl"):
        fingerprint_folder(folder, ("b.jsonl",))


def test_patterns_and_hidden_files(folder):
    only = fingerprint_folder(folder, ("*.jsonl",))
    (folder / "readme.md").write_text("other")
    (folder / ".DS_Store").write_text("junk")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.jsonl").write_text("junk")
    assert fingerprint_folder(folder, ("*.jsonl",)) == only
    assert fingerprint_folder(folder, ("sub/*",)) != only
    with pytest.raises(InputError, match=r"no file in .* matches \*\.csv, \*\.txt"):
        fingerprint_folder(folder, ("*.csv", "*.txt"))
    with pytest.raises(InputError, match="no such folder"):
        fingerprint_folder(folder / "none")


def test_links_are_followed_and_circles_end(folder, tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "x").write_text("1")
    (folder / "link").symlink_to(tmp_path / "far")
    (folder / "circle").symlink_to(folder)
    before = fingerprint_folder(folder)
    (tmp_path / "far" / "x").write_text("2")
    assert fingerprint_folder(folder) != before
