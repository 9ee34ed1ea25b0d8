"""Names and shapes of the model's parameters, in the order in which they travel; free of torch, so `show` is quick."""

from common.models.schema import Additive, BehaviourInput, InputConfig, IntervalInput, ModelConfig, TimeAware

ITEM_TABLE = "item"
"""Name of the tied item-embedding table, the one parameter whose size grows with the catalogue."""
ADAPTER = 8
"""Hidden width of a person's adapter."""


def parameter_shapes(config: ModelConfig, items: int) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter by name.

    Parameters
    ----------
    config : ModelConfig
        The model.
    items : int
        Size of the catalogue.

    Returns
    -------
    dict of str to tuple of int
        The item table first, then the body; every linear weight is ``(out, in)`` as in torch.
    """
    d, hidden = config.dim, config.dim * config.ffn
    shapes: dict[str, tuple[int, ...]] = {ITEM_TABLE: (items, d)}
    if config.position == "learned" and config.encoder != "gru":
        shapes["position"] = (config.max_length, d)
    shapes |= {f"inputs.{each.kind}": (_values(each), d) for each in config.inputs}
    shapes |= {f"front.{name}": shape for name, shape in _front(config).items()}
    for block in range(config.attends):
        attention = {
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "qkv.weight": (3 * d, d),
            **_attention(config),
            "out.weight": (d, d),
            "out.bias": (d,),
        }
        feed_forward = {
            "norm2.weight": (d,),
            "norm2.bias": (d,),
            "up.weight": (hidden, d),
            "up.bias": (hidden,),
            "down.weight": (d, hidden),
            "down.bias": (d,),
        }
        for name, shape in (attention | (feed_forward if hidden else {})).items():
            shapes[f"blocks.{block}.{name}"] = shape
    shapes |= {"norm.weight": (d,), "norm.bias": (d,)}
    if config.head == "target":
        shapes |= {"target.key.weight": (d, d), "target.value.weight": (d, d)}
    return shapes | {f"user.{name}": shape for name, shape in _personal(config).items()}


def _personal(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """What is a person's own; no `weight` among them, since where they are trained nobody shares them."""
    d = config.dim
    parts: dict[str, dict[str, tuple[int, ...]]] = {
        "bias": {"bias": (d,)},
        "scale": {"scale": (1,)},
        "adapter": {"adapter_down": (ADAPTER, d), "adapter_up": (d, ADAPTER)},
    }
    return {name: shape for kind in config.personal for name, shape in parts[kind].items()}


def _values(config: InputConfig) -> int:
    """How many vectors an input has."""
    if isinstance(config, BehaviourInput):
        return len(config.names)
    if isinstance(config, IntervalInput):
        return config.buckets
    return {"rating": 2, "hour": 24, "weekday": 7}[config.kind]


def _front(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of what stands before the attention blocks. A recurrent weight is used at each position, hence no `weight`."""
    d = config.dim
    norm: dict[str, tuple[int, ...]] = {"norm.weight": (d,), "norm.bias": (d,)}
    if config.encoder == "cnn-attention":
        return norm | {"weight": (d, config.kernel * d), "bias": (d,)}
    if config.encoder in {"gru", "gru-attention"}:
        return norm | {"weight": (3 * d, d), "bias": (3 * d,), "recurrent": (3 * d, d), "recurrent_bias": (3 * d,)}
    return {}


def _attention(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Parameters of a mechanism's own."""
    kind, width = config.attention, config.dim // config.heads
    if isinstance(kind, Additive):
        return {"vector": (config.heads, width)}
    if isinstance(kind, TimeAware):
        return {"interval_key": (kind.buckets, width), "interval_value": (kind.buckets, width)}
    return {}
