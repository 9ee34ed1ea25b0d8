"""Local training as the papers put it, slowly: one user, no padding, no stacking, dense float64 gradients.

Nothing here comes from `client` or from the model's code but names, shapes and the keyed draws.
"""

import math

import torch

from common.models.shapes import parameter_shapes
from common.models.weights import Weights
from common.seeding import generator, uniform_bits, uniform_integers

WIDTHS = (8, 12, 16, 24, 32, 48)  # of the windows that private negatives are drawn for


def parameters(config, body):
    """Parameters by name, cut out of the flat body one after another."""
    found, place = {}, 0
    for name, shape in parameter_shapes(config, 0).items():
        if name != "item":
            size = math.prod(shape)
            found[name] = body[place : place + size].reshape(shape)
            place += size
    assert place == len(body)
    return found


def norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def attention(query, key, value):
    """One head over one history, position by position."""
    rows = []
    for t in range(len(query)):
        scores = torch.stack([query[t] @ key[s] for s in range(t + 1)]) / math.sqrt(query.shape[1])
        chances = scores.exp() / scores.exp().sum()
        rows.append(sum(chances[s] * value[s] for s in range(t + 1)))
    return torch.stack(rows)


def encode(config, body, x, masks=None):
    """Hidden state after each of n events, ``(n, D)``."""
    p, n, d = parameters(config, body), len(x), config.dim
    masks = torch.ones(n, 1 + 2 * config.blocks, d) if masks is None else masks
    x = (x * math.sqrt(d) + p["position"][:n]) * masks[:, 0]
    for b in range(config.blocks):
        h = norm(x, p[f"blocks.{b}.norm1.weight"], p[f"blocks.{b}.norm1.bias"])
        qkv = h @ p[f"blocks.{b}.qkv.weight"].T
        width, heads = d // config.heads, []
        for head in range(config.heads):
            cut = slice(head * width, (head + 1) * width)
            heads.append(attention(qkv[:, :d][:, cut], qkv[:, d : 2 * d][:, cut], qkv[:, 2 * d :][:, cut]))
        h = torch.cat(heads, -1) @ p[f"blocks.{b}.out.weight"].T + p[f"blocks.{b}.out.bias"]
        x = x + h * masks[:, 2 * b + 1]
        h = norm(x, p[f"blocks.{b}.norm2.weight"], p[f"blocks.{b}.norm2.bias"])
        h = h @ p[f"blocks.{b}.up.weight"].T + p[f"blocks.{b}.up.bias"]
        h = h * (1 + torch.erf(h / math.sqrt(2))) / 2
        h = h @ p[f"blocks.{b}.down.weight"].T + p[f"blocks.{b}.down.bias"]
        x = x + h * masks[:, 2 * b + 2]
    return norm(x, p["norm.weight"], p["norm.bias"])


def position_loss(loss, logits, target, negatives, forbidden):
    """Loss at one position from the scores of all items."""
    if loss.kind == "softmax":
        return logits.logsumexp(0) - logits[target]
    rivals = [item for item in negatives if item not in forbidden]
    if loss.kind == "sampled-softmax":
        return torch.stack([logits[target], *(logits[item] for item in rivals)]).logsumexp(0) - logits[target]
    power = 1.0
    if loss.kind == "gbce":
        alpha = min(1.0, loss.negatives / (len(logits) - 1))
        power = alpha * (loss.calibration * (1 - 1 / alpha) + 1 / alpha)
    return -power * torch.sigmoid(logits[target]).log() - sum((1 - torch.sigmoid(logits[i])).log() for i in rivals)


def cuts(experiment, history, user, round_):
    """The piece of the history that each local step trains on."""
    local, longest = experiment.federation.local, experiment.model.max_length
    if local.epochs:
        once, stop = [], len(history)
        while stop > 1 or not once:
            once.append(history[max(0, stop - longest - 1) : stop])
            stop -= longest
        return once * local.epochs
    steps = local.steps or 1
    slack = max(0, len(history) - longest - 1) if local.window == "random" else 0
    draws = uniform_integers(experiment.seed, "window", round_, [user], steps, 2**31)[0].tolist()
    stops = [len(history) - draw * (slack + 1) // 2**31 for draw in draws]
    return [history[max(0, stop - longest - 1) : stop] for stop in stops]


def train(experiment, weights, history, user, round_):
    """Update of the whole table and body in float64, and the mean loss over the steps."""
    model, loss, local = experiment.model, experiment.loss, experiment.federation.local
    start = [part.double() for part in weights]
    table, body = (part.clone().requires_grad_() for part in start)
    items, pieces = len(table), cuts(experiment, history, user, round_)
    widths = [w for w in WIDTHS if w < 0.8 * model.max_length] + [model.max_length]
    width = next(w for w in widths if w >= min(max(len(history) - 1, 1), model.max_length))
    shared = []
    if loss.kind in ("sampled-softmax", "gbce"):
        rng = generator(experiment.seed, "negatives", round_)
        shared = rng.choice(items, min(loss.negatives, items), replace=False).tolist()
    private = uniform_integers(experiment.seed, "private-negatives", round_, [user], len(pieces) * width, items)[0]
    losses = []
    for step, piece in enumerate(pieces):
        n = len(piece) - 1
        if n < 1:
            continue
        masks, sites = None, 1 + 2 * model.blocks
        if model.dropout:
            bits = uniform_bits(experiment.seed, f"dropout-{step}", round_, [user], n * sites * model.dim)[0]
            share = round(model.dropout * 65536)
            kept = torch.from_numpy(bits.astype("int64") >= share).double() / (1 - share / 65536)
            masks = kept.reshape(n, sites, model.dim)
        hidden = encode(model, body, torch.stack([table[item] for item in piece[:-1]]), masks)
        total = 0
        for t in range(n):
            negatives = [int(private[step * width + t])] if loss.kind == "bce" else shared
            total = total + position_loss(loss, table @ hidden[t], piece[t + 1], negatives, set(history))
        mean = total / n
        gradients = torch.autograd.grad(mean, (table, body))
        losses.append(mean.item())
        with torch.no_grad():
            for part, gradient, begin in zip((table, body), gradients, start, strict=True):
                part.sub_(local.lr * (gradient + local.prox * (part - begin)))
    update = Weights(*(part.detach() - begin for part, begin in zip((table, body), start, strict=True)))
    return update, sum(losses) / max(1, len(losses))
