"""The training run: schedule, balance, loss, and that it can be stopped anywhere."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small import small_config

import k2.training.pretraining as pretraining
from k2 import K2Error
from k2.model import K2
from k2.training.pretraining import Balancer, HeadLoss, Run, Trainer, initialize, learning_rate_factor, next_token_loss, save_state, train

RUN = Run(steps=6, rows=3, window=16, warmup=2, save_every=2)


def stream(length=4000):
    return np.random.default_rng(0).integers(0, 97, length).astype(np.uint16)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()] + [r.e_score_correction_bias for r in trainer.balancer.routers])


def test_the_schedule_warms_up_stays_and_decays_to_zero():
    run = Run(steps=100, warmup=10, decay_share=0.3)
    factors = [learning_rate_factor(step, run) for step in range(101)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[69] == 1.0
    assert abs(factors[85] - 0.5) < 1e-12 and factors[100] == 0.0


def test_the_loss_starts_at_the_logarithm_of_the_vocabulary():
    torch.manual_seed(0)
    model = K2(small_config())
    initialize(model, 0)
    loss = next_token_loss(model, torch.from_numpy(stream(8 * 33).astype(np.int64).reshape(8, 33)))
    assert abs(loss.item() / math.log(97) - 1) < 0.05, loss.item()


def test_one_batch_can_be_learnt_by_heart():
    trainer = Trainer(small_config(), np.tile(stream(17), 3), Run(steps=40, rows=1, window=16, warmup=5))
    trainer.batch = lambda: torch.from_numpy(stream(17).astype(np.int64))[None]
    losses = [trainer.step()["loss"] for _ in range(40)]
    assert losses[-1] < 0.05, f"loss {losses[-1]:.3f} after 40 steps, from {losses[0]:.2f}"


def test_the_bias_moves_against_the_load_and_stays_where_the_load_is_equal():
    model = K2(small_config())
    balancer = Balancer(model, RUN)
    router = balancer.routers[0]
    balancer.load_E[router] = torch.tensor([4.0, 0.0, 1.0, 3.0] + [2.0] * 7)  # mean 2
    loads = balancer.step()
    step = RUN.bias_step
    assert torch.equal(router.e_score_correction_bias, torch.tensor([-1.0, 1.0, 1.0, -1.0] + [0.0] * 7) * step)
    assert loads == [[2.0, 0.0, 0.5, 1.5] + [1.0] * 7, [0.0] * 11]
    assert not balancer.routers[1].e_score_correction_bias.any()  # no token came by: no load, nothing to balance


def test_the_balance_loss_is_the_formula():
    torch.manual_seed(0)
    config = small_config()
    model = K2(config).train()
    initialize(model, 0)
    balancer = Balancer(model, RUN)
    router = balancer.routers[0]
    x = torch.randn(2 * 16, config.hidden_size)
    ids, _ = router(x)
    expected, scores = 0.0, router.scores(x)
    for row in range(2):
        rows = slice(row * 16, row * 16 + 16)
        for e in range(config.n_routed_experts):
            chosen = (ids[rows] == e).any(dim=1).double().sum().item() * config.n_routed_experts / (config.num_experts_per_tok * 16)
            share = (scores[rows, e] / scores[rows].sum(-1)).double().mean().item()
            expected += chosen * share / 2
    assert abs(balancer.loss().item() / (RUN.balance_loss * expected) - 1) < 1e-5


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path):
    whole = Trainer(small_config(), stream(), RUN)
    train(whole, tmp_path / "whole.pt")
    stopped = Trainer(small_config(), stream(), RUN)
    for _ in range(3):
        stopped.step()
    save_state(stopped, tmp_path / "state.pt")
    resumed = Trainer(small_config(), stream(), RUN)
    train(resumed, tmp_path / "state.pt")
    assert torch.equal(weights(resumed), weights(whole))


def test_windows_are_stretched_while_the_learning_rate_decays():
    run = Run(steps=10, rows=4, window=16, stretch=4, decay_share=0.3)
    trainer, shapes = Trainer(small_config(), stream(), run), []
    for trainer.step_count in range(10):
        shapes.append(tuple(trainer.batch().shape))
    assert shapes == [(4, 17)] * 7 + [(1, 65)] * 3  # as many tokens a step as before
    assert [learning_rate_factor(step, replace(run, warmup=1)) for step in range(6, 10)] == pytest.approx([1, 1, 2 / 3, 1 / 3])


@pytest.mark.parametrize("run", [Run(steps=4, rows=6, window=16, stretch=4), Run(steps=4, rows=8, window=256, stretch=4)])
def test_a_stretch_that_does_not_fit_is_refused(run):
    with pytest.raises(K2Error, match="--stretch"):
        Trainer(small_config(), stream(), run)  # its context is 512


def test_a_run_stopped_among_its_long_windows_goes_on_to_the_same_bits(tmp_path):
    run = Run(steps=6, rows=4, window=16, stretch=4, warmup=2, decay_share=0.5, save_every=2)
    whole = Trainer(small_config(), stream(), run)
    train(whole, tmp_path / "whole.pt")
    stopped = Trainer(small_config(), stream(), run)
    for _ in range(4):
        stopped.step()
    save_state(stopped, tmp_path / "state.pt")
    resumed = Trainer(small_config(), stream(), run)
    train(resumed, tmp_path / "state.pt")
    assert torch.equal(weights(resumed), weights(whole))


def test_a_state_of_other_settings_is_refused(tmp_path):
    trainer = Trainer(small_config(), stream(), RUN)
    save_state(trainer, tmp_path / "state.pt")
    with pytest.raises(K2Error, match="settings"):
        train(Trainer(small_config(), stream(), Run(steps=7, rows=3, window=16)), tmp_path / "state.pt")


def test_a_file_that_is_no_state_is_refused_in_one_line(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"not a state")
    with pytest.raises(K2Error) as error:
        train(Trainer(small_config(), stream(), RUN), tmp_path / "state.pt")
    assert "\n" not in str(error.value) and "state.pt" in str(error.value)


def test_a_save_that_fails_leaves_the_last_state(tmp_path, monkeypatch):
    trainer = Trainer(small_config(), stream(), RUN)
    save_state(trainer, tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()
    trainer.step()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretraining.os, "fsync", no_space)
    with pytest.raises(K2Error, match="No space"):
        save_state(trainer, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_loss_that_is_not_finite_stops_the_run():
    trainer = Trainer(small_config(), stream(), RUN)
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(K2Error, match="step 0"):
        trainer.step()


KILLED = """
import sys, numpy as np, torch
torch.set_num_threads(1)  # as in the process that resumes: sums over other threads round otherwise
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from small import small_config
from k2.training.pretraining import Run, Trainer, train
stream = np.random.default_rng(0).integers(0, 97, 4000).astype(np.uint16)
train(Trainer(small_config(), stream, Run(steps={steps}, rows=3, window=16, warmup=2, save_every=1)), Path({state!r}))
"""


def test_a_run_killed_while_it_saves_resumes_to_the_same_bits(tmp_path):
    here, state = Path(__file__).parent, tmp_path / "state.pt"
    source = KILLED.format(tests=str(here), root=str(here.parent), steps=40, state=str(state))
    child = subprocess.Popen([sys.executable, "-c", source], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    run = Run(steps=40, rows=3, window=16, warmup=2, save_every=1)
    done = torch.load(state, weights_only=True)["step"]
    assert 1 <= done < 40, f"killed after step {done}"
    resumed, whole = Trainer(small_config(), stream(), run), Trainer(small_config(), stream(), run)
    train(resumed, state)
    train(whole, tmp_path / "whole.pt")
    assert torch.equal(weights(resumed), weights(whole))


KILLS = """
import os, random, signal, sys, time, warnings, numpy as np, torch
torch.set_num_threads(1)
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from small import small_config
from k2.training.pretraining import Run, Trainer, read_state, save_state
stream = np.random.default_rng(0).integers(0, 97, 4000).astype(np.uint16)
trainer, state, rng = Trainer(small_config(), stream, Run(steps=9, rows=3, window=16)), Path({state!r}), random.Random(0)
started = time.perf_counter()
save_state(trainer, state)
once, last, cut = time.perf_counter() - started, 0, 0
for _ in range(50):
    child = os.fork()
    if not child:
        while True:  # nothing but saves, each with a step of its own
            trainer.step_count += 1
            save_state(trainer, state)
    time.sleep(rng.uniform(0.2, 4) * once)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut += any(p.name != state.name for p in state.parent.iterdir())
    trainer.load_state(read_state(state))
    assert trainer.step_count >= last
    last = trainer.step_count
    [p.unlink() for p in state.parent.iterdir() if p.name != state.name]
print(cut, last)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fifty_kills_in_the_middle_of_saves_leave_a_readable_state(tmp_path):
    here = Path(__file__).parent
    source = KILLS.format(tests=str(here), root=str(here.parent), state=str(tmp_path / "state.pt"))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", source], capture_output=True, text=True, check=False, timeout=120)
    assert not done.returncode, done.stderr
    cut, last = map(int, done.stdout.split())
    assert cut >= 10 and last >= 10, f"{cut} of 50 kills came within a save; the last state is of step {last}"


def test_a_loss_that_is_not_finite_names_the_last_good_state(tmp_path):
    trainer = Trainer(small_config(), stream(), RUN)
    step, poisoned = trainer.step, []

    def poison():
        if trainer.step_count == 3 and not poisoned:
            poisoned.append(True)
            with torch.no_grad():
                trainer.model.lm_head.weight[0, 0] = torch.nan
        return step()

    trainer.step = poison
    with pytest.raises(K2Error, match=r"loss of step 3 is nan.*The state of step 2 is whole: .*state\.pt"):
        train(trainer, tmp_path / "state.pt")
    resumed = Trainer(small_config(), stream(), RUN)
    train(resumed, tmp_path / "state.pt")
    assert resumed.step_count == RUN.steps and weights(resumed).isfinite().all()


@pytest.mark.parametrize("rows", [1, 4, 5, 64])
def test_the_loss_by_blocks_has_cross_entropys_value_and_gradients(rows):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 7, dtype=torch.float64, generator=generator, requires_grad=True) for n in (13, 23))
    targets = torch.randint(0, 23, (13,), generator=generator)
    expected = torch.nn.functional.cross_entropy(x @ weight.mT, targets)
    found = HeadLoss.apply(x, weight, targets, rows)
    assert abs(found - expected) < 1e-12
    for ours, theirs in zip(torch.autograd.grad(3 * found, (x, weight)), torch.autograd.grad(3 * expected, (x, weight))):
        error = (ours - theirs).abs().max()
        assert error < 1e-12, f"largest error {error:.2e}"


def test_the_training_loss_is_that_of_the_models_logits():
    torch.manual_seed(0)
    model = pretraining.new_model(small_config(), 0)
    windows = torch.from_numpy(stream(4 * 17).astype(np.int64).reshape(4, 17))
    logits = model(windows[:, :-1]).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, windows[:, 1:].flatten())
    assert abs(next_token_loss(model, windows) / expected - 1) < 1e-6
