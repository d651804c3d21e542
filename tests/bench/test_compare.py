"""The ladder itself, small: every rung runs more than once, and the result is what the report reads."""

import json

import pytest

from bench.bench_prior import folder_of
from bench.gpu_hours import compare, report

SMALL = {
    "task": "reach",
    "num-envs": 4,
    "n-steps": 8,
    "batch-size": 16,
    "n-epochs": 2,
    "slice-steps": 2,
    "slice-rows": 8,
}


@pytest.mark.slow
def test_every_rung_and_peer_of_a_shape_takes_its_turns(tmp_path, capsys):
    out = tmp_path / "new" / "result.json"
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    shape = str(folder_of("minilm"))
    compare.main([str(out), "--rounds", "2", "--peers", "--backbone-shape", shape, *words])
    result = json.loads(out.read_text())
    arms = result["arms"]
    assert [name.split()[0] for name in arms if name[0].isdigit()] == [str(k) for k in range(1, 9)]
    assert {
        "FastKLPPO, no prior",
        "SB3 on EnvPool",
        "SB3 on EnvPool, wrapped by its user",
        "SB3 on Python Meta-World",
    } < arms.keys()
    assert arms["3 shared instruction"]["tag"] == "refit"
    assert arms["side row: overlapped"]["tag"] == "stale"
    assert all(len(arm["rounds"]) == 2 for arm in arms.values())
    # the language model is asked about 2 x 32 rows by the first user, about 32 by the careful one
    first, careful = (arms[name]["rounds"][0]["parts"] for name in ("1 first user", "2 careful user"))
    assert {part["name"]: part["times"] for part in first} == {"collection": 4, "update": 8}
    assert {part["name"]: part["times"] for part in careful} == {"collection": 4, "prior": 4, "update": 1}
    assert result["first_users_prior_differs_by"] < 1e-3
    assert result["weights"] == "random"
    assert result["skipped"] == ["sbx: no --sbx-python was given", "skrl: no --skrl-python was given"]
    report.main([str(out)])
    told = capsys.readouterr().out
    assert "random weights" in told
    assert json.loads(told.splitlines()[-1])["arms"].keys() == arms.keys()
