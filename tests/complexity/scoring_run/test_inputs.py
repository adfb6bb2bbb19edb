"""Inputs of scoring: every kind of file, with keys, flags and what cannot be used."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from cat_fast.complexity.scoring_run import keys
from cat_fast.complexity.scoring_run.inputs import distinct_names, open_inputs
from cat_fast.complexity.scoring_run.keys import KeysSeen
from cat_fast.complexity.scoring_run.samples import Flags, Sample, UnusableInput
from cat_fast.errors import UserError

CASES = Path(__file__).parents[2] / "cases"


def samples(*files: object, **options) -> list[Sample]:
    inputs = open_inputs([str(file) for file in files], **options)
    assert inputs.problems == []
    return [sample for found in inputs for sample in found.samples()]


def identities(*files: object, **options) -> list[tuple]:
    return [sample.identity for sample in samples(*files, **options)]


def write_tar(path: Path, members: dict[str, str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            data = (CASES / "p0.jpg").read_bytes() if name.endswith(".jpg") else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_text_has_one_caption_per_line(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_bytes("\ufeffone\r\n\n two \u2028 lines \n😀 看板\n".encode() + b"caf\xe9\nlast")
    found = samples(path)
    assert [sample.identity[:2] for sample in found] == [
        ("c.txt:1", "one"),
        ("c.txt:3", "two \u2028 lines"),
        ("c.txt:4", "😀 看板"),
        ("c.txt:5", None),
        ("c.txt:6", "last"),
    ]
    assert [sample.error for sample in found if sample.error] == [
        "line 5: not UTF-8 text (invalid continuation byte); save it as UTF-8"
    ]


def test_json_lines_have_keys_flags_and_errors_by_line(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    rows = [
        '\ufeff{"caption": "one", "key": "a/b", "has_text": true}',
        '{"caption": ["two", "three"], "id": 12, "has_faces": false}',
        '{"caption": "nice \\ud83d", "path": "images/x.jpg"}',
        '{"caption": "odd key", "key": "caf\\udce9"}',
        '{"caption": "\\ud83d\\ude00"}',
        "",
        "broken",
        "[1]",
        '{"key": "k"}',
        '{"key": "flag", "caption": "x", "has_text": "false"}',
        '{"key": 1.5, "caption": "x"}',
        '{"caption": null}',
    ]
    path.write_text("\n".join(rows), encoding="utf-8")
    found = samples(path, flags=Flags(has_text=False))
    assert [sample.identity for sample in found[:5]] == [
        ("a/b", "one", True, None),
        ("12", "two. three.", False, False),
        ("images/x.jpg", "nice \ufffd", False, None),
        ("caf\\udce9", "odd key", False, None),
        ("c.jsonl:5", "😀", False, None),
    ]
    errors = [(sample.key, sample.error) for sample in found[5:]]
    assert [key for key, _ in errors] == ["c.jsonl:7", "c.jsonl:8", "k", "flag", "c.jsonl:11", "c.jsonl:12"]
    for (_, error), words in zip(
        errors,
        [
            "not valid JSON",
            "expected a JSON object",
            "non-empty text",
            "has_text: expected true",
            "key",
            "non-",
        ],
        strict=True,
    ):
        assert error is not None
        assert words in error
        assert error.startswith("line ")


def test_parquet_is_read_by_its_columns(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    table = pyarrow.table(
        {
            "caption": ["one", None, "three"],
            "has_text": [True, None, False],
            "image": [b"1", b"2", b"3"],
            "__key__": ["a", "b", "c"],
        }
    )
    pyarrow.parquet.write_table(table, path)
    found = samples(path)
    assert [sample.identity for sample in found] == [
        ("a", "one", True, None),
        ("b", None, None, None),
        ("c", "three", False, None),
    ]
    pyarrow.parquet.write_table(table.drop_columns("__key__"), path)
    assert [sample.key for sample in samples(path)] == ["c.parquet:0", "c.parquet:1", "c.parquet:2"]
    assert open_inputs([str(path)]).total() == 3


def test_archives_give_captions_of_members_and_sidecars(tmp_path: Path) -> None:
    members = {
        "0.jpg": "",
        "0.txt": "\ufeffone\n",
        "1.jpg": "",
        "1.json": '{"caption": "two", "has_text": true}',
    }
    members |= {"2.jpg": "", "3.jpg": ""}
    first = write_tar(tmp_path / "a.tar", members)
    (tmp_path / "a.scores.jsonl").write_text('{"key": "2", "caption": "three"}\n')
    found = samples(first)
    assert [sample.identity[:3] for sample in found] == [
        ("0", "one", None),
        ("1", "two", True),
        ("2", "three", None),
        ("3", None, None),
    ]
    assert found[3].error == "the image has no caption; expected KEY.txt, KEY.json or the sidecar"
    write_tar(tmp_path / "b.tar", {"0.jpg": "", "0.txt": "four"})
    expected = ["a/0", "a/1", "a/2", "a/3", "b/0"]  # names of several archives distinguish equal keys
    assert [sample.key for sample in samples(tmp_path)] == expected
    assert [sample.key for sample in samples(tmp_path / "{a,b}.tar")] == expected
    inputs = open_inputs([str(tmp_path)])
    assert inputs.total() is None
    list(next(iter(inputs)).samples())
    assert inputs.total() == 8  # extrapolated


def test_images_take_the_text_next_to_them(tmp_path: Path) -> None:
    for name in ("set/cats/a.jpg", "set/b.jpg", "set/c.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not read")
    (tmp_path / "set/cats/a.txt").write_text("a cat\non a mat")
    (tmp_path / "set/b.jpg.txt").write_text("a boat")
    found = samples(tmp_path / "set")
    assert [sample.identity[:2] for sample in found] == [
        ("b.jpg", "a boat"),
        ("c.png", None),
        ("cats/a.jpg", "a cat on a mat"),
    ]
    assert "expected a .txt file next to it" in (found[1].error or "")
    alone = samples(tmp_path / "set/b.jpg", tmp_path / "set/cats/a.jpg")
    assert [sample.identity[:2] for sample in alone] == [("b.jpg", "a boat"), ("a.jpg", "a cat on a mat")]


@pytest.mark.parametrize("name", ["p0.jpg", "int32.tif", "folder", "half_sample.tar", "table.parquet"])
def test_inputs_without_captions_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path = CASES / name
    if name == "folder":
        path = tmp_path
        (tmp_path / "a.jpg").write_bytes((CASES / "p0.jpg").read_bytes())
    elif name == "table.parquet":
        path = tmp_path / name
        pyarrow.parquet.write_table(pyarrow.table({"text": ["one"]}), path)
    with pytest.raises((UserError, UnusableInput), match="caption") as caught:
        samples(path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_caption_files_is_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train-1.jsonl").write_text('{"caption": "two"}\n')
    (tmp_path / "data/train-0.jsonl").write_text('{"caption": "one"}\n')
    (tmp_path / "more.txt").write_text("three\n")
    (tmp_path / ".hidden.txt").write_text("hidden\n")
    (tmp_path / "s.parquet.partial").mkdir()
    (tmp_path / "s.parquet.partial/0.parquet").touch()
    (tmp_path / "README.md").write_text("not captions")
    assert [sample.identity[1] for sample in samples(tmp_path)] == ["one", "two", "three"]
    is_output = {tmp_path / "more.txt"}.__contains__
    assert len(samples(tmp_path, is_output=is_output)) == 2
    with pytest.raises(UserError, match="both input and output"):
        samples(tmp_path / "more.txt", is_output=is_output)


def test_text_in_parquet_that_is_not_utf8_is_an_error_of_its_row(tmp_path: Path) -> None:
    captions = pyarrow.array([b"one", b"caf\xe9", b"three"]).view(pyarrow.string())
    lists = pyarrow.ListArray.from_arrays([0, 1, 2, 3], captions)
    for column in (captions, lists):
        pyarrow.parquet.write_table(pyarrow.table({"caption": column}), tmp_path / "c.parquet")
        found = samples(tmp_path / "c.parquet")
        assert [sample.identity[1] for sample in found] == ["one", None, "three"]
        assert "row 1: caption: expected text" in str(found[1].error)


def test_only_unfinished_scores_inside_a_folder_are_left_out(tmp_path: Path) -> None:
    folder = tmp_path / "download.partial" / "captions"
    (folder / "s.parquet.partial").mkdir(parents=True)
    (folder / "c.txt").write_text("one\n")
    (folder / "s.parquet.partial" / "d.txt").write_text("two\n")
    assert [identity[1] for identity in identities(folder)] == ["one"]


def test_files_named_alike_have_different_keys(tmp_path: Path) -> None:
    for folder in ("x/1", "y/1", "y/2"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "c.txt").write_text("one\n")
    paths = [tmp_path / folder / "c.txt" for folder in ("x/1", "y/1", "y/2")]
    assert distinct_names(paths) == ["x/1/c.txt", "y/1/c.txt", "2/c.txt"]
    assert [sample.key for sample in samples(*paths)] == ["x/1/c.txt:1", "y/1/c.txt:1", "2/c.txt:1"]
    with pytest.raises(UserError, match="named twice"):
        samples(paths[0], tmp_path / "x/../x/1/c.txt")
    assert distinct_names(paths[2:], ["c.txt"]) == ["2/c.txt"]
    (tmp_path / "caption").write_text("two\n")
    assert [s.key for s in samples(tmp_path / "caption", captions=["one"])] == [
        "caption-1",
        f"{tmp_path.name}/caption:1",
    ]


def test_files_without_a_known_ending_are_read_by_content(tmp_path: Path) -> None:
    text, lines = tmp_path / "notes", tmp_path / "rows"
    text.write_text("one é\n" * 2000)
    lines.write_text('\ufeff{"caption": "two"}\n')
    assert len(samples(text)) == 2000
    assert [identity[1] for identity in identities(lines)] == ["two"]
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    for name, words in {
        "binary": "expected captions",
        "missing": "cannot be read (No such file or directory)",
        "/dev/null": "is a device or pipe",
    }.items():
        with pytest.raises(UserError) as caught:
            samples(tmp_path / name)
        assert words in str(caught.value)


def test_command_line_texts_are_numbered() -> None:
    inputs = open_inputs(captions=["one", " ", "three"], labels=["cat"], flags=Flags(has_faces=True))
    found = [sample for source in inputs for sample in source.samples()]
    assert [sample.identity for sample in found] == [
        ("caption-1", "one", None, True),
        ("caption-2", None, None, None),
        ("caption-3", "three", None, True),
        ("label-1", "this is an image of cat", None, True),
    ]
    with pytest.raises(UserError, match="non-empty text"):
        open_inputs(captions=[" "])


def test_an_image_index_and_a_scored_file_are_inputs(tmp_path: Path) -> None:
    assert [identity[0] for identity in identities(CASES / "plain.jsonl")] == ["k0", "k1", "k2"]
    assert [identity[1] for identity in identities(CASES / "bom.jsonl")] == ["a square"] * 3
    assert [sample.error is None for sample in samples(CASES / "bool_str.jsonl")] == [False, False, True]


def test_repeated_keys_are_found_among_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_RECENT", 8)
    seen = KeysSeen()
    names = [json.dumps([i, "key"]) for i in range(300)]
    assert not any(seen.add(name) for name in names)
    assert all(seen.add(name) for name in names)
    assert len(seen._sorted) < 8
    assert not seen.add("new")
