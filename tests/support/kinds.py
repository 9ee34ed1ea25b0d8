"""Every kind of model that is told apart by how it looks at a history; smaller than anybody would have it."""

ATTENTION = {
    "scaled-dot-product": {},
    "dot-product": {},
    "additive": {},
    "time-aware": {"buckets": 30},
    "local": {"window": 3},
    "top-k": {"k": 2},
    "entmax-1.5": {},
    "linear": {},
}
"""Options of each kind of attention."""
ENCODERS = {kind: {"attention": {"kind": kind, **own}} for kind, own in ATTENTION.items()} | {
    "time-aware, linear": {"attention": {"kind": "time-aware", "buckets": 5, "scale": "linear"}},
    "recency": {"position": "recency", "attention": {"kind": "additive"}},
    "recency, top-k": {"position": "recency", "attention": {"kind": "top-k", "k": 2}},
    "gru-attention": {"encoder": "gru-attention"},
    "cnn-attention": {"encoder": "cnn-attention"},
    "gru": {"encoder": "gru"},
}
"""Sections of models, under a head that looks at the last event."""
KINDS = ENCODERS | {
    "target": {"head": "target"},
    "target, time-aware": {"head": "target", "attention": {"kind": "time-aware", "buckets": 30}},
    "target, gru": {"head": "target", "encoder": "gru"},
}
"""And under those whose candidate looks at all."""
