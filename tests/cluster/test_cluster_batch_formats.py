"""Input formats of `qwenvl batch --ray`: rows read part by part, compared with expected rows."""

from __future__ import annotations

import io
import json
import random
import tarfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fsspec", reason="fsspec is missing; pip install 'paddlemix-qwenvl-plugin[ray]'")

from paddlemix_qwenvl_plugin.batch.plain_form import read
from paddlemix_qwenvl_plugin.batch.rows import Row, id_key, read_row
from paddlemix_qwenvl_plugin.cluster.batch.formats.entry import Entry, data_url
from paddlemix_qwenvl_plugin.cluster.batch.images import with_images
from paddlemix_qwenvl_plugin.cluster.batch.inputs import find, index
from paddlemix_qwenvl_plugin.cluster.batch.parts import Part, cut, digest_of_ids
from paddlemix_qwenvl_plugin.runtime.options import GenerationOptions
from paddlemix_qwenvl_plugin.util.errors import UsageError

OPTIONS = GenerationOptions(max_new_tokens=5)
DEFAULTS = asdict(OPTIONS)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "png")
    return buffer.getvalue()


def plain_row(row_id: Any, **values: Any) -> Row:
    """Build an expected row in the plain form (not in OpenAI's form)."""
    return Row(row_id, openai=False, parsed=read(values, DEFAULTS))


def rows_in_parts(source: object, n_rows: int, prompt: str | None = None) -> list[Row]:
    """Read the rows of a source in parts of `n_rows`; check that row numbers ascend and that ids match the parts."""
    files = find(str(source), "in")
    form = files.format(prompt, OPTIONS)
    rows, last_number = list[Row](), 0
    for part in cut(index(files, form), n_rows):
        assert Part.load(part.dump()) == part
        ids = []
        for span in part.spans:
            for number, row in form.rows(files.folder, span.name, Entry(span.number, span.start, span.stop)):
                assert span.base + number > last_number
                last_number = span.base + number
                rows.append(row)
                ids.append(id_key(row.id))
        assert digest_of_ids(ids) == part.ids
        assert len(ids) == part.n_rows
    return rows


def assert_same_rows(rows: list[Row], expected: list[Row]) -> None:
    """Assert that rows are equal; errors are compared by message."""

    def comparable(rows: list[Row]) -> list[Any]:
        return [
            row._replace(parsed=str(row.parsed)) if isinstance(row.parsed, Exception) else row for row in rows
        ]

    assert comparable(rows) == comparable(expected)


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("n_rows", [1, 3, 7, 100])
def test_jsonl(tmp_path, n_rows):
    rng = random.Random(n_rows)
    lines = [json.dumps({"id": n, "prompt": "é" * rng.randrange(1, 9)}).encode() + b"\n" for n in range(20)]
    lines[3:3] = [b"\n", b"  \r\n"]
    lines[9] = b"not JSON\n"
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines).rstrip(b"\n"))
    expected = [read_row(number, line, DEFAULTS) for number, line in enumerate(lines, 1) if line.strip()]
    assert_same_rows(rows_in_parts(tmp_path / "in.jsonl", n_rows), expected)


@pytest.mark.parametrize("n_rows", [1, 4, 7, 100])
def test_parquet(tmp_path, n_rows):
    pytest.importorskip("pyarrow")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    rows = [{"id": n, "prompt": f"{n}?", "label": 3, "seed": n if n % 2 else None} for n in range(17)]
    rows[5]["prompt"] = None
    write_table(Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=5)
    expected = [
        plain_row(row["id"], prompt=row["prompt"] or "All?", **({"seed": row["seed"]} if row["seed"] else {}))
        for row in rows
    ]
    assert_same_rows(rows_in_parts(tmp_path / "in.parquet", n_rows, "All?"), expected)


def test_images_of_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    red, blue = png("red"), png("blue")
    (tmp_path / "data").mkdir()
    write_table(Table.from_pylist([{"image": red}, {"image": blue}]), tmp_path / "data" / "a.parquet")
    struct = [{"image": {"bytes": red, "path": "x.png"}}, {"image": {"bytes": None, "path": "x.png"}}]
    write_table(Table.from_pylist(struct), tmp_path / "data" / "b.parquet")
    expected = [
        plain_row("a.parquet:1", image=data_url(red), prompt="?"),
        plain_row("a.parquet:2", image=data_url(blue), prompt="?"),
        plain_row("b.parquet:1", image=data_url(red), prompt="?"),
        plain_row("b.parquet:2", image="x.png", prompt="?"),
    ]
    assert_same_rows(rows_in_parts(tmp_path / "data", 3, "?"), expected)


@pytest.mark.parametrize("n_rows", [1, 2, 100])
@pytest.mark.parametrize("prompt", [None, "All?"])
def test_webdataset(tmp_path, n_rows, prompt):
    red, blue = png("red"), png("blue")
    (tmp_path / "data").mkdir()
    files = [
        (".json", b"{}"),  # the members that are no part of a row
        ("x/0.png", red),
        ("x/._0.txt", b"of macOS"),
        ("x/0.txt", b"zero?"),
        ("README", b"no row"),
        ("x/1.1.png", blue),
        ("x/1.0.png", red),
        ("x/1.json", b'{"prompt": "one?", "width": 4, "seed": 7}'),
        (f"{'long' * 40}.jpg", blue),  # a long name, which needs an additional tar header
        ("bad.json", b"{"),
    ]
    write_tar(tmp_path / "data" / "0.tar", files)
    write_tar(tmp_path / "data" / "1.tar", [("y.jpg", red), ("y.txt", b"why?")])
    rows = rows_in_parts(tmp_path / "data", n_rows, prompt)
    # In a WebDataset, the job's prompt replaces that of a .txt, but not that of a .json. The sample without both has
    # only the job's.
    job_prompt = {} if prompt is None else {"prompt": prompt}
    expected = [
        plain_row("x/0", images=[data_url(red)], prompt=prompt or "zero?"),
        plain_row("x/1", images=[data_url(red), data_url(blue)], prompt="one?", seed=7),
        plain_row("long" * 40, images=[data_url(blue)], **job_prompt),
        rows[3],  # the error, checked below
        plain_row("y", images=[data_url(red)], prompt=prompt or "why?"),
    ]
    assert_same_rows(rows, expected)
    assert rows[3].id == "bad"
    assert "not valid JSON" in str(rows[3].parsed)


def test_rows_equal_the_samples_of_the_webdataset_library(tmp_path):
    """A file of the library's writer is read as by the library's reader."""
    wds = pytest.importorskip("webdataset")
    with wds.TarWriter(str(tmp_path / "a.tar")) as writer:
        for n in range(5):
            writer.write({"__key__": f"s/{n:03}", "jpg": png("red"), "txt": f"{n}?"})
    rows = rows_in_parts(tmp_path / "a.tar", 2)
    samples = [*wds.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)]
    assert [row.id for row in rows] == [sample["__key__"] for sample in samples]
    expected = [
        plain_row(sample["__key__"], images=[data_url(sample["jpg"])], prompt=sample["txt"].decode())
        for sample in samples
    ]
    assert_same_rows(rows, expected)


def test_a_folder_of_images(tmp_path):
    for name in ("b.png", "a/c.JPG", "a/notes.txt", ".hidden/d.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png("red"))
    expected = [plain_row(name, image=name, prompt="What?") for name in ("a/c.JPG", "b.png")]
    assert_same_rows(rows_in_parts(tmp_path, 1, "What?"), expected)


def test_equal_ids_are_refused(tmp_path):
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "a"}\n\n{"id": "1", "prompt": "a"}\n{"id": 1}\n')
    files = find(str(tmp_path / "in.jsonl"), "in.jsonl")
    with pytest.raises(UsageError, match=r"in.jsonl: line 1 and in.jsonl: line 4 have the same id 1"):
        [*index(files, files.format(None, OPTIONS))]


def test_equal_ids_of_parquet_are_refused(tmp_path):
    pytest.importorskip("pyarrow")
    from pyarrow import Table
    from pyarrow.parquet import write_table

    write_table(Table.from_pylist([{"id": "a"}, {"id": "b"}, {"id": "a"}]), tmp_path / "in.parquet")
    files = find(str(tmp_path / "in.parquet"), "in.parquet")
    with pytest.raises(UsageError, match=r"in.parquet: row 1 and in.parquet: row 3 have the same id 'a'"):
        [*index(files, files.format("?", OPTIONS))]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "has no .jsonl, .parquet or .tar files and no images"),
        (["a.tar", "b.jsonl", "c.png"], "has files of several formats (jsonl, tar); name one file"),
    ],
)
def test_refused_folders(tmp_path, names, message):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UsageError) as error:
        find(str(tmp_path), "in")
    assert str(error.value) == f"in: {message}"


def test_images_by_url():
    """Images on an fsspec file system are replaced by their bytes; relative paths start at the input's folder.

    An image that does not exist makes its row an error. Data URLs and absolute local paths are left to the model.
    """
    from fsspec import filesystem

    memory = filesystem("memory")
    memory.pipe_file("/data/a/red.png", png("red"))
    names = ["a/red.png", "memory://data/a/red.png", "a/none.png", data_url(png("blue")), "/none.png"]
    rows = [(n, plain_row(n, image=name, prompt="?")) for n, name in enumerate(names)]
    numbers, loaded = zip(*with_images(rows, "memory://data", ahead=2))
    assert numbers == (*range(len(names)),)
    assert str(loaded[2].parsed) == "image memory://data/a/none.png does not exist"
    images = [row.parsed.request.parts[0]["image"] for n, row in enumerate(loaded) if n != 2]
    assert images == [png("red"), png("red"), *names[3:]]


def test_a_bucket(tmp_path, bucket):
    """Each format has the same rows in a bucket as in a local folder."""
    pytest.importorskip("pyarrow")
    from fsspec import filesystem
    from pyarrow import Table
    from pyarrow.parquet import write_table

    for name in ("jsonl", "parquet", "tar", "images"):
        (tmp_path / name).mkdir()
    for number in range(2):
        rows = [{"id": f"{number} {n}", "prompt": "é" * n, "image": png("red")} for n in range(9)]
        write_table(Table.from_pylist(rows), tmp_path / "parquet" / f"{number}.parquet", row_group_size=4)
        lines = [json.dumps({**row, "image": "images/0.png"}) + "\n" for row in rows]
        (tmp_path / "jsonl" / f"{number}.jsonl").write_text("".join(lines))
        files = [(f"{number}/{n}.{kind}", png("blue")) for n in range(9) for kind in ("0.png", "1.png")]
        write_tar(tmp_path / "tar" / f"{number}.tar", files)
        (tmp_path / "images" / f"{number}.png").write_bytes(png("red"))
    filesystem("s3").put(str(tmp_path), f"{bucket}/data", recursive=True)
    for name in ("jsonl", "parquet", "tar", "images", "jsonl/1.jsonl", "parquet/1.parquet", "tar/1.tar"):
        expected = rows_in_parts(tmp_path / name, 4, "?")
        assert len(expected) == (2 if name == "images" else 9 if "." in name else 18)
        assert_same_rows(rows_in_parts(f"{bucket}/data/{name}", 4, "?"), expected)
