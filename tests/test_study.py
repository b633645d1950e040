"""Studies that are run by several processes, killed, taken up by other code, and put together again."""
import json
import os
import signal
import threading
import time

import pandas as pd
import pytest
import toy_study

from medvis.studies import run_study, runner, study_status, study_table
from medvis.core.workers import dask_workers


def test_processes_and_this_process_come_to_the_same(tmp_path):
    alone = run_study(toy_study.make(tmp_path / "alone"), progress=False)
    study = toy_study.make(tmp_path / "two")
    together = run_study(study, jobs=2, progress=False)
    pd.testing.assert_frame_equal(alone, together)
    assert set(together[together.measure == "threads"].value) == {1.0}
    pids = toy_study.visits(study)
    assert len(pids) == 8 and all(len(each) == 1 and os.getpid() not in each for each in pids.values())
    assert pids["a-0-first"] == pids["a-0-second"], "one worker fills all cells of a variant and a seed"


def kill_when_it_waits(study, killed):
    "Kill the worker that fills a cell called slow, once it does."
    for _ in range(600):
        for name, pids in toy_study.visits(study).items() if (study.out / "work").exists() else ():
            if name.startswith("slow") and name not in killed:
                killed[name] = pids[0]
                os.kill(pids[0], signal.SIGKILL)
                return
        time.sleep(0.1)


def test_a_killed_worker_loses_nothing_and_another_fills_its_cell(tmp_path):
    distributed = pytest.importorskip("distributed")
    study, killed = toy_study.make(tmp_path / "study", waits=True, seeds=(0,), tasks=("first",)), {}
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        killer = threading.Thread(target=kill_when_it_waits, args=(study, killed))
        killer.start()
        with dask_workers(cluster.scheduler_address) as workers:
            table = run_study(study, executor=workers, progress=False)
        killer.join()
    pids = toy_study.visits(study)
    assert list(killed) == ["slow-0-first"] and len(pids["slow-0-first"]) == 2 and pids["slow-0-first"][1] != killed["slow-0-first"]
    assert len(pids["a-0-first"]) == len(pids["b-0-first"]) == 1
    assert set(table.variant) == {"a", "b", "slow"} and (study_status(study).state == "done").all()
    assert not list(study.out.rglob("*.lock")) and not list(study.out.rglob("*.partial"))


def test_a_local_pool_whose_worker_is_killed_says_so_and_goes_on(tmp_path):
    study, killed = toy_study.make(tmp_path / "study", waits=True, seeds=(0,), tasks=("first",)), {}
    killer = threading.Thread(target=kill_when_it_waits, args=(study, killed))
    killer.start()
    with pytest.raises(ValueError, match="slow, seed 0: BrokenProcessPool"):
        run_study(study, jobs=2, progress=False)
    killer.join()
    assert set(run_study(study, jobs=2, progress=False).variant) == {"a", "b", "slow"}


def test_other_code_is_not_mixed(tmp_path, monkeypatch):
    study = toy_study.make(tmp_path / "study")
    table = run_study(study, progress=False)
    monkeypatch.setattr(runner, "_code_hash", lambda module: "other")
    assert set(study_status(study).state) == {"other"} and set(study_status(study).differs) == {"code"}
    with pytest.raises(ValueError, match="8 cells in .* are of other code .commit .*redo"):
        run_study(study, progress=False)
    pd.testing.assert_frame_equal(study_table(study), table), "what is there can be read"
    more = toy_study.make(tmp_path / "study", seeds=(0, 1, 2))
    with pytest.raises(ValueError, match="8 cells"):
        run_study(more, progress=False)
    manifest = json.loads((study.out / "manifest.json").read_text())
    manifest["cells"]["a-0-first"]["facts"]["code"] = "third"
    (study.out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="of different code"):
        study_table(study)


def test_what_was_gathered_is_enough_and_half_a_cell_is_none(tmp_path):
    study = toy_study.make(tmp_path / "study")
    table = run_study(study, progress=False)
    for path in (study.out / "cells").iterdir():
        path.unlink()
    assert (study_status(study).state == "done").all()
    pd.testing.assert_frame_equal(run_study(study, progress=False), table)
    other = toy_study.make(tmp_path / "other")
    run_study(other, progress=False)
    for name in ("manifest.json", "results.parquet", "cells/a-1-first.json"):  # numbers without their note
        (other.out / name).unlink()
    assert study_status(other).query("state == 'missing'")[["variant", "seed", "task"]].values.tolist() == [["a", 1, "first"]]
    pd.testing.assert_frame_equal(run_study(other, progress=False), table)
    assert sorted(len(pids) for pids in toy_study.visits(other).values()) == [1] * 7 + [2]
