"""Names and shapes of the model's parameters, in the order in which they travel; free of torch, so `show` is quick."""

from common.config import ModelConfig

ITEM_TABLE = "item"
"""Name of the tied item-embedding table, the one parameter whose size grows with the catalogue."""


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
    if config.position == "learned":
        shapes["position"] = (config.max_length, d)
    for block in range(config.blocks):
        attention = {
            "norm1.weight": (d,),
            "norm1.bias": (d,),
            "qkv.weight": (3 * d, d),
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
    return shapes | {"norm.weight": (d,), "norm.bias": (d,)}
