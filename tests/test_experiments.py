"""The experiments run, differ in what they say they differ in, and their claims hold in short: `pytest -m slow` (minutes)."""

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from k2 import K2Error
from k2.__main__ import main
from k2.training import experiments, facts
from k2.training.muonclip import CUBIC, QUINTIC

COMMITTED = Path(__file__).parent.parent / "lessons" / "experiments"


@pytest.fixture
def short(monkeypatch):
    """A little text, so that a run of two steps takes no time."""
    text = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
    monkeypatch.setattr(experiments, "corpus_bytes", lambda: text)
    monkeypatch.setattr(experiments, "held_out_bytes", lambda: text[:200].tolist())
    monkeypatch.setattr(facts, "PEOPLE", 6)
    monkeypatch.setattr(experiments, "BASE", replace(experiments.BASE, rows=2))
    monkeypatch.setattr(experiments, "SMALL", replace(experiments.SMALL, hidden_size=32, moe_intermediate_size=8, num_hidden_layers=2))


@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_each_command_prints_a_table_and_leaves_two_files(short, name, tmp_path, capsys):
    assert main(["experiment", name, "--steps", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    arms = [arm.name for arm in experiments.EXPERIMENTS[name].arms]
    assert [line.split(" | ")[0].strip("| ") for line in printed.splitlines()[2:]] == arms
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"{name}.json", f"{name}.png"]
    assert main(["experiment", name, "--redraw", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == printed


def test_arms_differ_in_what_their_names_say(short):
    results = {name: experiments.experiment(name, [4], 2)["results"] for name in ("clip", "newton-schulz", "balance", "sparsity")}
    settings = {r["arm"]: r["settings"] for rs in results.values() for r in rs}
    assert "tau" not in settings["Muon"] and settings["MuonClip, tau 30"]["tau"] == 30.0  # infinity is no number in JSON
    assert settings["quintic"]["newton_schulz"] == QUINTIC and settings["cubic"]["newton_schulz"] == CUBIC
    assert settings["bias"]["bias_step"] > settings["none"]["bias_step"] == 0 and not settings["none"]["balance_loss"]
    assert all(s["seed"] == 4 and s["steps"] == 2 for s in settings.values())
    starts = [r["curves"]["loss"][0] for r in results["clip"]]
    assert len(set(starts)) == 1 and abs(starts[0] / math.log(256) - 1) < 0.05  # equal weights, equal text


def test_a_seed_is_a_run(short):
    curves = [experiments.experiment("newton-schulz", [seed], 3)["results"][0]["curves"]["loss"] for seed in (0, 0, 1)]
    assert curves[0] == curves[1] != curves[2]


def test_curves_are_thinned_and_keep_their_peaks():
    reports = [{"loss": float(i), "max_logits": [1.0, 50.0 if i == 77 else 2.0], "loads": [[1.0, 0.05]], "clipped": 1} for i in range(500)]
    found = experiments.curves(reports)
    assert len(found["step"]) <= experiments.POINTS and found["step"][-1] == 500 and max(found["largest_logit"]) == 50.0
    figures = experiments.summary(reports)
    assert figures["clips"] == 500 and figures["largest_logit"] == 50.0 and figures["idle_experts"] == 1.0 and figures["largest_rise"] == 1.0
    assert figures["final_loss"] == statistics.fmean(range(450, 500))


def test_what_does_not_exist_is_refused(tmp_path):
    with pytest.raises(K2Error, match="expected one of clip, optimizer"):
        experiments.experiment("clips", [0])
    with pytest.raises(K2Error, match="Run the experiment first"):
        experiments.read("clip", tmp_path)


def figures_of(result: dict, arm: str, key: str) -> list[float]:
    return [r["figures"][key] for r in result["results"] if r["arm"] == arm]


def clip_holds(result):
    """Muon's logits pass tau, QK-Clip keeps them near it, and the loss is none the worse."""
    wild, held = figures_of(result, "Muon", "largest_logit"), figures_of(result, "MuonClip, tau 100", "largest_logit")
    assert min(wild) > 2 * 100 and max(held) < 2 * 100, f"largest logits: {wild} without, {held} with the clip"
    losses = [statistics.fmean(figures_of(result, arm, "final_loss")) for arm in ("Muon", "MuonClip, tau 100", "MuonClip, tau 30")]
    assert losses[1] < losses[0] + 0.02 and losses[2] < losses[0] + 0.02, f"final losses {losses}"


def balance_holds(result):
    """The bias evens the load."""
    bias, none = (statistics.fmean(figures_of(result, arm, "busiest_expert")) for arm in ("bias", "none"))
    assert bias < 0.8 * none, f"busiest expert {bias:.2f} times the mean with the bias, {none:.2f} without"


def newton_schulz_holds(result):
    """The quintic iteration trains better."""
    quintic, cubic = (statistics.fmean(figures_of(result, arm, "bits_per_byte")) for arm in ("quintic", "cubic"))
    assert quintic < cubic - 0.03, f"{quintic:.3f} bits per byte with the quintic, {cubic:.3f} with the cubic"


def rephrasing_holds(result):
    """Who read ten wordings answers more questions never asked than who read one, both of people known by heart."""
    one, ten = (statistics.fmean(figures_of(result, arm, "never_asked")) for arm in ("one wording, ten times", "ten wordings, once"))
    assert ten > one + 0.05, f"right answers: {ten:.2f} after ten wordings, {one:.2f} after one"


def optimizer_holds(result):
    """Muon's best rate ends below AdamW's best, and below AdamW after as much time."""
    muon = min(figures_of(result, arm, "bits_per_byte")[0] for arm in ("Muon", "Muon, lr / 2", "Muon, lr x 2"))
    adamw = min(figures_of(result, arm, "bits_per_byte")[0] for arm in ("AdamW", "AdamW, lr / 2", "AdamW, lr x 2", "AdamW, equal time"))
    assert muon < adamw - 0.05, f"bits per byte: Muon {muon:.3f}, AdamW {adamw:.3f}"


def sparsity_holds(result):
    """More experts than 16, as many active, lower the loss; that 96 are better than 32 is not claimed."""
    smallest, *larger = (statistics.fmean(figures_of(result, f"sparsity {s}", "bits_per_byte")) for s in (8, 16, 32, 48))
    assert max(larger) < smallest - 0.03, f"bits per byte: {smallest:.3f} with 16 experts, {larger} with 32, 64, 96"


CLAIMS = {"optimizer": optimizer_holds, "sparsity": sparsity_holds, "clip": clip_holds, "balance": balance_holds, "newton-schulz": newton_schulz_holds, "rephrasing": rephrasing_holds}
SEEDS = {"rephrasing": [7, 8, 9], "sparsity": [0, 1, 2]}  # of the others one will do
SHORT = {"optimizer": 200, "clip": 120, "balance": 150, "newton-schulz": 200}  # steps; sparsity and rephrasing take all of theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", CLAIMS)
def test_the_claim_holds_in_a_shortened_run(name):
    """Three seeds where one proves nothing: of rephrasing's 150 questions two arms differ by 0.04 through chance alone, and one
    arm of sparsity ended 0.04 bits per byte elsewhere when sums were taken in another order."""
    CLAIMS[name](experiments.experiment(name, SEEDS.get(name, [7]), SHORT.get(name)))


@pytest.mark.parametrize("name", CLAIMS)
def test_the_claim_holds_in_the_committed_run(name):
    result = json.loads((COMMITTED / f"{name}.json").read_text(encoding="utf-8"))
    assert result["command"] and result["machine"] and (COMMITTED / f"{name}.png").exists()
    CLAIMS[name](result)


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*.json")), ids=lambda path: path.stem)
def test_the_page_shows_the_committed_runs_tables(path):
    page, result = (COMMITTED / "README.md").read_text(encoding="utf-8"), experiments.read(path.stem, COMMITTED)
    assert experiments.table_text(result) in page and result["command"] in page and result["machine"] in page
