"""Packs and splits: a build killed at any moment ends with the same bytes, whoever did the work; damage is seen."""
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvis.data import build
from medvis.data.build import ImageRecord, StudyRecord, write_pack
from medvis.data.pack import Pack, write_manifest
from medvis.data.source import describe_pack
from medvis.data.splits import check_leaks, nested_subsets, patient_splits
from medvis.data.tasks import pack_task

HERE = Path(__file__).parent


def read_study(index: int, pause: float = 0.0, pids: Path | None = None) -> StudyRecord:
    "Study `index`: noise, two images for every third, a broken image for every tenth"
    time.sleep(pause)
    if pids:
        (pids / str(os.getpid())).touch()
    rng = np.random.default_rng(index)
    images = [ImageRecord(f"i{index}-{k}", rng.integers(0, 256, (16, 16), dtype=np.uint8), f"{index}-{k}.png") for k in range(1 + (index % 3 == 0))]
    rejects = [(f"{index}-x.png", "file not found", "missing-file")] if index % 10 == 9 else []
    return StudyRecord(f"s{index}", f"p{index // 2}", str(patient_splits([f"p{index // 2}"])[0]), images, f"FINDINGS: Größe {index}. No effusion seen.",
                       {"Edema": float(index % 2), "Nodule": None if index % 4 else -1.0}, rejects)


SETTINGS = dict(size=16, source={"kind": "test"}, labels=("Edema", "Nodule"), part_size=8, progress=False)
STUDIES = range(80)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    "The files of a build that nobody disturbed"
    out = tmp_path_factory.mktemp("whole") / "pack"
    write_pack(out, STUDIES, read_study, **SETTINGS).verify()
    return contents(out)


def start(out: Path, workers: int, slow: str = "", pids: Path | None = None) -> subprocess.Popen:
    "Build in another process; `slow` is Python that runs first and slows down what is to be hit"
    script = (f"import sys, time; from pathlib import Path; from functools import partial; sys.path.insert(0, {str(HERE)!r})\n"
              f"from medvis.data import build; from test_pack import *\nbuild._START = -1\n{slow}\n"
              f"if __name__ == '__main__': write_pack({str(out)!r}, STUDIES, partial(read_study, pause=0.01, pids={pids and f'Path({str(pids)!r})'}), workers={workers}, **SETTINGS)")
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)


def kill_when(process: subprocess.Popen, condition) -> None:
    "SIGKILL the process as soon as the condition holds"
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, f"ended before it could be killed: {process.stderr.read()}"
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=15)     # its workers hold the pipe too: they must end as well


def parts(out: Path) -> int:
    return len(list(Path(f"{out}.partial/parts").glob("*.json")))


BETWEEN = "real = build.write_atomic\ndef slow(path, data):\n    real(path, data)\n    time.sleep(0.2 if path.suffix == '.u8' else 0)\nbuild.write_atomic = slow"
ASSEMBLY = "real = build._manifest\nbuild._manifest = lambda *a: (time.sleep(5), real(*a))[1]"
RENAMED = "real = build.shutil.rmtree\nbuild.shutil.rmtree = lambda f, **k: (time.sleep(5 if (f / 'parts').exists() else 0), real(f, **k))"
MOMENTS = {
    "before the first part": ("", lambda out: Path(f"{out}.partial/parts").exists()),
    "after three parts": ("", lambda out: parts(out) >= 3),
    "between the pixels and the table of a part": (BETWEEN, lambda out: len(list(Path(f"{out}.partial/parts").glob("*.u8"))) > parts(out) > 0),
    "while the parts are joined": (ASSEMBLY, lambda out: Path(f"{out}.partial/pack/studies.parquet").exists()),
    "after the last rename": (RENAMED, lambda out: out.exists()),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_build_ends_with_the_same_bytes(moment, tmp_path, whole):
    slow, condition = MOMENTS[moment]
    out = tmp_path / "pack"
    kill_when(start(out, 0, slow), lambda: condition(out))
    assert Path(f"{out}.partial").exists() and (out.exists() == (moment == "after the last rename"))
    if not out.exists():
        with pytest.raises(ValueError, match="unfinished build"):
            Pack(out)
    write_pack(out, STUDIES, read_study, **SETTINGS)
    assert contents(tmp_path) == {f"pack/{name}": data for name, data in whole.items()}     # and nothing is left beside it


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_killed_with_workers_leaves_nobody_behind(tmp_path, whole):
    out, pids = tmp_path / "pack", tmp_path / "pids"
    pids.mkdir()
    kill_when(start(out, 2, pids=pids), lambda: parts(out) >= 2)
    workers, deadline = [int(path.name) for path in pids.iterdir()], time.monotonic() + 10
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers and not any(map(running, workers))
    write_pack(out, STUDIES, read_study, **SETTINGS)
    assert contents(out) == whole


def fail_late(index: int) -> StudyRecord:
    if index == 40:
        raise RuntimeError("the reader is broken")
    return read_study(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_failing_reader_keeps_what_was_read(workers, tmp_path, whole, monkeypatch):
    out = tmp_path / "pack"
    monkeypatch.setattr(build, "_START", -1)
    with pytest.raises(RuntimeError, match="the reader is broken"):
        write_pack(out, STUDIES, fail_late, workers=workers, **SETTINGS)
    assert not out.exists() and parts(out) >= (5 if workers == 0 else 0)
    write_pack(out, STUDIES, read_study, workers=workers, **SETTINGS)
    assert contents(out) == whole


def test_workers_are_started_where_they_pay(tmp_path, monkeypatch, whole):
    "Not for a second's work, and then nobody is idle: there is a part for each; the Pack is the same"
    started = []

    class Watched(build.ProcessPoolExecutor):
        def __init__(self, workers, *rest, **more):
            started.append(workers)
            super().__init__(workers, *rest, **more)

    monkeypatch.setattr(build, "ProcessPoolExecutor", Watched)
    few = {**SETTINGS, "part_size": 64}
    here = write_pack(tmp_path / "here", STUDIES, read_study, workers=4, **few)
    assert not started
    monkeypatch.setattr(build, "_START", 0)
    there, alone = (write_pack(tmp_path / str(workers), STUDIES, read_study, workers=workers, **few) for workers in (4, 0))
    assert started == [4] and contents(here.path) == contents(there.path) == contents(alone.path)


def test_gone_on_with_by_more_workers_or_fewer(tmp_path, whole):
    "Parts stay as large as they were: those of an older medvis too, which noted no size"
    for first, then, older, size in ((4, 0, False, 3), (0, 4, False, 8), (0, 4, True, 8)):
        out = tmp_path / f"{first}{then}{older}"
        with pytest.raises(RuntimeError):
            write_pack(out, STUDIES, fail_late, workers=first, **SETTINGS)
        note = Path(f"{out}.partial/build.txt")
        assert note.read_text().split()[1] == str(size) and parts(out) == 40 // size
        note.write_text(note.read_text().split()[0] if older else note.read_text())
        write_pack(out, STUDIES, read_study, workers=then, **SETTINGS)
        assert contents(out) == whole


def test_damaged_parts_are_built_again(tmp_path, whole):
    out = tmp_path / "pack"
    with pytest.raises(RuntimeError):
        write_pack(out, STUDIES, fail_late, **SETTINGS)
    folder = Path(f"{out}.partial/parts")
    (folder / "000000.u8").write_bytes(b"")
    (folder / "000001.json").write_text("{")
    (folder / "000002.u8").unlink()
    (folder / "000003.json").write_text("[]")
    (folder / "000004.json.1.tmp").write_text("left by a killed process")
    write_pack(out, STUDIES, read_study, **SETTINGS)
    assert contents(out) == whole


def test_what_comes_out_is_what_went_in(tmp_path, whole):
    pack = write_pack(tmp_path / "pack", STUDIES, read_study, **SETTINGS)
    images = [image for index in STUDIES for image in read_study(index).images]
    assert len(pack) == len(images) == len(pack.image_table) and pack.image_table.image_id.tolist() == [image.image_id for image in images]
    assert all((pack.image(k) == image.pixels).all() for k, image in enumerate(images))
    for row, study in pack.studies.iterrows():
        record = read_study(row)
        assert pack.image_table.image_id[study.image_rows].tolist() == [image.image_id for image in record.images]
        assert (pack.image_table.study[study.image_rows] == row).all() and study.report == record.report
        assert study.sentences == [f"Größe {row}.", "No effusion seen."]
        assert pack.labels.Edema[row] == row % 2 and (pack.labels.Nodule[row] == -1 if row % 4 == 0 else np.isnan(pack.labels.Nodule[row]))
    assert len(pack.rejects) == 8 and pack.image(3).flags.writeable and not pack.images.flags.writeable


def test_the_hash_is_of_the_content(tmp_path):
    base = write_pack(tmp_path / "a", STUDIES, read_study, **SETTINGS)
    same = write_pack(tmp_path / "b", STUDIES, read_study, **{**SETTINGS, "part_size": 7, "source": {"kind": "elsewhere"}})
    fewer = write_pack(tmp_path / "c", range(79), read_study, **SETTINGS)
    unlabelled = write_pack(tmp_path / "d", STUDIES, read_unlabelled, **SETTINGS)
    assert base.manifest["hash"] == same.manifest["hash"]
    assert len({p.manifest["hash"] for p in (base, fewer, unlabelled)}) == 3


def test_neither_tables_nor_hash_depend_on_row_groups(tmp_path, whole, monkeypatch):
    monkeypatch.setattr(build, "_GROUP", 16)
    pack = write_pack(tmp_path / "pack", STUDIES, read_study, **SETTINGS)
    assert pq.ParquetFile(pack.path / "studies.parquet").num_row_groups == 5 and pack.manifest["hash"] == json.loads(whole["manifest.json"])["hash"]
    for name in ("studies", "images", "rejects"):
        pd.testing.assert_frame_equal(pd.read_parquet(pack.path / f"{name}.parquet"), pd.read_parquet(io.BytesIO(whole[f"{name}.parquet"])))
    pack.verify()


def read_long(index: int) -> StudyRecord:
    return StudyRecord(f"s{index}", f"p{index}", "train", [ImageRecord(f"i{index}", np.zeros((2, 2), np.uint8))], f"Study {index}: {'unchanged, ' * 300}")


def as_format_1(pack: Path) -> None:
    "Rewrite a Pack as medvis wrote it before rejects had codes"
    rejects = pd.read_parquet(pack / "rejects.parquet").drop(columns="code")
    rejects.to_parquet(pack / "rejects.parquet", index=False)
    data, manifest = (pack / "rejects.parquet").read_bytes(), json.loads((pack / "manifest.json").read_text())
    manifest["files"]["rejects.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest.pop("checksum")
    write_manifest(pack, manifest | {"format": 1, "rejected": dict(Counter(rejects["reason"]))})


def test_a_pack_of_format_1_is_read(tmp_path, capsys):
    new = write_pack(tmp_path / "pack", STUDIES, read_study, **SETTINGS)
    assert new.manifest["format"] == 2 and new.manifest["rejected"] == {"missing-file": 8} and set(new.rejects["code"]) == {"missing-file"}
    as_format_1(new.path)
    old = Pack(new.path)
    old.verify()
    assert old.manifest["hash"] == new.manifest["hash"] and "8 rejected: file not found" in describe_pack(old)
    assert old.rejects[["item", "reason"]].equals(new.rejects[["item", "reason"]]) and set(old.rejects["code"]) == {"other"}
    again = write_pack(new.path, STUDIES, read_study, **{**SETTINGS, "progress": True})       # nor is it built again
    assert "8 rejects stay as they were" in capsys.readouterr().out and again.manifest["format"] == 1


def test_parts_of_format_1_are_built_anew(tmp_path, whole):
    out, read = tmp_path / "pack", []
    with pytest.raises(ValueError, match="40 of 94 images"):
        write_pack(out, STUDIES, read_mostly_broken, **SETTINGS)
    for part in (tmp_path / "pack.partial" / "parts").glob("*.json"):
        table = json.loads(part.read_text())
        del table["format"]
        part.write_text(json.dumps(table))
    write_pack(out, STUDIES, lambda index: read.append(index) or read_study(index), **SETTINGS)
    assert read == list(STUDIES) and contents(out) == whole


def test_the_codes_of_rejects_are_not_in_the_hash(tmp_path):
    def read(index: int, code: str) -> StudyRecord:
        return replace(read_study(index), rejects=[("x.png", "file not found", code)])
    first, second = (write_pack(tmp_path / code, range(5), partial(read, code=code), max_rejects=1, **SETTINGS) for code in ("other", "missing-file"))
    assert first.manifest["hash"] == second.manifest["hash"] and first.manifest["rejected"] == {"other": 5} != second.manifest["rejected"]


def test_reports_do_not_pile_up_in_memory(tmp_path, monkeypatch):
    "Three times the studies, but no more of their reports at a time"
    monkeypatch.setattr(build, "_GROUP", 500)
    monkeypatch.setattr(build, "check_report", lambda report, rules: ([report], ""))
    peaks = []
    for studies in (1000, 3000):
        tracemalloc.start()
        write_pack(tmp_path / str(studies), range(studies), read_long, **{**SETTINGS, "size": 2, "labels": (), "part_size": 100}).verify()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.4 * peaks[0]


def read_unlabelled(index: int) -> StudyRecord:
    record = read_study(index)
    record.labels = {}
    return record


def read_mostly_broken(index: int) -> StudyRecord:
    return StudyRecord(f"s{index}", "p", "train", [], rejects=[(f"{index}.png", "file not found", "missing-file")]) if index % 2 else read_study(index)


def test_too_many_rejects_then_mended(tmp_path, whole):
    out = tmp_path / "pack"
    with pytest.raises(ValueError, match=r"40 of 94 images did not get in \(40 x file not found\), more than max_rejects=0.2 allows; the first is 1.png: file not found; all are"):
        write_pack(out, STUDIES, read_mostly_broken, **SETTINGS)
    assert not out.exists() and len(pd.read_csv(f"{out}.partial/rejects.csv")) == 40
    write_pack(out, STUDIES, read_study, **SETTINGS)        # the files are there now: tried again
    assert contents(out) == whole


def test_rejects_may_be_allowed(tmp_path):
    pack = write_pack(tmp_path / "pack", STUDIES, read_mostly_broken, max_rejects=0.5, **SETTINGS)
    assert len(pack.studies) == 40 and len(pack.rejects) == 40
    with pytest.raises(ValueError, match="3 of 3 images did not get in"):
        write_pack(tmp_path / "none", [1, 3, 5], read_mostly_broken, max_rejects=1.0, **SETTINGS)


@pytest.mark.parametrize(("change", "complaint"), [
    (lambda r: r.labels.update(Mass=1.0), "study s3 has labels that were not announced: .'Mass'."),
    (lambda r: setattr(r.images[0], "pixels", np.zeros((16, 15), np.uint8)), "image i3-0: expected uint8 pixels of 16 x 16, and masks as large, found uint8 of ..16, 15.."),
    (lambda r: setattr(r.images[0], "pixels", np.zeros((16, 16))), "found float64"),
    (lambda r: setattr(r, "study_id", "s2"), "study id s2 occurs more than once"),
    (lambda r: (setattr(r, "patient_id", "p0"), setattr(r, "split", "test")), "the same patients or images are on both sides .1 x patient.: patient p0"),
])
def test_readers_are_checked(change, complaint, tmp_path):
    def read(index: int) -> StudyRecord:
        record = read_study(index)
        if index == 3:
            change(record)
        return record
    with pytest.raises(ValueError, match=complaint):
        write_pack(tmp_path / "pack", range(5), read, **SETTINGS)
    assert not (tmp_path / "pack").exists()


def test_other_things_are_not_overwritten(tmp_path):
    out = tmp_path / "pack"
    out.mkdir()
    write_pack(out, range(5), read_study, **SETTINGS)       # an empty folder is no obstacle
    for changed in (dict(size=8), dict(labels=("Edema",)), dict(source={}), dict(require_report=False)):
        with pytest.raises(FileExistsError, match="holds other data or was made with other settings"):
            write_pack(out, range(5), read_study, **{**SETTINGS, **changed})
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        write_pack(tmp_path / "file", range(5), read_study, **SETTINGS)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(ValueError, match="there is no study"):
        write_pack(tmp_path / "none", [], read_study, **SETTINGS)


def manifest(change):
    def damage(out: Path) -> None:
        content = json.loads((out / "manifest.json").read_text())
        change(content)
        (out / "manifest.json").write_text(json.dumps(content))
    return damage


@pytest.mark.parametrize(("damage", "complaint"), [
    (lambda out: (out / "manifest.json").unlink(), "it has no manifest.json"),
    (lambda out: (out / "manifest.json").write_text("{"), "manifest.json is not a Pack's manifest"),
    (lambda out: (out / "manifest.json").write_text("[]"), "manifest.json is not a Pack's manifest"),
    (manifest(lambda m: m.update(format=9)), "Pack format 9, this medvis reads 1 and 2"),
    (lambda out: (out / "studies.parquet").unlink(), "studies.parquet: expected .* the file is missing"),
    (lambda out: os.truncate(out / "images.u8", 100), "images.u8: expected 1792 bytes, found 100"),
])
def test_damage_is_seen_when_opened(damage, complaint, tmp_path):
    write_pack(tmp_path / "pack", range(5), read_study, **SETTINGS)
    damage(tmp_path / "pack")
    with pytest.raises(ValueError, match=complaint):
        Pack(tmp_path / "pack")


@pytest.mark.parametrize("name", ["images.u8", "images.parquet", "studies.parquet", "rejects.parquet"])
def test_a_flipped_bit_is_seen_by_verify(name, tmp_path):
    pack = write_pack(tmp_path / "pack", range(5), read_study, **SETTINGS)
    data = bytearray((pack.path / name).read_bytes())
    data[len(data) // 2] ^= 4
    (pack.path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name}: content differs"):
        Pack(pack.path).verify()


def test_a_foreign_hash_is_seen_by_verify(tmp_path):
    pack = write_pack(tmp_path / "pack", range(5), read_study, **SETTINGS)
    manifest(lambda m: m.update(hash="0" * 64) or m.pop("checksum", None))(pack.path)       # as before there were checksums
    with pytest.raises(ValueError, match="its hash is not that of the files"):
        Pack(pack.path).verify()


@pytest.mark.parametrize("change", [
    {"size": 8}, {"labels": ["Nodule", "Edema"]}, {"rules": {}}, {"pixels": {}}, {"source": {"kind": "other", "fit": "crop"}}, {"guard": {"against": {"x": "y"}, "leaks": {}}},
    {"lists": {}}, {"rejected": {"nothing": 0}}], ids=lambda change: next(iter(change)))
def test_a_changed_manifest_is_named(change, tmp_path):
    pack = write_pack(tmp_path / "pack", range(5), read_study, **SETTINGS)
    manifest(lambda m: m.update(change))(pack.path)
    with pytest.raises(ValueError, match=r"manifest\.json is not a Pack's manifest, or damaged"):
        Pack(pack.path)


WRONG = (None, [], {}, "x", -1, True, 1.5, ["x"], {"x": []})


def test_damaged_and_foreign_packs_end_in_a_line(tmp_path):
    pack = write_pack(tmp_path / "pack", range(5), read_study, **SETTINGS)
    whole = json.loads((pack.path / "manifest.json").read_text())
    whole.pop("checksum", None)
    damaged = ["[" * 100_000, "{" * 100_000, "\0", "", "null", "1", '"x"', "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")]
    for place in [(name,) for name in whole] + [("counts", name) for name in whole["counts"]] + [("files", name) for name in whole["files"]]:
        for wrong in WRONG:
            changed = json.loads(json.dumps(whole))
            inner = changed if len(place) == 1 else changed[place[0]]
            del inner[place[-1]]
            damaged += [json.dumps(changed)]
            inner[place[-1]] = wrong
            damaged += [json.dumps(changed)]
    for text in damaged:
        (pack.path / "manifest.json").write_text(text)
        try:
            found = Pack(pack.path)
            repr(found), len(found), found.images, found.studies, found.labels, found.grades, found.boxes, found.rejects, found.mask(0)
        except ValueError as error:
            assert str(pack.path) in str(error) and "\n" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize("content", [b"", b"PAR1", pd.DataFrame({"x": [1]}).to_parquet()], ids=["empty", "cut off", "another table"])
@pytest.mark.parametrize("name", ["studies", "images", "rejects"])
def test_a_foreign_table_is_named(name, content, tmp_path):
    pack = write_pack(tmp_path / "pack", range(5), read_study, **SETTINGS)
    (pack.path / f"{name}.parquet").write_bytes(content)
    manifest(lambda m: m["files"].update({f"{name}.parquet": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}) or m.pop("checksum", None))(pack.path)
    with pytest.raises(ValueError, match=rf"{name}\.parquet"):
        Pack(pack.path).studies


def test_inverted_pixels_are_seen_before_they_are_measured(tmp_path):
    pack = write_pack(tmp_path / "pack", range(5), read_study, **SETTINGS)
    assert Pack(pack.path).image(0).any() and (pack.path / "checked.json").exists()
    (pack.path / "images.u8").write_bytes(bytes(255 - byte for byte in (pack.path / "images.u8").read_bytes()))
    for measured in (lambda: Pack(pack.path).image(0), lambda: pack_task(Pack(pack.path)).pack.images, lambda: Pack(pack.path).check()):
        with pytest.raises(ValueError, match="images.u8: content differs"):
            measured()


def test_two_builds_of_one_pack(tmp_path, whole):
    out, pids = tmp_path / "pack", tmp_path / "pids"
    pids.mkdir()
    first = start(out, 0, pids=pids)
    deadline = time.monotonic() + 60
    while not parts(out) and time.monotonic() < deadline:
        time.sleep(0.002)
    with pytest.raises(OSError, match=f"process {first.pid} on .* is working on this Pack") as refused:
        write_pack(out, STUDIES, read_study, **SETTINGS)
    assert "\n" not in str(refused.value) and first.wait(60) == 0, first.stderr.read()
    assert contents(out) == whole and not Path(f"{out}.lock").exists()


def test_one_takes_over_a_stale_lock(tmp_path):
    "Many find the lock of a process that has ended; never do two hold it"
    stale = json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "start": 0.0})
    script = ("import sys, time\nfrom pathlib import Path\nfrom medvis.core.files import lock_folder\n"
              "folder = Path(sys.argv[1])\nwhile not (folder.parent / 'go').exists():\n    time.sleep(0.001)\n"
              "try:\n    with lock_folder(folder, 'run'):\n        (folder.parent / 'held').mkdir()\n        time.sleep(0.3)\n        (folder.parent / 'held').rmdir()\n"
              "        print('held')\nexcept BlockingIOError as error:\n    print(error)\n")
    Path(tmp_path / "run.lock").write_text(stale)
    callers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(4)]
    time.sleep(1)
    (tmp_path / "go").touch()
    answers = [caller.communicate(timeout=60)[0] for caller in callers]
    assert "held\n" in answers and all(line == "held\n" or "is working on this run" in line for line in answers), answers
    assert not (tmp_path / "run.lock").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits a process of its own")
def test_a_full_disk_names_the_file(tmp_path):
    script = (f"import resource, signal, sys\nsys.path.insert(0, {str(HERE)!r})\nfrom test_pack import *\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "for limit in (1500, 9000):\n    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, -1))\n"
              "    try:\n        write_pack(f'{sys.argv[1]}/pack{limit}', range(40), read_study, **SETTINGS)\n    except (OSError, ValueError) as error:\n        print(error)\n")
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=120)
    part, whole = done.stdout.splitlines()
    assert "pack1500.partial/parts/000000.u8" in part and "pack9000.partial/pack/images.u8" in whole and "large" in part and "large" in whole, done


IDS = st.lists(st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=6), min_size=1, max_size=60)      # no table has a NUL, and numpy drops it


@settings(max_examples=80, deadline=None)
@given(IDS, st.integers(0, 5), st.randoms())
def test_splits_depend_on_the_patient_alone(patients, seed, random):
    splits = dict(zip(patients, patient_splits(patients, seed=seed), strict=True))
    shuffled = random.sample(patients, random.randint(1, len(patients)))
    assert all(splits[p] == s for p, s in zip(shuffled, patient_splits(shuffled, seed=seed), strict=True))
    table = pd.DataFrame({"patient_id": patients, "split": patient_splits(patients, seed=seed)})
    check_leaks(table)


@settings(max_examples=80, deadline=None)
@given(IDS, st.lists(st.floats(0.001, 1.0), min_size=1, max_size=4, unique=True), st.integers(0, 5), st.randoms())
def test_subsets_are_nested_and_by_patient(patients, fractions, seed, random):
    patients, total = np.array(patients), len(set(patients))
    subsets, last = nested_subsets(patients, tuple(fractions), seed), set()
    for fraction in sorted(fractions):
        chosen = set(patients[subsets[fraction]])
        assert last <= chosen and len(chosen) == max(1, round(fraction * total))
        assert set(np.flatnonzero(np.isin(patients, list(chosen)))) == set(subsets[fraction].tolist())      # all rows of each patient
        last = chosen
    order = np.array(random.sample(range(len(patients)), len(patients)))
    moved = nested_subsets(patients[order], tuple(fractions), seed)
    assert all(set(patients[order][moved[f]]) == set(patients[subsets[f]]) for f in fractions)


def test_splits_stay_as_they_are():
    "Golden: packs in the field hold these splits; a change of the hash would move patients from train to test"
    patients = [f"p{i}" for i in range(12)]
    assert " ".join(patient_splits(patients, seed=3)) == GOLDEN_SPLITS
    assert nested_subsets(patients, (0.25,), seed=3)[0.25].tolist() == GOLDEN_SUBSET


GOLDEN_SPLITS = "train train train validate train validate train test train train validate train"
GOLDEN_SUBSET = [3, 4, 9]


@pytest.mark.parametrize("fractions", [{}, {"train": 0.5}, {"train": 1.5, "test": -0.5}])
def test_bad_shares(fractions):
    with pytest.raises(ValueError, match="sum to 1"):
        patient_splits(["a"], fractions)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_bad_fractions(fraction):
    with pytest.raises(ValueError, match="fractions must be above 0 and at most 1"):
        nested_subsets(["a"], (fraction,))


def test_codes_are_kept_hashed_and_verified(tmp_path):
    "What people coded is part of the content; a report that nobody coded is not one without a finding; without any code nothing is as if there were some."
    def read_coded(index: int, side: str = "left") -> StudyRecord:
        return replace(read_study(index), coded=[None, [], [["Edema", "apex", side], ["Nodule", "", ""]]][index % 3])

    packs = [write_pack(tmp_path / name, range(12), read, **SETTINGS, coded=coded) for name, read, coded in (
        ("left", read_coded, ("Edema", "Nodule")), ("right", partial(read_coded, side="right"), ("Edema", "Nodule")), ("none", read_study, ()))]
    for pack, side in zip(packs, ("left", "right")):
        pack.verify()
        assert Pack(pack.path).studies["coded"].tolist() == [None, [], [["Edema", "apex", side], ["Nodule", "", ""]]] * 4 and pack.manifest["coded"] == ["Edema", "Nodule"]
    assert len({pack.manifest["hash"] for pack in packs}) == 3 and "coded" not in packs[2].studies
    settings = build._Plan(tmp_path, read_study, 16, build.ReportRules(), ("Edema",), True, 8, {}).settings()
    assert "coded" not in settings, "the key of a Pack without codes is that of before"
    with pytest.raises(ValueError, match="study s2 has coded that were not announced: \\['Nodule'\\]"):
        write_pack(tmp_path / "few", range(12), read_coded, **SETTINGS, coded=("Edema",))
