"""The schema of the model: how events are encoded, how they mix, and how items are scored. Free of torch."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from common.section import Natural, Positive, Rate, Section, Share


class ScaledDotProduct(Section):
    """Softmax of query · key / √K (Vaswani et al., NeurIPS 2017)."""

    kind: Literal["scaled-dot-product"] = "scaled-dot-product"
    """Selects this mechanism."""


class DotProduct(Section):
    """Softmax of query · key, unscaled (Luong et al., EMNLP 2015)."""

    kind: Literal["dot-product"]
    """Selects this mechanism."""


class Additive(Section):
    """Softmax of vᵀ tanh(query + key) (Bahdanau et al., ICLR 2015); dear for long histories."""

    kind: Literal["additive"]
    """Selects this mechanism."""


class TimeAware(Section):
    """Attention to what happened and how long before (TiSASRec: Li et al., WSDM 2020)."""

    kind: Literal["time-aware"]
    """Selects this mechanism."""
    buckets: Positive = 64
    """Buckets of intervals, each with a key and a value of its own."""
    scale: Literal["log", "linear"] = "log"
    """`linear` clips intervals at so many of the user's shortest, as the paper does; `log` tells years apart, too."""


class Local(Section):
    """Attention to the last few events only (Beltagy et al., arXiv 2004.05150); its cost grows linearly with length."""

    kind: Literal["local"]
    """Selects this mechanism."""
    window: Positive = 8
    """Events that a position sees, itself included."""


class TopK(Section):
    """Softmax over the largest scores only (Explicit Sparse Transformer: Zhao et al., arXiv 1912.11637)."""

    kind: Literal["top-k"]
    """Selects this mechanism."""
    k: Positive = 8
    """Scores that are kept."""


class Entmax(Section):
    """Sparse weights by 1.5-entmax in place of the softmax (Peters et al., ACL 2019)."""

    kind: Literal["entmax-1.5"]
    """Selects this mechanism."""


class Linear(Section):
    """Weights φ(query) · φ(key) (Katharopoulos et al., ICML 2020); the cost grows linearly with length."""

    kind: Literal["linear"]
    """Selects this mechanism."""


AttentionConfig = Annotated[
    ScaledDotProduct | DotProduct | Additive | TimeAware | Local | TopK | Entmax | Linear, Field(discriminator="kind")
]
"""What `model.attention` may be."""


class BehaviourInput(Section):
    """What sort of event it was: view, cart, buy and so on."""

    kind: Literal["behaviour"]
    """Selects this input."""
    names: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of all behaviours of the data, as in its column."""

    @model_validator(mode="after")
    def _once(self) -> "BehaviourInput":
        if len(set(self.names)) < len(self.names):
            raise ValueError("names of behaviours repeat; name each once")
        return self


class RatingInput(Section):
    """A rating, by a place between two vectors; none counts as nothing."""

    kind: Literal["rating"]
    """Selects this input."""
    low: float = 1.0
    """The rating that is the first vector; lower ones count as this."""
    high: float = 5.0
    """The rating that is the second; higher ones count as this."""

    @model_validator(mode="after")
    def _ordered(self) -> "RatingInput":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be smaller than high ({self.high})")
        return self


class HourInput(Section):
    """Hour of the day, in UTC."""

    kind: Literal["hour"]
    """Selects this input."""


class WeekdayInput(Section):
    """Day of the week, in UTC."""

    kind: Literal["weekday"]
    """Selects this input."""


class IntervalInput(Section):
    """Time since the event before, in doublings of a second."""

    kind: Literal["interval"]
    """Selects this input."""
    buckets: Positive = 32
    """Longer intervals than 2 to the power of so many less one, in seconds, count as the last."""


InputConfig = Annotated[
    BehaviourInput | RatingInput | HourInput | WeekdayInput | IntervalInput, Field(discriminator="kind")
]
"""What of an event is looked at beside its item."""


class ModelConfig(Section):
    """A sequence encoder with tied item embeddings; by default SASRec (Kang & McAuley, ICDM 2018), pre-LN."""

    encoder: Literal["attention", "gru-attention", "cnn-attention", "gru"] = "attention"
    """`attention`: blocks of self-attention. `gru-attention`, `cnn-attention`: a recurrent layer or a causal
    convolution in front of them. `gru`: the recurrent layer alone (GRU4Rec: Hidasi et al., ICLR 2016), a baseline."""
    inputs: tuple[InputConfig, ...] = ()
    """What of an event is looked at beside its item; each kind has vectors of its own, which are added."""
    attention: AttentionConfig = ScaledDotProduct()
    """How positions attend to their past."""
    head: Literal["dot-product", "target"] = "dot-product"
    """How an item is scored. `dot-product`: against the last hidden state. `target`: also against what it finds in the
    whole history, which it queries for itself (target attention, as in DIN: Zhou et al., KDD 2018)."""
    items: Literal["own", "features", "both"] = "own"
    """What an item's vector is: one of its `own`; the sum of those of its `features` (see `data.features`), so that
    items may be new, and the model small; or `both`, added up."""
    fusion: Literal["sum", "concatenation", "gate"] = "sum"
    """How an item's own vector and those of its features become one. `concatenation`: each fills columns of its own.
    `gate`: their weights are a softmax, for each item, of how they match a learned vector each."""
    own_dropout: Share = 0.0
    """With `items: both`, share of the items whose own vectors are left away in a round of training, so that features
    learn to stand alone (DropoutNet: Volkovs et al., NeurIPS 2017): for items that are new."""
    personal: tuple[Literal["bias", "scale", "adapter"], ...] = ()
    """What a person may add to the last hidden state: a `bias`, a small `adapter` network, a `scale`. Parameters named
    ``user.…``, for `federation.on_device`; all begin without effect."""
    kernel: Positive = 3
    """Events that the convolution of `cnn-attention` sees."""
    dim: Positive = 64
    """Width of item embeddings and hidden states."""
    blocks: Positive = 2
    """Attention blocks."""
    heads: Positive = 1
    """Attention heads; must divide `dim`."""
    ffn: Natural = 1
    """Hidden width of the feed-forward layer, as a multiple of `dim`; 0 leaves the layer away."""
    position: Literal["learned", "recency"] = "learned"
    """`learned`: a table of positions. `recency`: no parameters; attention falls by `recency` per event that lies
    between (ALiBi; Press et al., ICLR 2022), so noise has nothing to fall on."""
    recency: Rate = 0.2
    """The fall, in logits per event, where `position` is `recency`."""
    start: Literal["normal", "mean"] = "normal"
    """`mean`: attention's value and output maps begin at the identity plus the usual small numbers, so that a block
    begins as the mean of what it attends to; `normal`: at small numbers alone."""
    dropout: Share = 0.2
    """Dropout on embeddings and on the output of attention and feed-forward layers."""
    max_length: Positive = 50
    """Longest history that the model sees; of a longer one the most recent part."""

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelConfig":
        if self.dim % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide dim ({self.dim})")
        return self

    @model_validator(mode="after")
    def _positions_are_seen(self) -> "ModelConfig":
        if self.position == "recency" and (self.encoder == "gru" or self.attention.kind in {"local", "linear"}):
            mechanism = self.encoder if self.encoder == "gru" else f"attention {self.attention.kind}"
            raise ValueError(f"position recency biases scores, which {mechanism} does not have; take position learned")
        return self

    @model_validator(mode="after")
    def _keys_are_heard(self) -> "ModelConfig":
        # Sizes (blocks, heads, ffn) are not among them, so that one file serves to compare encoders.
        needed = {
            "attention": (self.attends > 0, "an encoder with blocks of attention; gru has none"),
            "start": (self.attends > 0, "an encoder with blocks of attention; gru has none"),
            "kernel": (self.encoder == "cnn-attention", "encoder: cnn-attention"),
            "recency": (self.position == "recency", "position: recency"),
            "own_dropout": (self.items == "both", "items: both"),
            "fusion": (self.items != "own", "items that are built; items: own have one vector"),
        }
        for key, (heard, what) in needed.items():
            if not heard and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is for {what}; take that, or leave {key} away")
        return self

    @model_validator(mode="after")
    def _inputs_once(self) -> "ModelConfig":
        kinds = [each.kind for each in self.inputs]
        if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
            raise ValueError(f"input {twice[0]} comes twice; name each kind once")
        return self

    @model_validator(mode="after")
    def _personal_once(self) -> "ModelConfig":
        if len(set(self.personal)) < len(self.personal):
            raise ValueError("personal names something twice")
        return self

    @property
    def attends(self) -> int:
        """Blocks of self-attention."""
        return 0 if self.encoder == "gru" else self.blocks

    @property
    def timed(self) -> bool:
        """Whether the model looks at the times of events."""
        looking = {"hour", "weekday", "interval"} & {each.kind for each in self.inputs}
        return bool(looking) or self.intervals

    @property
    def intervals(self) -> bool:
        """Whether attention looks at the times between events."""
        return self.attends > 0 and self.attention.kind == "time-aware"

    @property
    def plain(self) -> bool:
        """Whether this is SASRec itself."""
        usual, more = ("attention", "scaled-dot-product", "dot-product", "own"), self.inputs or self.personal
        return (self.encoder, self.attention.kind, self.head, self.items) == usual and not more
