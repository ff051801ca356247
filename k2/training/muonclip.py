"""MuonClip: the optimizer that trained K2 for 15.5 trillion tokens without a loss spike. Muon, plus a clip on attention.

    report, section 2.1 and Algorithm 1      ours
    M_t = mu M_{t-1} + G_t                   momentum_JOI
    O_t = NewtonSchulz(M_t)                  orthogonalized
    * sqrt(max(n, m)) * 0.2                  RMS_MATCH
    W_t = W_{t-1} - eta (O_t + lambda W)     MuonClip.step
    S_max^h > tau: gamma = tau / S_max^h     QKClip.apply

    T tokens · H heads · A query or key head · O, I a matrix's rows and columns, J matrices of one shape · N, R, V, C as in attention.py

Muon replaces a matrix's gradient by the nearest matrix with equal singular values, so that rare directions move as far
as common ones. That makes attention logits grow; QK-Clip shrinks the weights of just those heads that pass tau.
"""

import torch

from ..attention import MultiHeadLatentAttention, ScaledDotProduct
from ..model import K2

QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024; steep at 0: from above 0.01 values end in about [0.68, 1.14], from below at 1.202 at most
CUBIC = (1.5, -0.5, 0.0)  # the textbook's: ends at 1 exactly, but five steps lift a small value 7.6 times, not 485 times
RMS_MATCH = 0.2  # an orthogonal update has RMS 1/sqrt(max(n, m)); times this it matches AdamW's (arXiv 2502.16982)

STACK = {"cpu": 2**19, "cuda": 2**26}  # numbers orthogonalised at once: on a CPU as many as its cache holds


def orthogonalized(gradient_OI, steps: int = 5, coefficients: tuple = QUINTIC):
    """Newton-Schulz: the same left and right singular vectors, all singular values driven towards 1; (..., O, I).

    A step is x <- a x + (b g + c g g) x with g = x x^T: it multiplies x from the left by a polynomial of g, and all these
    polynomials commute. So the iteration runs on the small square g alone, q <- a + b g + c g g and g <- q g q, and x is
    multiplied once, by the product of all q. Singular values are squared in g, hence float32 at least: bfloat16 would
    lose the small ones. Works on stacks of matrices.

    Five steps on n x m, n the shorter side, take 4 n^2 m + 34 n^3 operations; on x itself, as the textbook has it, they
    take 20 n^2 m + 10 n^3. That is more for an oblong matrix, and less where n > 2 m / 3: for K2's o_proj by 17 %.
    """
    if gradient_OI.shape[-2] > gradient_OI.shape[-1]:
        return orthogonalized(gradient_OI.mT, steps, coefficients).mT  # the Gram matrix of the shorter side is the smaller one
    a, b, c = coefficients
    x_OI = gradient_OI.reshape(-1, *gradient_OI.shape[-2:])
    norm_11 = x_OI.norm(dim=(-2, -1), keepdim=True) + 1e-7  # the Frobenius norm bounds the spectral norm
    gram_OO = x_OI @ x_OI.mT / norm_11.square()
    for step in range(steps):
        q_OO = torch.baddbmm(gram_OO, gram_OO, gram_OO, beta=b, alpha=c)  # b g + c g g
        q_OO.diagonal(dim1=-2, dim2=-1).add_(a)
        product_OO = q_OO if step == 0 else q_OO @ product_OO
        gram_OO = q_OO @ gram_OO @ q_OO if step < steps - 1 else None  # nobody asks for the last one
    return (product_OO / norm_11 @ x_OI).reshape(gradient_OI.shape)


def parameter_groups(model: K2) -> tuple[list, list]:
    """(the matrices that Muon moves, what AdamW moves): embedding, head and vectors are AdamW's, as in Moonlight.

    The embedding and the head have one row per token, and a rare token's row should move rarely.
    """
    tables = {model.model.embed_tokens.weight, model.lm_head.weight}
    matrices = [p for p in model.parameters() if p.ndim == 2 and p not in tables]
    return matrices, [p for p in model.parameters() if p.ndim != 2 or p in tables]


def stacks(matrices: list) -> list[list]:
    """Matrices of equal shape together, for batched products of bounded memory; such as share a storage stay by themselves."""
    groups = {}
    for p in matrices:
        storage = p.untyped_storage()
        groups.setdefault((p.shape, storage.data_ptr() if storage.nbytes() > p.nbytes else 0), []).append(p)
    found = []
    for same_shape in groups.values():
        size = max(1, STACK[same_shape[0].device.type] // same_shape[0].numel())
        found += [same_shape[i : i + size] for i in range(0, len(same_shape), size)]
    return found


def together(tensors: list) -> torch.Tensor:
    """Tensors of one shape as one, (J, ...): a view, no copy, where they lie one behind the other in one storage."""
    first, step = tensors[0], tensors[0].numel() * tensors[0].element_size()
    if all(t.is_contiguous() and t.data_ptr() == first.data_ptr() + i * step and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for i, t in enumerate(tensors)):
        return first.detach().as_strided((len(tensors), *first.shape), (first.numel(), *first.stride()))
    return torch.stack([t.detach() for t in tensors])


class MuonClip:
    """Moves all parameters of a model by their gradients, then clips attention heads.

    Weights, momenta and the second moments are float32 whatever the model computes in: a bfloat16 model gets rounded
    copies after each step, or steps smaller than its last bit would be lost. Momentum 0.95 and Nesterov are Moonlight's
    (examples/toy_train.py), since the K2 report prints neither, and so are the five quintic steps and AdamW's betas and
    eps; weight decay 0.1 and tau 100 are the report's. To compare with: `muon` False gives AdamW all parameters, `tau`
    infinity never clips.
    """

    def __init__(self, model: K2, lr: float, adamw_lr: float, *, momentum: float = 0.95, nesterov: bool = True, newton_schulz: tuple = QUINTIC,
                 weight_decay: float = 0.1, betas: tuple = (0.9, 0.95), eps: float = 1e-8, tau: float = 100.0, muon: bool = True):  # fmt: skip
        self.lr, self.adamw_lr, self.momentum, self.weight_decay = lr, adamw_lr, momentum, weight_decay
        self.nesterov, self.newton_schulz, self.betas, self.eps = nesterov, newton_schulz, betas, eps
        self.matrices, self.others = parameter_groups(model) if muon else ([], list(model.parameters()))
        self.clip = QKClip(model, tau)
        self.step_count = 0
        self.master = {p: p.detach().float() for p in model.parameters()}  # a float32 parameter is its own master
        self.first = {p: torch.zeros_like(w) for p, w in self.master.items()}
        self.second = {p: torch.zeros_like(self.master[p]) for p in self.others}
        self.stacks = [(same_shape, self._joined(self.master, same_shape), self._joined(self.first, same_shape)) for same_shape in stacks(self.matrices)]

    def _joined(self, tensors: dict, same_shape: list):
        """The tensors of some parameters in one, (J, O, I), of which each is a part from now on: so a step takes a few
        large operations and not a few for each matrix."""
        joined_JOI = together([tensors[p] for p in same_shape])
        for p, own_OI in zip(same_shape, joined_JOI):
            if tensors[p].data_ptr() == p.data_ptr():  # a float32 parameter stays its own master
                p.data = own_OI
            tensors[p] = own_OI
        return joined_JOI

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> int:
        """One step; `lr_scale` is the schedule's factor. A parameter without a gradient (an expert that no token
        chose) counts as having a zero one. Returns how many attention heads were clipped."""
        self.step_count += 1
        for same_shape, master_JOI, momentum_JOI in self.stacks:
            gradient_JOI = together([torch.zeros_like(p) if p.grad is None else p.grad for p in same_shape]).float()
            self._muon(master_JOI, momentum_JOI, gradient_JOI, self.lr * lr_scale)
        for p in self.others:
            self._adamw(p, self.adamw_lr * lr_scale)
        clipped = self.clip.apply(self.master)
        for p, master in self.master.items():
            if p.dtype != master.dtype:
                p.copy_(master)
            p.grad = None
        return clipped

    def _muon(self, master_JOI, momentum_JOI, gradient_JOI, lr: float):
        momentum_JOI.mul_(self.momentum).add_(gradient_JOI)
        ahead_JOI = gradient_JOI.add_(momentum_JOI, alpha=self.momentum) if self.nesterov else momentum_JOI  # as the next step will see it
        scale = RMS_MATCH * max(master_JOI.shape[1:]) ** 0.5
        update_JOI = orthogonalized(ahead_JOI, coefficients=self.newton_schulz)
        master_JOI.mul_(1 - lr * self.weight_decay).sub_(update_JOI, alpha=lr * scale)

    def _adamw(self, p, lr: float):
        beta1, beta2 = self.betas
        gradient = torch.zeros_like(self.master[p]) if p.grad is None else p.grad.float()
        first = self.first[p].lerp_(gradient, 1 - beta1) / (1 - beta1**self.step_count)
        second = self.second[p].lerp_(gradient.square(), 1 - beta2) / (1 - beta2**self.step_count)
        decay = self.weight_decay if p.ndim == 2 else 0.0  # norm weights are scales, not directions: nothing pulls them to 0
        self.master[p].mul_(1 - lr * decay).sub_(lr * first / (second.sqrt() + self.eps))

    def state(self) -> dict:
        """All that a resumed run needs, as tensors in parameter order."""
        values = (self.master, self.first, self.second)
        return {"step_count": self.step_count, "tensors": [list(v.values()) for v in values]}

    @torch.no_grad()
    def load_state(self, state: dict):
        """Undo `state`: the parameters themselves are set from the master copies."""
        self.step_count = state["step_count"]
        for ours, theirs in zip((self.master, self.first, self.second), state["tensors"]):
            for mine, saved in zip(ours.values(), theirs):
                mine.copy_(saved)
        for p, master in self.master.items():
            p.copy_(master)


class QKClip:
    """Watches every head's largest attention logit in training's own forward, and shrinks the heads that pass tau."""

    def __init__(self, model: K2, tau: float):
        self.tau = tau
        self.layers = [m for m in model.modules() if isinstance(m, MultiHeadLatentAttention)]
        self.max_logits = {}  # attention module -> largest logit per head (H,) since the last clip
        for layer in self.layers:
            layer.dot_product.register_forward_pre_hook(self._watch(layer))

    def _watch(self, layer):
        @torch.no_grad()
        def watch(dot_product: ScaledDotProduct, q_k_v):
            if layer.training:
                max_H = largest_logits(q_k_v[0], q_k_v[1], dot_product.scale)
                self.max_logits[layer] = torch.maximum(self.max_logits.get(layer, max_H), max_H)

        return watch

    @torch.no_grad()
    def apply(self, master: dict) -> int:
        """Clip the given float32 weights where a head passed tau, forget the maxima; returns how many heads were cut."""
        cut = 0
        for layer, max_H in self.max_logits.items():
            gamma_H = torch.where(max_H > self.tau, self.tau / max_H, 1.0)  # a head may have no positive logit at all
            cut += int((gamma_H < 1).sum())
            clip_heads(layer, gamma_H, master)
        self.max_logits.clear()
        return cut


def largest_logits(q_HTA, k_HSA, scale: float, rows: int = 64):
    """max over batch and causal pairs of scale q.k, per head (H,); a few query rows at a time: never T x S, and not what they may not see."""
    H, T, S = q_HTA.shape[-3], q_HTA.shape[-2], k_HSA.shape[-2]
    q_XTA, k_XSA = q_HTA.flatten(0, -3), k_HSA.flatten(0, -3)  # X: batch and heads as one axis
    largest = []
    for start in range(0, T, rows):
        end = min(start + rows, T)
        seen = S - T + end  # no row of this block looks further
        logits_XMS = q_XTA[:, start:end] @ k_XSA[:, :seen].mT
        future_MM = torch.ones(end - start, end - start, dtype=torch.bool, device=q_HTA.device).triu(1)
        logits_XMS[..., start - end :].masked_fill_(future_MM, -torch.inf)
        largest.append(logits_XMS.flatten(1).amax(dim=1))
    # The scale comes once, at the end: it is positive, so the largest stays the largest.
    return torch.stack(largest).amax(dim=0).unflatten(0, (-1, H)).amax(dim=0).float() * scale


def clip_heads(layer: MultiHeadLatentAttention, gamma_H, master: dict):
    """Multiply head h's logits by gamma_h, through its own weights only. Report, section 2.1, the MLA rules:

    q_C and k_C, both the head's own, by sqrt(gamma) each; q_R by gamma alone, as its partner k_R is shared by all heads
    and must not move; k_R not at all. A head with gamma 1 is multiplied by exactly 1, so its bits stay.
    """
    c = layer.config
    H, N = c.num_attention_heads, c.qk_nope_head_dim
    query = layer.q_b_proj if c.q_lora_rank else layer.q_proj
    query_HAI = master[query.weight].unflatten(0, (H, c.qk_head_dim))
    query_HAI[:, :N] *= gamma_H.sqrt()[:, None, None]
    query_HAI[:, N:] *= gamma_H[:, None, None]
    key_HOC = master[layer.kv_b_proj.weight].unflatten(0, (H, -1))
    key_HOC[:, :N] *= gamma_H.sqrt()[:, None, None]
