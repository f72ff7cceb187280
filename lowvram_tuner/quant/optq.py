"""OPTQ, the rounding of GPTQ (https://arxiv.org/abs/2210.17323).

    minimize tr((W - Q) H (W - Q).T) over Q on the grid      H = mean of x x.T over calibration inputs

Columns are rounded one after the other; the error of each is pushed into the columns not yet rounded, through the
Cholesky factor U of the inverse Hessian (H + damping)^-1 = U.T U:

    q_i = round(w_i),   W[:, i:] -= (w_i - q_i) / U[i, i] * U[i, i:]
"""

from __future__ import annotations

import torch

from lowvram_tuner.quant.spec import QuantError

BLOCK = 128
DAMPING = (0.01, 0.03, 0.1, 0.3, 1.0, 10.0)


class Options:
    damp = 0.01
    order = True
    static = True
    mse = "hdiag"   # none, plain, hdiag
    norm = 2.0
    refit = 1
    grid = 80
    shrink = 0.8
O = Options()


def nearest(weight, spec, size):
    g = size
    out, cols = weight.shape
    groups = _grouped(weight, g)
    s, z = search(groups, spec, None)
    q = torch.round(groups / s[..., None] + z[..., None]).clamp_(0, 2**spec.bits - 1)
    return q.reshape(out, -1)[:, :cols].to(torch.uint8), s, z, torch.arange(cols) // g


def _grouped(w, size):
    return torch.nn.functional.pad(w, (0, -w.shape[1] % size)).unflatten(1, (-1, size))


def search(groups, spec, weights):
    """groups [out, G, size] -> scales, zeros [out, G]."""
    top = 2**spec.bits - 1
    lo, hi = groups.amin(-1).clamp_(max=0), groups.amax(-1).clamp_(min=0)
    if spec.sym:
        hi = torch.maximum(hi, -lo); lo = -hi
    best = None
    shrinks = [1.0] if O.mse == "none" else [1 - O.shrink * i / O.grid for i in range(O.grid)]
    for p in shrinks:
        s = ((hi - lo) * p / top)
        s = torch.where(s == 0, 1.0, s).clamp_(min=2.0**-20).half().float()
        zs = [torch.full_like(s, (top + 1) // 2)] if spec.sym else [torch.round(-lo * p / s).clamp_(0, top)]
        for z in zs:
            e = (torch.round(groups / s[..., None] + z[..., None]).clamp_(0, top) - z[..., None]) * s[..., None] - groups
            e = e.abs().pow_(O.norm) if O.norm != 2 else e.square_()
            if weights is not None: e *= weights
            e = e.sum(-1)
            if best is None: best = e.clone(), s.clone(), z.clone()
            else:
                m = e < best[0]
                best = torch.where(m, e, best[0]), torch.where(m, s, best[1]), torch.where(m, z, best[2])
    return best[1], best[2]


def solve(weight, hessian, spec, size):
    w = weight.clone(); h = hessian.float().clone()
    out, cols = w.shape
    d = h.diagonal()
    dead = d == 0
    d[dead] = 1; w[:, dead] = 0
    mean = d.mean()
    hd = h.clone()
    d += O.damp * mean
    hd.diagonal().add_(O.damp * mean)
    perm = torch.argsort(d, descending=True) if O.order else torch.arange(cols)
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h[perm][:, perm])), upper=True)
    g_of = torch.arange(cols) // size
    hw = None if O.mse == "plain" else _grouped(hd.diagonal()[None], size)
    s, z = search(_grouped(w, size), spec, hw)
    for it in range(O.refit + 1):
        q = _pass(w, U, perm, s, z, g_of, spec, size, dynamic=(not O.static and it == 0), hw=hd.diagonal())
        if O.static is False and it == 0:
            q, s, z = q
        if it < O.refit:
            s = refit(w, hd, q, s, z, g_of)
    return q.to(torch.uint8), s, z, g_of


def _pass(w, U, perm, s, z, g_of, spec, size, dynamic=False, hw=None):
    top = 2**spec.bits - 1
    wp = w[:, perm].t().contiguous()
    S, Z = s.t()[g_of[perm]].contiguous(), z.t()[g_of[perm]].contiguous()
    Q = torch.empty_like(wp)
    cols = len(wp)
    E = torch.empty(BLOCK, wp.shape[1])
    for b in range(0, cols, BLOCK):
        e = min(b + BLOCK, cols)
        for i in range(b, e):
            if dynamic and i % size == 0:
                f = i + size
                blk = wp[i:f].clone()
                if f > e:
                    blk[e - i:] -= U[b:i, e:f].t() @ E[: i - b] if i > b else 0
                ss, zz = search(blk.t()[:, None, :], spec, hw[i:f] if O.mse == "hdiag" else None)
                S[i:f] = ss.t(); Z[i:f] = zz.t()
            q = torch.round(wp[i] / S[i] + Z[i]).clamp_(0, top)
            Q[i] = q
            err = (wp[i] - (q - Z[i]) * S[i]) / U[i, i]
            E[i - b] = err
            if i + 1 < e:
                wp[i + 1 : e] -= U[i, i + 1 : e, None] * err
        if e < cols:
            wp[e:] -= U[b:e, e:].t() @ E[: e - b]
    inv = torch.argsort(perm)
    if dynamic:
        return Q[inv].t().contiguous(), S[::size].t().contiguous(), Z[::size].t().contiguous()
    return Q[inv].t().contiguous()


def refit(w, h, q, s, z, g_of):
    """Scales minimizing (w - sum_g s_g c_g) H (...)."""
    out, cols = w.shape
    G = s.shape[1]
    c = q - z[:, g_of]
    size = -(-cols // G)
    res = s.clone()
    wh = w @ h
    onehot = torch.nn.functional.one_hot(g_of, G).float()
    b = (wh * c) @ onehot
    for r in range(0, out, 16):
        cc = c[r : r + 16]
        m = cc[:, :, None] * onehot  # [R, cols, G]
        hm = torch.einsum("ij,rjg->rig", h, m)
        A = torch.einsum("rih,rig->rhg", m, hm)
        A = 0.5 * (A + A.mT)
        dg = A.diagonal(dim1=-2, dim2=-1)
        reg = 1e-3 * dg.mean(-1, keepdim=True)
        A = A + torch.diag_embed(reg.expand(-1, G))
        bb = b[r : r + 16] + reg * s[r : r + 16]
        res[r : r + 16] = torch.linalg.solve(A, bb)
    res = torch.where((res > 0.3 * s) & (res < 3 * s), res, s)
    return res.half().float()


def loss(w, q, s, z, g_of, h):
    d = w - (q.float() - z[:, g_of]) * s[:, g_of]
    return float(torch.einsum("oi,ij,oj->", d, h, d) / torch.einsum("oi,ij,oj->", w, h, w))
