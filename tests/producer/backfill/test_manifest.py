from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from embedstream.producer.backfill.blocks import BadReason, BadRow
from embedstream.producer.backfill.manifest import Manifest, manifest_of
from embedstream.producer.backfill.options import BackfillOptions, InputOptions, OutputOptions
from embedstream.producer.backfill.outputs import output_of
from embedstream.producer.backfill.plan import InputFile, PartId
from embedstream.producer.backfill.records import PartRecord
from embedstream.producer.backfill.state import State
from embedstream.producer.backfill.survey import finished, survey
from embedstream.producer.request import Options
from embedstream.shared.errors import Misconfigured
from embedstream.shared.jobs import LongInputs
from embedstream.shared.options import VectorOptions, VectorType

COLUMNS = pa.schema([pa.field("id", pa.int64())])
FILES = (
    InputFile("/in/a.parquet", 10_000_000, "1732104000123456789", "aa", 100),
    InputFile("/in/b.parquet", 5, '"etag"', "bb", 20),
)
BAD = (BadRow("/in/a.parquet", 3, BadReason.NULL, "The text is null."),)
MODEL = {
    "embedstream.version": "0.1.0",
    "embedstream.model": "m",
    "embedstream.revision": "r1",
    "embedstream.fingerprint": "f1",
    "embedstream.compute_dtype": "bfloat16,float32",
    "embedstream.prompt": "",
}


@pytest.fixture
def options(tmp_path: Path) -> BackfillOptions:
    return BackfillOptions(InputOptions("/in", id_column="id"), OutputOptions(str(tmp_path / "out")), Options())


Make = Callable[..., State]


@pytest.fixture
def begin(options: BackfillOptions) -> Iterator[Make]:
    """Opens the state of what is asked for, with changes."""
    opened: list[State] = []

    def begin(
        files: tuple[InputFile, ...] = FILES, model: dict[str, str] = MODEL, part_rows: int = 10, **changes: Any
    ) -> State:
        asked = replace(options, **changes)
        output = output_of(asked.output)
        state = State(asked.state or output.state_folder, manifest_of(asked, files, COLUMNS, model, part_rows), output)
        opened.append(state)
        return state

    yield begin
    for state in opened:
        state.close()


@pytest.fixture
def begun(begin: Make) -> Make:
    """The same, beside a backfill that has begun."""
    begin().close()
    return begin


def test_it_reads_back_as_it_was_written(options: BackfillOptions, tmp_path: Path) -> None:
    whole = replace(
        options,
        input=InputOptions("/in", "csv", ("a", "b"), "{a}: {b}", "id", ("x", "y"), "x > 1"),
        command=("embedstream", "backfill", "in dir", "out"),
    )
    made = manifest_of(whole, FILES, COLUMNS, MODEL, 7)
    assert Manifest.decode(made.encode(), tmp_path / "manifest.json") == made
    assert made.id != manifest_of(whole, FILES, COLUMNS, MODEL, 7).id


def test_passwords_are_left_out(options: BackfillOptions) -> None:
    asked = replace(
        options,
        input=InputOptions("https://bucket/in?X-Amz-Signature=secret&versionId=1"),
        output=OutputOptions("postgresql://user:secret@host/db?table=t&password=secret"),
        command=("embedstream", "backfill", "--redis-url=redis://:secret@queue", "--where", "a=1&key=2"),
    )
    made = manifest_of(asked, FILES, COLUMNS)
    assert b"secret" not in made.encode()
    assert made.input.path == "https://bucket/in?X-Amz-Signature=***&versionId=1"
    assert made.command[2:] == ("--redis-url=redis://:***@queue", "--where", "a=1&key=2")
    assert output_of(made.output).name == "t"


def test_the_same_again_goes_on_with_what_was_begun(begin: Make) -> None:
    with closing(begin()) as first:
        began = first.manifest
    again = begin(part_rows=99, window_bytes=1, credit_s=9.0, patience_s=1.0, tokenizer_processes=3)
    assert again.manifest == began
    assert again.manifest.part_rows == 10


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            (replace(FILES[0], size_bytes=12_000_000, version="1732190400000000000"), FILES[1]),
            r"`/in/a\.parquet` had 10,000,000 bytes of 2024-11-20 12:00:00\.123456789 UTC, now 12,000,000 bytes of .*",
        ),
        ((FILES[0], replace(FILES[1], version='"other"')), r'`/in/b\.parquet` had 5 bytes of "etag", now .* "other"'),
        ((replace(FILES[0], digest="ff"), FILES[1]), r"`/in/a\.parquet` has another content"),
        (FILES[:1], r"`/in/b\.parquet` is gone"),
        ((*FILES, replace(FILES[0], path="/in/c.parquet")), r"`/in/c\.parquet` is new"),
        ((FILES[1], FILES[0]), r"the files stand in another order"),
    ],
)
def test_a_changed_input_is_refused(begun: Make, files: tuple[InputFile, ...], said: str) -> None:
    with pytest.raises(
        Misconfigured, match=rf"^The input changed since .* began on 2.* UTC: {said}\. To finish it, .* OUT\.$"
    ):
        begun(files)


def test_of_many_changes_some_are_named(begin: Make) -> None:
    many = tuple(replace(FILES[0], path=f"/in/{number}.parquet") for number in range(9))
    begin(many).close()
    with pytest.raises(Misconfigured, match=r"`/in/4\.parquet` is gone; and 6 more\. To"):
        begin(FILES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input": {"text_columns": ("body",)}}, "--text-column was `text` and is now `body`"),
        ({"input": {"template": "{a}"}}, "--template was not given and is now `{a}`"),
        ({"input": {"id_column": None}}, "--id-column was `id` and is now not given"),
        ({"input": {"carry": ("x", "y")}}, "--carry was not given and is now `x, y`"),
        ({"input": {"where": "x > 1"}}, "--where was not given and is now `x > 1`"),
        ({"input": {"format": "csv"}}, "--format was not given and is now `csv`"),
        ({"output": {"format": "arrow"}}, "--output-format was not given and is now `arrow`"),
        ({"output": {"vector_column": "v"}}, "--vector-column was `embedding` and is now `v`"),
        ({"vectors": {"vectors": VectorOptions(64)}}, "--dimensions was not given and is now `64`"),
        ({"vectors": {"vectors": VectorOptions(normalize=False)}}, "--normalize was not given and is now false"),
        (
            {"vectors": {"vectors": VectorOptions(dtype=VectorType.FLOAT16)}},
            "--vector-dtype was `float32` and is now `float16`",
        ),
        ({"vectors": {"truncate_prompt_tokens": -1}}, "--truncate was not given and is now true"),
        ({"vectors": {"long_inputs": LongInputs.CHUNK}}, "--long-inputs was `error` and is now `chunk`"),
        (
            {"vectors": {"prompt": "role:query"}},
            "the prompt (--prompt-name, --input-type) was not given and is now `query`",
        ),
        ({"vectors": {"adapter": "a"}}, "--task was not given and is now `a`"),
    ],
)
def test_other_options_are_refused(
    begun: Make, options: BackfillOptions, changes: dict[str, dict[str, Any]], said: str
) -> None:
    ((group, fields),) = changes.items()
    with pytest.raises(Misconfigured) as refused:
        begun(**{group: replace(getattr(options, group), **fields)})
    assert f".backfill began with something else: {said}. To finish it, give it what" in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "other"}, "the model was `m` and is now `other`"),
        ({"revision": "r2"}, "the revision of the model was `r1` and is now `r2`"),
        ({"fingerprint": "f2"}, "fingerprint) was `f1` and is now `f2`"),
        ({"prompt": "query: "}, "the text of the prompt was not given and is now `query: `"),
        (
            {"compute_dtype": "float16"},
            "the consumers computed in bfloat16,float32 and now compute in float16 (--dtype)",
        ),
    ],
)
def test_another_model_is_refused(begun: Make, changes: dict[str, str], said: str) -> None:
    with pytest.raises(Misconfigured) as refused:
        begun(model=MODEL | {f"embedstream.{name}": value for name, value in changes.items()})
    assert said in str(refused.value)


@pytest.mark.parametrize("changes", [{"version": "9.9"}, {"compute_dtype": "float32"}])
def test_what_does_not_decide_the_vectors_may_change(begun: Make, changes: dict[str, str]) -> None:
    state = begun(model=MODEL | {f"embedstream.{name}": value for name, value in changes.items()})
    assert state.manifest.model == MODEL


def test_other_columns_are_refused(begun: Make, options: BackfillOptions) -> None:
    output = output_of(options.output)
    other = manifest_of(options, FILES, pa.schema([pa.field("id", pa.string())]), MODEL, 10)
    with pytest.raises(Misconfigured, match="the columns of the output was `id int64` and is now `id string`"):
        State(output.state_folder, other, output)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1}', b'{"version": 1, "input": {}}'])
def test_a_damaged_manifest_is_named(begun: Make, options: BackfillOptions, content: bytes) -> None:
    path = output_of(options.output).state_folder / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(Misconfigured, match=r"manifest\.json is damaged .*: bring it back from a copy, or remove"):
        begun()


def test_a_manifest_that_is_gone_is_missed(begun: Make, options: BackfillOptions) -> None:
    with closing(begun()) as state:
        state.commit(PartRecord(PartId(0, 0), 10, 0, 0, 0))
    (output_of(options.output).state_folder / "manifest.json").unlink()
    with pytest.raises(Misconfigured, match=r"manifest\.json is gone, .*: bring it back from a copy, or remove"):
        begun()


def test_a_newer_manifest_is_refused(begun: Make, options: BackfillOptions) -> None:
    path = output_of(options.output).state_folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2, "novelty": 1}))
    with pytest.raises(Misconfigured, match=r"by a newer embedstream \(its form is 2, and this one reads 1\)"):
        begun()


_START = """
import sys
from pathlib import Path
from embedstream.producer.backfill.manifest import Manifest
from embedstream.producer.backfill.state import State

folder = Path(sys.argv[1])
made = Manifest.decode(Path(sys.argv[2]).read_bytes(), folder)
print("ready", flush=True)
sys.stdin.readline()
print(State(folder, made).manifest.id, flush=True)
sys.stdin.readline()
"""


def test_of_those_that_start_at_one_moment_one_writes_the_manifest(options: BackfillOptions, tmp_path: Path) -> None:
    made = [manifest_of(options, FILES, COLUMNS, MODEL, number) for number in range(1, 4)]
    processes = []
    for number, manifest in enumerate(made):
        (tmp_path / f"{number}.json").write_bytes(manifest.encode())
        command = [sys.executable, "-c", _START, str(tmp_path / "s"), str(tmp_path / f"{number}.json")]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ids = [process.communicate("end\n", timeout=60)[0].strip() for process in processes]
    assert len(set(ids)) == 1
    assert ids[0] in {manifest.id for manifest in made}


def test_an_output_of_somebody_else_is_refused(begin: Make, options: BackfillOptions) -> None:
    out = Path(options.output.path)
    out.mkdir()
    begin().close()  # an empty folder is nobody's
    state_folder = output_of(options.output).state_folder
    (state_folder / "manifest.json").unlink()
    (out / "part.parquet").touch()
    with pytest.raises(Misconfigured, match=r"out holds something already, and there is no .*out\.backfill"):
        begin()
    file = out / "some.parquet"
    file.touch()
    with pytest.raises(Misconfigured, match=r"some\.parquet holds something already"):
        begin(output=OutputOptions(str(file)))
    assert not file.with_name("some.parquet.backfill").exists()


def test_an_output_that_is_gone_is_refused(begun: Make, options: BackfillOptions) -> None:
    with closing(begun()) as state:
        state.commit(PartRecord(PartId(0, 0), 10, 0, 0, 0))
    with closing(begun()) as state:  # no part of it has rows: nothing was written
        state.commit(PartRecord(PartId(0, 1), 10, 10, 1, 1))
    with pytest.raises(Misconfigured, match=r"out is gone, and .* says that rows were written there"):
        begun()
    Path(options.output.path).mkdir()
    Path(options.output.path, "part.parquet").touch()
    begun()


def test_output_and_state_may_be_moved_together(begin: Make, options: BackfillOptions, tmp_path: Path) -> None:
    begin().close()
    moved = OutputOptions(str(tmp_path / "there"))
    output_of(options.output).state_folder.rename(output_of(moved).state_folder)
    begin(output=moved).close()


def test_with_a_state_folder_of_its_own_the_output_must_be_the_same(
    begin: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(state=tmp_path / "state").close()
    monkeypatch.chdir(tmp_path)
    begin(state=Path("state"), output=OutputOptions("out/")).close()
    with pytest.raises(Misconfigured, match=r"OUT was `.*/out` and is now `.*/other`"):
        begin(state=tmp_path / "state", output=OutputOptions(str(tmp_path / "other")))


def test_tables_of_one_name_in_two_databases_are_two_outputs(
    begin: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begin(output=OutputOptions("postgresql://me:one@a/db?table=docs")).close()
    begin(output=OutputOptions("postgresql://me:two@a/db?table=docs")).close()
    with pytest.raises(Misconfigured, match=r"OUT was `postgresql://me:\*\*\*@a/db\?table=docs` and is now `.*@b/db"):
        begin(output=OutputOptions("postgresql://me:one@b/db?table=docs"))


def test_a_survey_tells_how_far_it_is(begin: Make, options: BackfillOptions) -> None:
    folder = output_of(options.output).state_folder
    assert survey(folder) is None
    with closing(begin((FILES[0], replace(FILES[1], n_rows=None)))) as state:
        state.commit(PartRecord(PartId(0, 0), 10, 8, 1, 1, 1), BAD)
        told = survey(folder)
        assert told is not None
        assert (told.taken, told.total, told.rows, told.bad_rows, told.is_complete) == (10, None, 8, 1, False)
        state.shard_ended(0, 12, 118)
        told = survey(folder)
        assert told is not None
        assert told.total == 118
        state.finish()
        told = survey(folder)
        assert told is not None
        assert told.is_complete
        assert state.is_complete


def test_what_is_finished_is_told_without_a_model(begin: Make, options: BackfillOptions) -> None:
    assert finished(options, FILES, COLUMNS) is None
    with closing(begin()) as state:
        state.commit(PartRecord(PartId(0, 0), 120, 119, 1, 1, 1), BAD)
        assert finished(options, FILES, COLUMNS) is None
        state.finish()
    out = Path(options.output.path)
    with pytest.raises(Misconfigured, match="out is gone"):
        finished(options, FILES, COLUMNS)
    out.mkdir()
    (out / "part.parquet").touch()
    told = finished(options, FILES, COLUMNS, ("alias", "m"))
    assert told is not None
    assert (told.rows, told.bad_rows, told.side_file) == (119, 1, out.with_name("out.bad-rows.jsonl"))
    with pytest.raises(Misconfigured, match=r"b\.parquet` is gone"):
        finished(options, FILES[:1], COLUMNS)
    with pytest.raises(Misconfigured, match="the model was `m` and is now `other`"):
        finished(options, FILES, COLUMNS, ("other",))
