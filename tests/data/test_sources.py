"""Finding, reading and fingerprinting, with files and with a hub that the tests play."""

from __future__ import annotations

import gzip
import json
from types import SimpleNamespace

import pytest

from rlhf_exp.data.records import BadRow
from rlhf_exp.data.sources import Hub, fingerprint, locate, open_source, read_rows
from rlhf_exp.errors import InputError

KEY = "dataset.views.prompts"
ROWS = [{"a": "1"}, {"a": "2"}]


def rows_of(path) -> list:
    """(position without the path, row) of each row."""
    rows = read_rows(KEY, open_source(KEY, str(path)))
    return [(position.removeprefix(f"{path}"), row) for position, row in rows]


def only_line(action) -> str:
    with pytest.raises(InputError) as error:
        action()
    (line,) = error.value.problems
    assert "\n" not in line
    return line


@pytest.fixture
def no_network(monkeypatch):
    import huggingface_hub
    import huggingface_hub.constants

    def refuse(self, id, **options):
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/nowhere")


@pytest.fixture
def hub(monkeypatch):
    """A hub with one dataset, me/pairs; records what it was asked for."""
    import datasets
    import huggingface_hub

    asked = []

    def info(self, id, **options):
        if id != "me/pairs":
            raise OSError(f"404 {id}")
        return SimpleNamespace(sha="c0ffee")

    def load_dataset(id, **options):
        asked.append((id, options))
        return ROWS

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_an_existing_path_comes_first_then_the_variable_then_the_hub(write, tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_EXP_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    assert locate(KEY, "me/pairs") == "me/pairs"
    in_variable = write("all/pairs/train.jsonl", ROWS).parent
    monkeypatch.setenv("RLHF_EXP_DATA", str(tmp_path / "all"))
    assert locate(KEY, "me/pairs") == in_variable
    here = write("me/pairs/train.jsonl", ROWS).parent
    assert locate(KEY, "me/pairs").absolute() == here


def test_the_package_has_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert locate(KEY, "builtin:reviews").name == "reviews.jsonl"
    assert only_line(lambda: locate(KEY, "builtin:nothing")).endswith("the package has no file nothing.jsonl")


def test_a_missing_file_names_where_it_was_sought_and_what_to_set(tmp_path, monkeypatch):
    monkeypatch.delenv("RLHF_EXP_DATA", raising=False)
    line = only_line(lambda: open_source(KEY, str(tmp_path / "x.jsonl")))
    assert line == (
        f"{KEY}={tmp_path}/x.jsonl: not found at {tmp_path}/x.jsonl, nor at RLHF_EXP_DATA (not set). "
        f"Set {KEY} to a file or folder, or RLHF_EXP_DATA to the folder that holds x.jsonl"
    )


@pytest.mark.parametrize(
    "name", ["rows.jsonl", "folder/rows.json", "./rows", "a/b/c", "/nowhere/rows", "~/nothing"]
)
def test_what_looks_like_a_path_is_not_sought_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "hub" not in only_line(lambda: locate(KEY, name))


@pytest.mark.parametrize("name", ["~no-such-user/rows", "a\0b", "x" * 5000])
def test_names_that_no_file_can_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert only_line(lambda: locate(KEY, name)).startswith(KEY)


def test_an_unreachable_hub_names_all_three_places(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("RLHF_EXP_DATA", "/data")
    monkeypatch.chdir(tmp_path)
    line = only_line(lambda: open_source(KEY, "me/pairs"))
    assert line == (
        f"{KEY}=me/pairs: not found at {tmp_path}/me/pairs, nor at /data/pairs, nor on the hub "
        f"([Errno -2] Name or service not known). "
        f"Set {KEY} to a file or folder, or RLHF_EXP_DATA to the folder that holds pairs"
    )


def test_the_hub_is_read_at_the_commit_of_the_fingerprint(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    source = open_source(KEY, "me/pairs")
    assert source == Hub("me/pairs", "c0ffee")
    assert list(read_rows(KEY, source)) == [("me/pairs: row 1", {"a": "1"}), ("me/pairs: row 2", {"a": "2"})]
    assert hub == [("me/pairs", {"split": "train", "revision": "c0ffee"})]
    others = (Hub("me/pairs", "bad"), Hub("me/other", "c0ffee"))
    assert len({fingerprint(hub) for hub in (source, *others)}) == 3


def test_offline_the_last_seen_commit_is_used(tmp_path, monkeypatch, no_network):
    import huggingface_hub.constants

    ref = tmp_path / "cache" / "datasets--me--pairs" / "refs" / "main"
    ref.parent.mkdir(parents=True)
    ref.write_text("beef")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert open_source(KEY, "me/pairs") == Hub("me/pairs", "beef")


def test_a_folder_stands_for_its_train_files(write, tmp_path):
    write("d/train-00001.jsonl", [{"a": "2"}])
    write("d/train-00000.jsonl", [{"a": "1"}])
    write("d/train.json", "[]")  # another format of the same rows
    write("d/validation.jsonl", [{"a": "validation"}])
    write("d/test.jsonl", [{"a": "test"}])
    write("d/README.md", "not data")
    assert [row["a"] for _, row in rows_of(tmp_path / "d")] == ["1", "2"]
    assert [row["a"] for _, row in rows_of(tmp_path / "d" / "test.jsonl")] == ["test"]


def test_a_folder_with_one_file_or_a_data_folder(write, tmp_path):
    write("one/all.jsonl", ROWS)
    assert len(rows_of(tmp_path / "one")) == 2
    write("clone/data/train-00000-of-00001-abc.jsonl", ROWS)
    assert len(rows_of(tmp_path / "clone")) == 2


def test_a_folder_that_is_not_clear(write, tmp_path):
    write("two/a.jsonl", ROWS)
    write("two/b.jsonl", ROWS)
    assert only_line(lambda: rows_of(tmp_path / "two")).endswith("name one of its files: a.jsonl, b.jsonl")
    (tmp_path / "none").mkdir()
    assert "none has no train.jsonl" in only_line(lambda: rows_of(tmp_path / "none"))


def test_an_unknown_kind_of_file(write, tmp_path):
    assert "unknown kind of file" in only_line(lambda: rows_of(write("rows.csv", "a,b")))


def test_lines_keep_their_numbers_over_blank_lines_bom_and_crlf(write):
    path = write("rows.jsonl", b'\xef\xbb\xbf{"a": "1"}\r\n\r\n  \n{"a": "x\\u2028y"}\n{"a": "last"}')
    assert rows_of(path) == [(":1", {"a": "1"}), (":4", {"a": "x\u2028y"}), (":5", {"a": "last"})]


def test_line_separators_inside_a_text_do_not_split_it(write):
    path = write("rows.jsonl", '{"a": "x\u2028y\x85z"}\n')
    assert rows_of(path) == [(":1", {"a": "x\u2028y\x85z"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{'a': 1}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
        (b'{"a": "\xff"}', "not UTF-8 (byte 8 of the line)"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON: Exceeds the limit"),
        (b"[" * 100_000, "not JSON: "),
        (b"version https://git-lfs", "not JSON: Expecting value (column 1)"),
    ],
)
def test_lines_that_cannot_be_read(write, line, reason):
    ((position, first), (_, second)) = rows_of(write("rows.jsonl", line + b'\n{"a": "1"}\n'))
    assert position == ":1" and isinstance(first, BadRow) and str(first).startswith(reason)
    assert second == {"a": "1"}


def test_json_is_a_list_or_lines(write):
    assert rows_of(write("list.json", ' [{"a": "1"},\n 7]')) == [(": row 1", {"a": "1"}), (": row 2", 7)]
    assert rows_of(write("lines.json", ROWS)) == [(":1", {"a": "1"}), (":2", {"a": "2"})]
    line = only_line(lambda: rows_of(write("broken.json", '[{"a": "1"},')))
    assert "broken.json: not JSON" in line


def test_parquet(write, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == [(": row 1", {"a": "1"}), (": row 2", {"a": "2"})]
    line = only_line(lambda: rows_of(write("broken.parquet", "PAR1 no")))
    assert "broken.parquet: not a parquet file" in line


def test_fingerprint_follows_the_content_and_not_the_path(write, tmp_path):
    def of(name: str) -> str:
        return fingerprint(open_source(KEY, str(tmp_path / name)))

    write("a.jsonl", ROWS)
    write("elsewhere/b.jsonl", ROWS)
    write("folder/train.jsonl", ROWS)
    before = of("a.jsonl")
    assert before == of("elsewhere/b.jsonl") == of("folder")
    write("folder/test.jsonl", ROWS)  # not read, so it does not count
    assert of("folder") == before
    write("a.jsonl", [*ROWS, {"a": "3"}])
    assert of("a.jsonl") != before
    write("folder/train-2.jsonl", ROWS)
    assert of("folder") != before


def test_lines_may_be_gzipped(write, tmp_path):
    path = write("hh/train.jsonl.gz", gzip.compress(b'\xef\xbb\xbf{"a": "1"}\n\nno\n{"a": "2"}'))
    ((_, first), (position, bad), (_, last)) = rows_of(path)
    assert (first, last, position) == ({"a": "1"}, {"a": "2"}, ":3") and isinstance(bad, BadRow)
    assert next(row for _, row in rows_of(path.parent)) == {"a": "1"}  # a train file of a folder
    whole = gzip.compress(json.dumps({"a": "1" * 500}).encode())
    for content in (b"plain", b"", whole[:-5], whole[:20], whole[:15] + b"xxxxxxxx" + whole[23:]):
        broken = write("broken.jsonl.gz", content)
        if content:
            assert only_line(lambda broken=broken: rows_of(broken)).startswith(f"{broken}: ")
        else:
            assert rows_of(broken) == []


def test_all_jsonl_comes_before_the_files_of_its_parts(write, tmp_path):
    write("HC3/all.jsonl", ROWS)
    write("HC3/finance.jsonl", ROWS[:1])
    write("HC3/alle.jsonl", ROWS[:1])
    assert len(rows_of(tmp_path / "HC3")) == 2
    write("HC3/train.jsonl", ROWS * 2)
    assert len(rows_of(tmp_path / "HC3")) == 4


@pytest.fixture
def hub_files(tmp_path, monkeypatch, hub):
    """The hub's dataset as files: me/pairs/part/rows.jsonl at branch main or parts."""
    import huggingface_hub

    def info(self, id, revision=None, **options):
        return SimpleNamespace(sha={None: "c0ffee", "refs/parts": "beef", "v2": "abba"}[revision])

    def download(id, file, repo_type, revision):
        hub.append((id, file, repo_type, revision))
        return str(tmp_path / "snapshots" / revision / file)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_one_file_of_a_hub_dataset(write, hub_files):
    write("snapshots/c0ffee/part/rows.jsonl", '{"a": "1"}\nno\n')
    source = open_source(KEY, "me/pairs:part/rows.jsonl")
    assert source == Hub("me/pairs", "c0ffee", "part/rows.jsonl")
    (first, (position, bad)) = read_rows(KEY, source)
    assert first == ("me/pairs:part/rows.jsonl:1", {"a": "1"})
    assert position == "me/pairs:part/rows.jsonl:2" and isinstance(bad, BadRow)
    assert hub_files == [("me/pairs", "part/rows.jsonl", "dataset", "c0ffee")]
    others = (
        Hub("me/pairs", "c0ffee"),
        Hub("me/pairs", "c0ffee", "rows.jsonl"),
        Hub("me/pairs", "beef", source.file),
    )
    assert len({fingerprint(hub) for hub in (source, *others)}) == 4


def test_its_own_revision_comes_before_that_of_the_dataset(hub_files):
    name = "me/pairs@refs/parts:comparisons/train/0000.parquet"
    assert open_source(KEY, name, "v2") == Hub("me/pairs", "beef", "comparisons/train/0000.parquet")
    assert open_source(KEY, "me/pairs:a.json", "v2") == Hub("me/pairs", "abba", "a.json")
    assert open_source(KEY, "me/pairs@v2") == Hub("me/pairs", "abba")


def test_a_hub_file_is_sought_in_local_folders_first(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "me/pairs@v2:part/rows.jsonl"
    assert locate(KEY, name, "config") == name
    monkeypatch.setenv("RLHF_EXP_DATA", str(tmp_path / "all"))
    for path, expected in (
        ("all/config/train.jsonl", "all/config"),  # by the name in conf/dataset
        ("all/pairs/train.jsonl", "all/pairs"),  # a folder without that file: by its own rule
        ("all/pairs/part/rows.jsonl", "all/pairs/part/rows.jsonl"),
        ("me/pairs/part/rows.jsonl", "me/pairs/part/rows.jsonl"),
    ):
        write(path, ROWS)
        assert locate(KEY, name, "config").absolute() == tmp_path / expected


def test_hub_files_that_cannot_be(tmp_path, monkeypatch, no_network):
    monkeypatch.chdir(tmp_path)
    assert "unknown kind of file" in only_line(lambda: locate(KEY, "me/pairs:rows.csv"))
    line = only_line(lambda: open_source(KEY, "me/pairs@v2:rows.jsonl"))
    assert f"not found at {tmp_path}/me/pairs, nor at RLHF_EXP_DATA (not set), nor on the hub" in line
    assert line.endswith("the folder that holds pairs")
    for name in ("a/b/c:rows.jsonl", "me/pairs:", "me/pairs@", "me/pairs:a:b.jsonl"):
        assert "nor on the hub" not in only_line(lambda name=name: locate(KEY, name))


# rows as on the hub: nulls, objects in lists, fields that only some rows have
PUBLISHED = [
    {"question": "a", "human_answers": ["b", None], "chatgpt_answers": [], "index": None},
    {"question": "c", "human_answers": ["d"], "chatgpt_answers": ["e", ""], "index": None},
]
TALKS = [
    {"context": [{"role": "human", "text": "a"}], "chosen": {"role": "assistant", "text": "b"}},
    {"context": [], "chosen": {"role": "assistant", "text": "c"}},
]


@pytest.mark.parametrize("rows", [ROWS, PUBLISHED, TALKS])
@pytest.mark.parametrize(
    "kind", ["train.jsonl", "train.jsonl.gz", "train.json", "data/train-00000-of-00001.parquet"]
)
def test_the_datasets_library_reads_what_we_read(write, tmp_path, monkeypatch, rows, kind):
    """The real load_dataset on a local copy: the same rows, and the same as our own readers'."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    content = json.dumps(rows).encode() if kind.endswith(".json") else content
    path = write(f"copy/{kind}", gzip.compress(content) if kind.endswith(".gz") else content)
    if kind.endswith(".parquet"):
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(rows), path)
    folder = tmp_path / "copy"
    loaded = list(read_rows(KEY, Hub(str(folder), "main")))
    assert loaded == [(f"{folder}: row {i}", row) for i, row in enumerate(rows, 1)]
    assert [row for _, row in rows_of(folder)] == rows


def test_a_dataset_with_a_loading_script_is_refused_in_a_line(write, tmp_path, monkeypatch):
    """`datasets` runs none since version 4: HC3's is such a one, whose files have to be named."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write("HC3/HC3.py", "raise SystemExit")
    write("HC3/all.jsonl", ROWS)
    line = only_line(lambda: list(read_rows(KEY, Hub(str(tmp_path / "HC3"), "main"))))
    assert "HC3.py" in line
    assert line.endswith(f", or name one of its files: {KEY}={tmp_path / 'HC3'}:FILE")
