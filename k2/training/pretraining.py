"""Pretraining: text in, a K2 out. What K2 did with 15.5 trillion tokens, on a laptop's worth of them.

    report, section 2.5                      here
    WSD: warm-up, constant, decay            learning_rate_factor
    router bias against the load             Balancer (arXiv 2408.15664; DeepSeek-V3 report, section 2.1.2)
    sequence-wise balance loss, alpha        Balancer.loss, weight Run.balance_loss

    T tokens of a window · M of a block · D hidden · W vocabulary · E experts · K chosen experts
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..config import K2Config, K2Error
from ..kv_cache import NO_CACHE
from ..model import K2
from ..router import Router
from .corpus import Windows
from .curves import Curve
from .fused import fuse, lay_together
from .muonclip import QUINTIC, MuonClip

HEAD_ROWS = 1024  # tokens whose logits exist at a time


@dataclass(frozen=True)
class Run:
    """The settings of one run. lr is Muon's, adamw_lr is for embedding, head and norms; both before the schedule.

    While the learning rate decays, windows are `stretch` times as long and as many times fewer: like K2, the model
    learns on short windows, which are cheap, and sees long ones at the end (report, section 2.5).
    """

    steps: int
    rows: int = 16
    window: int = 256
    lr: float = 1e-2
    adamw_lr: float = 1e-2
    stretch: int = 1
    warmup: int = 40
    decay_share: float = 0.35
    seed: int = 0
    save_every: int = 100
    muon: bool = True  # False: AdamW moves all parameters, at adamw_lr
    newton_schulz: tuple[float, float, float] = QUINTIC
    weight_decay: float = 0.1
    tau: float = 100.0
    bias_step: float = 1e-2  # DeepSeek-V3 takes 1e-3; hundreds of steps instead of hundreds of thousands want more
    balance_loss: float = 1e-4  # weight of the sequence-wise loss, DeepSeek-V3's


def learning_rate_factor(step: int, run: Run) -> float:
    """Warm-up, stable, decay: linear up over `warmup` steps, 1, then linear to 0 over the last `decay_share`."""
    return min(1.0, (step + 1) / run.warmup, (run.steps - step) / decay_steps(run))


def decay_steps(run: Run) -> int:
    """How many steps at the end have a falling learning rate, and long windows."""
    return max(1, int(run.steps * run.decay_share))


def initialize(model: K2, seed: int):
    """Normal weights: 1/sqrt(3 x inputs) for matrices, 0.3 for the embedding, so that tokens differ from the start and
    the router does not send them all to the same experts."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            std = {"model.embed_tokens.weight": 0.3, "lm_head.weight": 0.02}.get(name, (3 * p.shape[1]) ** -0.5)
            p.data.normal_(0, std, generator=generator)


def new_model(config: K2Config, seed: int) -> K2:
    """A model before its first step, float32."""
    model = K2(config).float()
    initialize(model, seed)
    return model


class Balancer:
    """Watches the routers of a model in training: counts each expert's tokens, and nudges the biases against the load."""

    def __init__(self, model: K2, run: Run):
        self.window, self.bias_step, self.weight = run.window, run.bias_step, run.balance_loss
        self.routers = [m for m in model.modules() if isinstance(m, Router)]
        self.load_E = {router: torch.zeros(router.weight.shape[0], device=router.weight.device) for router in self.routers}
        self.scores, self.losses = {}, []
        for router in self.routers:
            router.scores = self._recorded(router)
            router.register_forward_hook(self._watch)

    def _recorded(self, router: Router):
        """The router's own `scores`, whose last result is kept: the balance loss needs what the choice was made by."""
        scores_of = router.scores

        def scores(x_TD):
            self.scores[router] = scores_of(x_TD)
            return self.scores[router]

        return scores

    def _watch(self, router: Router, inputs, outputs):
        if not router.training:
            return
        E, K = router.weight.shape[0], router.top_k
        expert_ids_TK = outputs[0].unflatten(0, (-1, self.window))
        chosen_TE = torch.zeros(*expert_ids_TK.shape[:-1], E, device=expert_ids_TK.device).scatter_(-1, expert_ids_TK, 1.0)
        self.load_E[router] += chosen_TE.sum(dim=(0, 1))
        # Per sequence: an expert's share of choices (f) times its mean share of the scores (P), summed over experts.
        scores_TE = self.scores.pop(router).unflatten(0, (-1, self.window))
        share_TE = scores_TE / scores_TE.sum(-1, keepdim=True)
        self.losses.append((chosen_TE.mean(dim=1) * E / K * share_TE.mean(dim=1)).sum(-1).mean())

    def loss(self):
        """The balance loss of the forward passes since the last call, summed over layers."""
        total = self.weight * torch.stack(self.losses).sum() if self.losses else 0.0
        self.losses = []
        return total

    def step(self) -> list[list[float]]:
        """Raise the bias of experts below the mean load, lower it above; returns each layer's loads over their mean."""
        loads = []
        for router, load_E in self.load_E.items():
            router.e_score_correction_bias += self.bias_step * torch.sign(load_E.mean() - load_E)
            loads.append((load_E / load_E.mean().clamp_min(1.0)).tolist())
            load_E.zero_()
        return loads


class HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of x (T, D) through the output head, HEAD_ROWS at a time.

    All logits of a step are 67 MB for K2-mini and 43 GB for K2, and are needed once. So each block's gradient,
    softmax - one-hot, is made while its logits are at hand, and neither outlives the block. The same numbers as
    F.cross_entropy(head(x)) up to rounding.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_WD, targets_T, rows: int = HEAD_ROWS):
        """Nats; keeps the gradients of x and of the weight."""
        grad_TD, grad_WD = torch.empty_like(x_TD), torch.zeros_like(weight_WD, dtype=torch.promote_types(weight_WD.dtype, torch.float32))
        nats, T = x_TD.new_zeros((), dtype=grad_WD.dtype), len(targets_T)
        for start in range(0, T, rows):
            block = slice(start, start + rows)
            log_p_MW = (x_TD[block] @ weight_WD.mT).to(grad_WD.dtype).log_softmax(-1)
            targets_M1 = targets_T[block, None]
            nats -= log_p_MW.gather(-1, targets_M1).sum()
            slope_MW = log_p_MW.exp_().scatter_add_(-1, targets_M1, torch.full_like(targets_M1, -1, dtype=grad_WD.dtype)).div_(T).to(x_TD.dtype)
            grad_TD[block] = slope_MW @ weight_WD
            grad_WD += slope_MW.mT @ x_TD[block]
        ctx.save_for_backward(grad_TD, grad_WD.to(weight_WD.dtype))
        return nats / T

    @staticmethod
    def backward(ctx, grad):
        """Scale what forward kept."""
        grad_TD, grad_WD = ctx.saved_tensors
        return grad_TD * grad, grad_WD * grad, None, None


def next_token_loss(model: K2, windows):
    """Mean cross-entropy in nats of each window's tokens given those before; windows (batch, T + 1) int64."""
    x_TD = model.model(model.checked(windows[:, :-1], NO_CACHE)).flatten(0, -2)
    return HeadLoss.apply(x_TD, model.lm_head.weight, windows[:, 1:].flatten())


class Trainer:
    """One run: model, optimizer, balancer, data. `state` and `load_state` make it resumable to the same bits."""

    def __init__(self, config: K2Config, stream: np.ndarray, run: Run, dtype=torch.float32, model: K2 | None = None, device="cpu"):
        if run.rows % run.stretch or run.window * run.stretch > config.max_position_embeddings:
            raise K2Error(f"training: found {run.rows} rows of {run.window} tokens, stretched by {run.stretch}; expected rows that {run.stretch} divides, "
                          f"and long windows within the context of {config.max_position_embeddings}. Change --rows, --window or --stretch.")  # fmt: skip
        self.run, self.step_count = run, 0
        self.model = new_model(config, run.seed) if model is None else model.float().requires_grad_()
        self.device = torch.device(device)
        self.model.to(self.device)
        lay_together(self.model)  # before the optimizer, whose stacks and masters then are views of the same memory
        self.balancer = Balancer(self.model, run)
        # The optimizer copies its float32 masters before the cast.
        self.optimizer = MuonClip(self.model, run.lr, run.adamw_lr, newton_schulz=run.newton_schulz, weight_decay=run.weight_decay, tau=run.tau, muon=run.muon)
        fuse(self.model.to(dtype).train())
        self.short = Windows(stream, run.window, run.seed)
        self.long = Windows(stream, run.window * run.stretch, run.seed + 1)

    def batch(self) -> torch.Tensor:
        """This step's windows (rows, T + 1): short ones until the decay, then long ones."""
        run, long_from = self.run, self.run.steps - decay_steps(self.run)
        if self.step_count < long_from:
            return torch.from_numpy(self.short.batch(self.step_count, run.rows))
        return torch.from_numpy(self.long.batch(self.step_count - long_from, run.rows // run.stretch))

    def step(self) -> dict:
        """One optimizer step. Returns its loss in nats, each layer's largest attention logit, how many heads were
        clipped, and each MoE layer's load per expert over the mean."""
        batch = self.batch().to(self.device)
        self.balancer.window = batch.shape[1] - 1
        loss = next_token_loss(self.model, batch)
        nats = loss.item()
        if not math.isfinite(nats):
            raise K2Error(f"training: the loss of step {self.step_count} is {nats}; expected a finite number. Lower --lr.")
        (loss + self.balancer.loss()).backward()
        max_logits = [float(max_H.max()) for max_H in self.optimizer.clip.max_logits.values()]
        clipped = self.optimizer.step(learning_rate_factor(self.step_count, self.run))
        self.step_count += 1
        return {"loss": nats, "max_logits": max_logits, "clipped": clipped, "loads": self.balancer.step()}

    def state(self) -> dict:
        """Everything that the next step depends on; the data's order follows from seed and step."""
        biases = [router.e_score_correction_bias for router in self.balancer.routers]
        return {"step": self.step_count, "run": vars(self.run), "optimizer": self.optimizer.state(), "biases": biases}

    def load_state(self, state: dict):
        """Go on where `state` was taken. Raises K2Error if it belongs to a run of other settings."""
        if state["run"] != vars(self.run):
            raise K2Error(f"training: the saved run has settings {state['run']}; expected {vars(self.run)}. Resume with the same settings, or choose another --out.")
        self.step_count = state["step"]
        self.optimizer.load_state(state["optimizer"])
        for router, bias_E in zip(self.balancer.routers, state["biases"]):
            router.e_score_correction_bias.copy_(bias_E)


def save_state(trainer: Trainer, path: Path):
    """Write to a temporary file, flush it to the disk, then rename: a kill at any moment leaves the last state whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            torch.save(trainer.state(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a write that was cut short into a RuntimeError
        raise K2Error(f"{path}: could not be written: {str(error).splitlines()[0]}. The state before it is untouched; make room and run the same command again.") from None
    finally:
        temporary.unlink(missing_ok=True)


def read_state(path: Path) -> dict:
    """A saved state; K2Error if the file is not one."""
    try:
        return torch.load(path, weights_only=True)
    except Exception as error:  # torch raises a different type for each way in which a file is not its own
        raise K2Error(f"{path}: expected a training state, found: {str(error).splitlines()[0]}. Remove it to start anew, or choose another --out.") from None


def train(trainer: Trainer, state_path: Path, curve: Curve | None = None, probe=None):
    """Run to the end, saving as it goes, with one progress line on stderr. Resumes if the state file exists.

    Each step is a row of `curve`. `probe(model)`, a held-out measure, is asked whenever a state is saved.
    """
    if state_path.exists():
        trainer.load_state(read_state(state_path))
    if curve:
        curve.keep(trainer.step_count)
    clock, smooth, saved = Clock(trainer), None, trainer.step_count
    while trainer.step_count < trainer.run.steps:
        try:
            report = trainer.step()
        except K2Error as error:
            raise K2Error(f"{error} {f'The state of step {saved} is whole: {state_path}.' if saved else 'No state was saved yet.'}") from None
        smooth = report["loss"] if smooth is None else 0.95 * smooth + 0.05 * report["loss"]
        clock.show(smooth, report)
        row = row_of(report, trainer, clock)
        if trainer.step_count % trainer.run.save_every == 0 or trainer.step_count == trainer.run.steps:
            row["held_out"] = measured(trainer.model, probe) if probe else ""
            save_state(trainer, state_path)
            saved = trainer.step_count
        if curve:
            curve.add(row)


class Clock:
    """The speed of a run, since it was started or resumed."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.first, self.started = trainer, trainer.step_count, time.monotonic()
        self.before = self.started

    def show(self, loss: float, report: dict):
        """The line in the terminal: each over the one before, or one below the other in a file."""
        run, done = self.trainer.run, self.trainer.step_count
        seconds = time.monotonic() - self.started
        rate, left = (done - self.first) * run.rows * run.window / seconds, (run.steps - done) * seconds / (done - self.first)
        print(f"step {done}/{run.steps}  loss {loss:.3f}  {rate:,.0f} tokens/s  largest logit {max(report['max_logits']):.1f}  "
              f"busiest expert {max(map(max, report['loads'])):.1f}x  {left / 60:.0f} min left", end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)  # fmt: skip

    def lap(self) -> float:
        """Seconds since the last call."""
        now = time.monotonic()
        self.before, passed = now, now - self.before
        return passed


def row_of(report: dict, trainer: Trainer, clock: Clock) -> dict:
    """A step as a row of the CSV."""
    run, done, seconds = trainer.run, trainer.step_count, clock.lap()
    row = {"step": done, "tokens": done * run.rows * run.window, "seconds": round(seconds, 3), "tokens_per_second": round(run.rows * run.window / seconds),
           "loss": round(report["loss"], 5), "learning_rate": run.lr * learning_rate_factor(done - 1, run), "held_out": "", "clipped": report["clipped"]}  # fmt: skip
    row |= {f"max_logit_{layer}": round(value, 2) for layer, value in enumerate(report["max_logits"])}
    dense = len(report["max_logits"]) - len(report["loads"])
    return row | {f"load_{dense + i}_{e}": round(load, 2) for i, loads in enumerate(report["loads"]) for e, load in enumerate(loads)}


def measured(model: K2, probe) -> float:
    """What the probe says of the model as it is now, outside of training."""
    model.eval()
    found = round(probe(model), 4)
    model.train()
    return found
