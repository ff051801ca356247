"""A run's CSV goes on where the run goes on, and figures are drawn from files alone."""

import pytest

from k2 import K2Error
from k2.training.curves import Curve, draw_experiment, draw_run, read

ROW = {"step": 1, "tokens": 48, "tokens_per_second": 10, "loss": 4.5, "max_logit_0": 1.0, "max_logit_1": 2.0, "load_1_0": 0.5, "load_1_1": 1.5}


def rows(count):
    return [{**ROW, "step": step, "loss": 4.5 / step} for step in range(1, count + 1)]


def test_a_resumed_run_writes_its_rows_once(tmp_path):
    curve = Curve(tmp_path / "curve.csv")
    curve.keep(0)
    for row in rows(5):
        curve.add(row)
    curve.keep(3)  # the state was saved after step 3
    for row in rows(6)[3:]:
        curve.add(row)
    assert [row["step"] for row in read(curve.path)] == ["1", "2", "3", "4", "5", "6"]
    assert list(read(curve.path)[0]) == list(ROW) and [p.name for p in tmp_path.iterdir()] == ["curve.csv"]


def test_a_new_run_forgets_the_rows_of_an_old_one(tmp_path):
    curve = Curve(tmp_path / "curve.csv")
    for row in rows(5):
        curve.add(row)
    curve.keep(0)
    curve.add(ROW)
    assert [row["step"] for row in read(curve.path)] == ["1"]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    curve = Curve(tmp_path / "curve.csv")
    for row in rows(3):
        curve.add(row)
    content = curve.path.read_bytes()
    for cut in range(1, len(content.splitlines()[-1]) + 2):
        curve.path.write_bytes(content[:-cut])
        assert [row["step"] for row in read(curve.path)] == ["1", "2"]
        assert all(row["load_1_1"] == "1.5" for row in read(curve.path))


def test_a_folder_that_is_gone_is_one_clear_line(tmp_path):
    with pytest.raises(K2Error, match="curve.csv: could not be written: No such file"):
        Curve(tmp_path / "gone" / "curve.csv").add(ROW)


def test_figures_are_pictures_and_the_same_rows_make_the_same_bytes(tmp_path):
    Curve(tmp_path / "curve.csv").keep(0)
    for row in rows(4):
        Curve(tmp_path / "curve.csv").add(row)
    result = {"results": [{"arm": arm, "seed": 0, "figures": {"bits_per_byte": 3.0}, "curves": {"step": [1, 2], "largest_logit": [1.0, 20.0]}} for arm in "ab"]}
    for name in ("one.png", "two.png"):
        draw_run(read(tmp_path / "curve.csv"), tmp_path / f"run-{name}", tau=100.0)
        draw_experiment(result, tmp_path / f"arms-{name}", "largest_logit", "bits_per_byte")
    for kind in ("run", "arms"):
        content = (tmp_path / f"{kind}-one.png").read_bytes()
        assert content.startswith(b"\x89PNG") and content == (tmp_path / f"{kind}-two.png").read_bytes()
